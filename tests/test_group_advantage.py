"""m2kernels.group_advantage: hand-computed values, float64 oracle, hostile rows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import assert_kernel, device_of

import m2kernels as mk
from m2kernels.group_advantage import _group_advantage_torch, unsupported_reason
from m2kernels.reference import group_advantage_ref

BACKENDS = [b for b in ("cpu", "torch", "cuda", "triton") if unsupported_reason(b) is None]
OPTIONS = list(itertools.product(("mean", "loo"), ("none", "std")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed(backend):
    # Group 7 holds 1, 2, 6 (mean 3, sample std sqrt(7)); group -2 holds 4, 4.
    reward = torch.tensor([1.0, 4, 2, 6, 4], device=device_of(backend))
    group = torch.tensor([7, -2, 7, 7, -2], device=device_of(backend))
    mean = mk.group_advantage(reward, group, backend=backend)
    assert mean.tolist() == [-2, 0, -1, 3, 0]
    loo = mk.group_advantage(reward, group, baseline="loo", backend=backend)
    assert loo.tolist() == [-3, 0, -1.5, 4.5, 0]
    std = mk.group_advantage(reward, group, scale="std", eps=0.0, backend=backend)
    expected = torch.tensor([-2, 0, -1, 3, 0]) / 7**0.5
    torch.testing.assert_close(std.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("baseline", "scale"), OPTIONS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_oracle_with_hostile_rows(backend, baseline, scale, index):
    # 61 rows: not a multiple of a warp. Interleaved labels, some negative or huge, groups of one
    # and of equal rewards, a common offset of 1000, NaN and inf in invalid rows.
    torch.manual_seed(0)
    rows = 61
    labels = torch.tensor([-5, 0, 3, 2**31 - 1, -(2**31)])
    group = labels[torch.randint(0, 5, (rows,))].to(index)
    group[0] = 77
    reward = torch.randn(rows) + 1000
    reward[group == 3] = 0.1
    valid = torch.rand(rows) > 0.3
    valid[0] = True
    reward[~valid] = torch.tensor([float("nan"), float("inf")]).repeat(rows)[: int((~valid).sum())]
    options = {"baseline": baseline, "scale": scale}
    dev = device_of(backend)
    out = mk.group_advantage(reward.to(dev), group.to(dev), valid=valid.to(dev), backend=backend, **options).cpu()
    oracle = group_advantage_ref(reward, group, valid=valid, **options)
    plain = _group_advantage_torch(reward, group, valid, baseline, scale, 1e-6)
    assert_kernel("advantage", out, plain, oracle)
    assert bool((out[~valid] == 0).all())
    assert bool((out[group == 3] == 0).all()), "equal rewards must give exact zeros"
    assert out[0] == 0, "a group of one must give an exact zero"


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_all_invalid_and_strided(backend):
    dev = device_of(backend)
    empty = torch.empty(0, device=dev)
    assert mk.group_advantage(empty, empty.int(), backend=backend).shape == (0,)
    reward = torch.arange(12.0, device=dev)[::2]
    group = torch.arange(12, device=dev)[::2] // 6
    none = mk.group_advantage(reward, group, valid=torch.zeros(6, dtype=bool).to(dev))
    assert none.tolist() == [0] * 6
    strided = mk.group_advantage(reward, group, backend=backend)
    assert strided.tolist() == [-2, 0, 2, -2, 0, 2]
    nan = torch.where(group == 0, float("nan"), reward)
    assert mk.group_advantage(nan, group, backend=backend)[3:].tolist() == [-2, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, -1e300])
@pytest.mark.parametrize("num", [1, 3, 6, 7, 10, 16])
def test_equal_rewards_give_exact_zeros(dtype, reward, num):
    """Whose rows have no gradient, and are skipped; a hidden row and another group do not matter."""
    rewards = torch.tensor([reward] * num + [5.0, 1.0, 2.0], dtype=dtype)
    group = torch.tensor([0] * (num + 1) + [1, 1])
    valid = torch.tensor([True] * num + [False, True, True])
    for baseline in ("mean", "loo"):
        got = mk.group_advantage(rewards, group, baseline=baseline, scale="std", eps=0.0, valid=valid)
        if rewards[0].isfinite():
            assert got[: num + 1].tolist() == [0.0] * (num + 1)
        assert got[-1] == -got[-2] != 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3)), min_size=1, max_size=40))
def test_groups_sum_to_zero_in_any_order(pairs):
    # Small integers keep every sum exact up to the final division.
    group = torch.tensor([g for g, _ in pairs])
    reward = torch.tensor([float(r) for _, r in pairs])
    out = mk.group_advantage(reward, group)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))
    assert torch.equal(mk.group_advantage(reward[order], group[order]), out[order])
    for g in group.unique():
        assert abs(float(out[group == g].sum())) < 1e-5


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch" and device_of(b) == "cpu"])
def test_opcheck_and_compile(backend):
    reward, group = torch.randn(10), torch.arange(10) % 3
    args = (reward, group, torch.rand(10) > 0.2, True, True, 1e-6)
    ops = torch.ops.m2kernels
    torch.library.opcheck(ops.group_advantage_triton if backend == "triton" else ops.group_advantage, args)
    compiled = torch.compile(mk.group_advantage, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(reward, group, backend=backend), mk.group_advantage(reward, group))


def test_reward_is_a_constant():
    reward = torch.randn(4, requires_grad=True)
    assert not mk.group_advantage(reward, torch.zeros(4, dtype=torch.int32)).requires_grad


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reward": torch.zeros(2, 2)}, "reward has shape"),
        ({"reward": torch.zeros(3, dtype=torch.float16)}, "reward is float16; expected float32"),
        ({"group": torch.zeros(3)}, "group is float32; expected int32 or int64"),
        ({"group": torch.zeros(2, dtype=torch.int64)}, r"group has shape \[2\]; expected"),
        ({"valid": torch.ones(3)}, "valid is float32; expected bool"),
        ({"baseline": "median"}, "expected one of"),
        ({"scale": "var"}, "expected one of"),
        ({"eps": -1.0}, "eps"),
        ({"backend": "cude"}, "got backend 'cude'"),
        ({"reward": torch.zeros(3).double(), "backend": "cpu"}, "cannot run: reward is"),
    ],
)
def test_wrong_arguments(kwargs, message):
    base = {"reward": torch.zeros(3), "group": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        mk.group_advantage(**{**base, **kwargs})
