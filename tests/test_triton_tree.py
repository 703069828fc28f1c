"""Tree attention by Triton under the interpreter: float64 oracle, hostile inputs, isolation to the bit.

The interpreter's time is that of its programs and operations, not of their size: few tiles, but several each way.
"""

import pytest
import torch
from forests import dialogues, forests, replies
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import assert_kernel
from torch.nn import functional as F
from tree_cases import NAMES, assert_matches, dense, inputs, oracle, run
from triton_testing import interpreted

import m2kernels as mk
from m2kernels.tree_attention import unsupported_reason

pytest.importorskip("triton", reason="Triton is not installed: see `make test-triton`")
pytestmark = interpreted

HALVES = [torch.bfloat16, torch.float16]
MODES = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomics"])


def mixed(block=32, kv_block=16):
    """Two dialogues, a short and an empty sequence: 109 rows, in part of a tile."""
    return mk.plan_tree(dialogues(2, 3, 11, 9, 4, 6) + [[1, 2], [1], []], block=block, kv_block=kv_block)


@pytest.fixture
def split_blocks(monkeypatch):
    """KV blocks of more than one tile are split."""
    from m2kernels import _tree_attention_triton as tree

    monkeypatch.setattr(tree, "MIN_UNIT", 1)
    monkeypatch.setattr(tree, "num_programs", lambda device: 1000)


@MODES
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 64), ((3, 1), 128)])
def test_halves(dtype, heads, dim, deterministic):
    plan = mixed()
    xs, d = inputs(plan.num_rows, heads, dim, dtype)
    assert_matches(xs, d, plan, "triton", deterministic=deterministic)


@MODES
@pytest.mark.parametrize(("heads", "dim"), [((2, 1), 64), ((1, 1), 128)])
def test_float32(heads, dim, deterministic):
    plan = mk.plan_tree(dialogues(1, 3, 11, 9, 4, 6), block=32, kv_block=32)
    xs, d = inputs(plan.num_rows, heads, dim, torch.float32)
    assert_matches(xs, d, plan, "triton", deterministic=deterministic)


@MODES
@pytest.mark.parametrize(("block", "kv_block"), [(128, 128), (128, 64), (64, 64)])
@pytest.mark.parametrize("dim", [64, 128])
def test_tiles_of_a_gpu(block, kv_block, dim, deterministic):
    """The tile shapes that ship, on rows that fill no tile: partial ones behind the diagonal, and full ones."""
    plan = mk.plan_tree(replies(1, 2, 130, 61) + replies(1, 1, 20, 7), block=block, kv_block=kv_block)
    xs, d = inputs(plan.num_rows, (2, 1), dim, torch.bfloat16)
    assert_matches(xs, d, plan, "triton", deterministic=deterministic)


@settings(max_examples=25, deadline=None)
@given(case=forests(max_sequences=9, max_new=16), seed=st.integers(0, 9), scale=st.sampled_from([0.3, 0.0, -0.2]))
def test_any_forest(case, seed, scale):
    # And a chain: where rows see themselves alone dq and dk are 0, and their error the rounding of what cancels.
    sequences, keys = case
    keys = None if keys is None else [*keys, "chain"]
    plan = mk.plan_tree([*sequences, list(range(9, 21))], keys=keys, block=32)
    xs, d = inputs(plan.num_rows, (2, 1), 64, torch.float32, seed)
    assert_matches(xs, d, plan, "triton", scale=scale)


@MODES
def test_split_kv_blocks(split_blocks, deterministic):
    from m2kernels import _tree_attention_triton as tree

    plan = mk.plan_tree(replies(1, 3, 40, 21), block=32)
    units = tree.backward_units(plan, 1, 1000)
    assert units.num_slots > len(units.splits) >= 2
    xs, d = inputs(plan.num_rows, (2, 1), 64, torch.bfloat16)
    assert_matches(xs, d, plan, "triton", deterministic=deterministic)
    first = run(xs, d, plan, "triton")
    assert all(torch.equal(a, b) for a, b in zip(run(xs, d, plan, "triton"), first, strict=True))


def test_units_follow_the_work():
    from m2kernels import _tree_attention_triton as tree

    plan = mk.plan_tree(replies(1, 16, 4096, 2048))
    total = plan.tiles.num_backward_tiles
    for kv_heads, programs in ((1, 132), (8, 132), (8, 1)):
        units = tree.backward_units(plan, kv_heads, programs).units
        longest = int((units[:, 2] - units[:, 1]).max())
        assert longest <= max(tree.MIN_UNIT, -(-total * kv_heads // (tree.UNITS_PER_PROGRAM * programs)))
    assert tree.backward_units(plan, 8, 1).num_slots == 0, "nothing is split without need"
    assert tree.backward_units(plan, 1, 132) is tree.backward_units(plan, 1, 132)


def test_large_scores():
    """|scores| to several hundred: no exponential may overflow, nor a hidden one count."""
    plan = mixed()
    xs, d = inputs(plan.num_rows, (2, 1), 64, torch.float32, size=6.0)
    got, want, plain = run(xs, d, plan, "triton", scale=1.0), oracle(xs, d, plan, 1.0), dense(xs, d, plan, 1.0)
    for name, mine, theirs, true in zip(NAMES, got, plain, want, strict=True):
        assert_kernel(name, mine, theirs, true, eps=1e-4)


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_siblings_are_isolated_to_the_bit(dtype, deterministic):
    """Other values in one reply, to 1e4: all rows outside it are the same to the bit, and get no gradient from it."""
    plan = mk.plan_tree(replies(1, 3, 37, 21) + dialogues(1, 2, 10, 9, 5, 4, seed=3), block=32, kv_block=16)
    xs, d = inputs(plan.num_rows, (2, 1), 64, dtype)
    mine = plan.rows(1)[37:].long()
    others = torch.ones(plan.num_rows, dtype=torch.bool)
    others[mine] = False
    before = mk.tree_attention(*xs, plan, backend="triton", deterministic=deterministic)
    noisy = []
    for x in xs:
        y = x.detach().clone()
        y[mine] = (1e4 * (2 * torch.rand(y[mine].shape, generator=torch.Generator().manual_seed(7)) - 1)).to(dtype)
        noisy.append(y.requires_grad_())
    after = mk.tree_attention(*noisy, plan, backend="triton", deterministic=deterministic)
    assert torch.equal(after[others], before[others]) and not torch.equal(after[mine], before[mine])
    d[others] = 0.0
    outside = [i for i in range(plan.num_rows) if i not in set(plan.rows(1).tolist())]
    for grad in torch.autograd.grad(after, noisy, d):
        assert not grad[outside].any()


@MODES
def test_nan_in_padding_and_in_empty_tiles_never_shows(deterministic):
    """Trees and replies that begin on a tile's edge: what a tile classed empty holds is not read."""
    sequences = replies(2, 2, 32, 32)
    plan = mk.plan_tree(sequences, block=32, kv_block=16)
    num = plan.num_rows
    assert num == 192
    xs, d = inputs(num + 5, (2, 1), 64, torch.bfloat16)
    for x in (*xs, d):
        x.data[num:] = torch.nan
    clean = [x.detach()[:num].requires_grad_() for x in xs]
    want = run(clean, d[:num], plan, "triton", deterministic=deterministic)
    got = run(xs, d, plan, "triton", deterministic=deterministic)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[:num], b) and not a[num:].any()
    poison = torch.cat([plan.rows(1)[32:], plan.rows(2), plan.rows(3)]).unique().long()
    for x in (*xs, d):
        x.data[poison] = torch.nan
    got = run(xs, d, plan, "triton", deterministic=deterministic)
    reply = plan.rows(0)[32:].long()  # the trunk's own gradients hear of the poisoned reply
    for name, a, b in zip(NAMES, got, want, strict=True):
        keep = reply if name in ("dk", "dv") else plan.rows(0).long()
        assert torch.equal(a[keep], b[keep]), name
        assert a[poison].isnan().any()


def test_a_nan_spreads_to_what_sees_it():
    plan = mk.plan_tree(replies(1, 2, 16, 16), block=16)
    (q, k, v), _ = inputs(plan.num_rows, (2, 1), 64, torch.float32)
    row = int(plan.rows(0)[20])
    for x in (q, k, v):
        x.data[row] = torch.nan
    out, lse = mk.tree_attention(q, k, v, plan, return_lse=True, backend="triton")
    below = plan.rows(0)[20:].long()
    assert out[below].isnan().all() and lse[below].isnan().all()
    assert out[plan.rows(0)[:16].long()].isfinite().all() and out[plan.rows(1).long()].isfinite().all()


def test_chains_are_causal_and_varlen_attention():
    sequences = [list(range(n)) for n in (40, 17, 16, 1, 33)]
    plan = mk.plan_tree(sequences, keys=range(5), block=32)
    (q, k, v), _ = inputs(plan.num_rows, (2, 1), 64, torch.float32)
    out = mk.tree_attention(q, k, v, plan, backend="triton")
    start = 0
    for n in map(len, sequences):
        part = [x[start : start + n].transpose(0, 1)[None] for x in (q, k, v)]
        want = F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        assert float((out[start : start + n] - want).detach().abs().max()) < 1e-6
        start += n


def test_strided_inputs_and_gradients():
    """q, k, v as views of one projection, where a tensor map can take them as they lie, and where it cannot."""
    plan = mk.plan_tree(replies(1, 3, 18, 16), block=32)
    (q, k, v), d = inputs(plan.num_rows, (4, 2), 64, torch.bfloat16)
    want = run([q, k, v], d, plan, "triton")
    grouped = torch.cat([q.view(-1, 2, 128), k, v], dim=2).detach().requires_grad_()  # Megatron's order
    odd = torch.cat([grouped.detach(), torch.zeros(plan.num_rows, 2, 3, dtype=torch.bfloat16)], dim=2)
    for packed in (grouped, odd.requires_grad_()):
        parts = packed.split([128, 64, 64, *([3] if packed is odd else [])], dim=2)
        out = mk.tree_attention(parts[0].reshape(-1, 4, 64), *parts[1:3], plan, backend="triton")
        (grad,) = torch.autograd.grad(out, packed, d.transpose(0, 2).contiguous().transpose(0, 2))
        grads = torch.cat([want[2].view(-1, 2, 128), *want[3:]], dim=2)
        assert torch.equal(out, want[0]) and torch.equal(grad[..., :256], grads)
    out = mk.tree_attention(q, k, v, plan, backend="triton")
    summed = torch.autograd.grad(out.sum(), [q, k, v])  # an expanded gradient: strides of 0
    ones = torch.autograd.grad(mk.tree_attention(q, k, v, plan, backend="triton"), [q, k, v], torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(summed, ones, strict=True))


def test_nothing_to_attend_to_and_nothing_kept():
    xs, d = inputs(3, (2, 1), 64, torch.bfloat16)
    assert all(not x.any() for x in run(xs, d, mk.plan_tree([]), "triton"))
    with torch.no_grad():
        plan = mk.plan_tree([[1, 2, 3]], block=16)
        assert mk.tree_attention(*xs, plan, backend="triton").grad_fn is None
    lse = mk.tree_attention(*xs, plan, backend="triton", return_lse=True)[1]
    assert lse.dtype == torch.float32 and lse.shape == (3, 2) and not lse.requires_grad


def test_a_second_derivative_is_refused():
    plan = mk.plan_tree([[1, 2, 3]], block=16)
    xs, d = inputs(3, (2, 1), 64, torch.bfloat16)
    out = mk.tree_attention(*xs, plan, backend="triton")
    (grad,) = torch.autograd.grad(out, xs[:1], d.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("dim", "dtype", "block", "reason"),
    [
        (96, torch.bfloat16, 128, "head_dim is 96; the kernels take 64 and 128"),
        (64, torch.float64, 128, "q is torch.float64"),
        (64, torch.float32, 256, "the plan's tiles have 256 rows; the kernels take 64 and 128"),
        (64, torch.float32, 128, None),
    ],
)
def test_what_cannot_run(dim, dtype, block, reason):
    plan = mk.plan_tree([[1, 2, 3]], block=block)
    q = torch.zeros(3, 2, dim, dtype=dtype)
    got = unsupported_reason("triton", q, plan)
    assert got == reason or (reason is not None and reason in got)


def test_a_plan_elsewhere_is_refused():
    plan = mk.plan_tree([[1, 2, 3]], block=16).to("meta")
    x = torch.zeros(3, 2, 64)
    with pytest.raises(ValueError, match=r"the plan is on meta, q on cpu; .* plan = plan.to\(q.device\)"):
        mk.tree_attention(x, x, x, plan, backend="triton")
