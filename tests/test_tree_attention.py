"""m2kernels.tree_attention against causal attention on each sequence by itself, in float64."""

import importlib
import warnings

import pytest
import torch
from forests import dialogues, forests, long_forest, replies
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import assert_kernel, threads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from tree_cases import EPS, assert_matches, assert_sampled, inputs, leaf_oracle, oracle, run

import m2kernels as mk

BACKENDS = ("cpu", "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 16), ((9, 3), 64), ((2, 2), 128), ((6, 1), 24)])
def test_dtypes_and_heads(backend, dtype, heads, dim):
    plan = mk.plan_tree(dialogues(2, 3, 9, 5, 2, 3) + [[1, 2], [1], []])
    xs, d = inputs(plan.num_rows, heads, dim, dtype)
    assert_matches(xs, d, plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(case=forests(max_sequences=9, max_new=12), seed=st.integers(0, 9), scale=st.sampled_from([0.3, 0.0, -0.2]))
def test_any_forest(backend, case, seed, scale):
    plan = mk.plan_tree(case[0], keys=case[1], block=16)
    xs, d = inputs(plan.num_rows, (4, 2), 8, torch.float32, seed)
    if plan.num_rows:
        assert_matches(xs, d, plan, backend, scale=scale)


def assert_long(seed, total, longest, dtype):
    plan = mk.plan_tree(long_forest(seed, total, longest))
    xs, d = inputs(plan.num_rows, (2, 1), 16, dtype, seed)
    assert_matches(xs, d, plan, "cpu", exact=leaf_oracle)
    # The reference's GEMMs sum a key's queries one after the other, the yardstick's by blocks: 3.5 times at seed
    # 107699887, 146 tokens, up to 200, float32.
    assert_matches(xs, d, plan, "torch", exact=leaf_oracle, ratio=4.0)


LONG = {
    "seed": st.integers(0, 2**32 - 1),
    "total": st.integers(1, 2048),
    "longest": st.sampled_from([30, 200, 900]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
}


@settings(max_examples=2, deadline=None)
@example(seed=3, total=2048, longest=200, dtype=torch.float32)
@example(seed=74224228, total=726, longest=30, dtype=torch.float32)  # two keys under 180 rows
@given(**LONG)
def test_forests_of_two_thousand_tokens(seed, total, longest, dtype):
    assert_long(seed, total, longest, dtype)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(**LONG)
def test_many_forests_of_two_thousand_tokens(seed, total, longest, dtype):
    assert_long(seed, total, longest, dtype)


def test_the_oracle_by_leaf_is_the_oracle():
    plan = mk.plan_tree(dialogues(2, 3, 9, 5, 2, 3) + [[1, 2], [1], [], [1, 2]])
    xs, d = inputs(plan.num_rows, (4, 2), 8, torch.float64)
    for mine, true in zip(leaf_oracle(xs, d, plan, 0.3), oracle(xs, d, plan, 0.3), strict=True):
        assert float((mine - true).detach().abs().max()) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend):
    """|scores| to several hundred: no exponential may overflow, in the padding of a stack neither."""
    plan = mk.plan_tree(replies(2, 6, 12, 9) + replies(1, 3, 12, 8))
    xs, d = inputs(plan.num_rows, (4, 2), 16, torch.float32, size=12.0)
    got = run(xs, d, plan, backend)
    want = oracle(xs, d, plan, 0.25)
    for name, mine, true in zip(("o", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert_kernel(name, mine, true.float(), true, eps=1e-4)


@pytest.mark.parametrize(
    "sequences",
    [dialogues(3, 5, 700, 130, 40, 90), replies(4, 16, 300, 257), dialogues(1, 40, 129, 64, 3, 20)],
    ids=["dialogues", "replies", "deep"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_forests_on_sampled_rows(sequences, dtype):
    """Of the cpu backend: results, and what gradients the sampled rows send up their paths of thousands."""
    plan = mk.plan_tree(sequences)
    xs, d = inputs(plan.num_rows, (3, 1), 32, dtype)
    g = torch.Generator().manual_seed(1)
    paths = {}
    for i in torch.randint(0, len(sequences), (8,), generator=g).tolist():
        path = plan.rows(i).long()
        for place in [*torch.randint(0, len(path), (5,), generator=g).tolist(), len(path) - 1]:
            paths[int(path[place])] = path[: place + 1]
    assert_sampled(xs, d, plan, "cpu", list(paths.values()))


def test_two_thousand_rows():
    plan = mk.plan_tree(dialogues(3, 5, 300, 60, 20, 40) + replies(2, 4, 90, 48))
    assert plan.num_rows > 2000
    xs, d = inputs(plan.num_rows, (4, 2), 32, torch.float32)
    assert_matches(xs, d, plan, *BACKENDS, exact=leaf_oracle)


@pytest.mark.parametrize("backend", BACKENDS)
def test_siblings_are_isolated_to_the_bit(backend):
    """Other values in one reply: all rows outside it are the same to the bit, and get no gradient from it."""
    plan = mk.plan_tree(replies(2, 4, 37, 21) + dialogues(1, 3, 20, 9, 5, 4, seed=3))
    xs, d = inputs(plan.num_rows, (6, 2), 32, torch.float32)
    mine = plan.rows(1)[37:].long()
    others = torch.ones(plan.num_rows, dtype=torch.bool)
    others[mine] = False
    before = mk.tree_attention(*xs, plan, backend=backend)
    noisy = []
    for x in xs:
        y = x.detach().clone()
        y[mine] = 1e4 * torch.randn(y[mine].shape, generator=torch.Generator().manual_seed(7))
        noisy.append(y.requires_grad_())
    after = mk.tree_attention(*noisy, plan, backend=backend)
    assert torch.equal(after[others], before[others]) and not torch.equal(after[mine], before[mine])
    d[others] = 0.0
    own = set(plan.rows(1).tolist())
    for grad in torch.autograd.grad(before, xs, d):
        leaked = [i for i in range(plan.num_rows) if i not in own and bool((grad[i] != 0).any())]
        assert leaked == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_padding_and_in_other_trees_never_shows(backend):
    """Rows past the plan's are not read; a tree of NaN stays alone; so does a smaller sibling, in the forward."""
    sequences = replies(2, 3, 10, 7)
    plan = mk.plan_tree(sequences)
    num = plan.num_rows
    xs, d = inputs(num + 5, (4, 2), 16, torch.float32)
    other_tree = torch.cat([plan.rows(i) for i in (3, 4, 5)]).unique().long()
    for x in xs:
        x.data[num:] = torch.nan
        x.data[other_tree] = torch.nan
    d[num:] = torch.nan
    got = run(xs, d, plan, backend)
    clean = [x.detach()[:num].nan_to_num().requires_grad_() for x in xs]
    want = run(clean, d[:num], plan, backend)
    keep = torch.cat([plan.rows(i) for i in (0, 1, 2)]).unique().long()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[keep], b[keep]) and not a[num:].any()
    reply = plan.rows(1)[10:].long()
    poisoned = [x.detach().clone() for x in clean]
    for x in poisoned:
        x[reply] = torch.nan
    out = mk.tree_attention(*poisoned, plan, backend=backend)
    rest = [i for i in range(num) if i not in set(reply.tolist())]
    assert torch.equal(out[rest], want[0][rest].detach()) and out[reply].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_chains_are_causal_and_varlen_attention(backend):
    sequences = [list(range(n)) for n in (40, 17, 16, 1, 33)]
    plan = mk.plan_tree(sequences, keys=range(5))
    (q, k, v), _ = inputs(plan.num_rows, (4, 2), 16, torch.float32)
    out = mk.tree_attention(q, k, v, plan, backend=backend)
    start = 0
    for n in map(len, sequences):
        part = [x[start : start + n].transpose(0, 1)[None] for x in (q, k, v)]
        want = F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        assert float((out[start : start + n] - want).abs().max()) < 1e-6
        start += n


@pytest.mark.parametrize(("backend", "runs"), [("cpu", 100), ("torch", 20)])
def test_repeated_runs_are_equal_to_the_bit_on_any_threads(backend, runs):
    sequences = replies(2, 3, 40, 20)
    plan = mk.plan_tree(sequences)
    xs, d = inputs(plan.num_rows, (4, 2), 32, torch.bfloat16)
    with threads(1):
        first = run(xs, d, plan, backend)
    for k in range(runs - 1):
        with threads(2 + k % 3 if backend == "cpu" else 1):
            again = run(xs, d, mk.plan_tree(sequences), backend)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend):
    plan = mk.plan_tree(replies(1, 3, 8, 6))
    (q, k, v), d = inputs(plan.num_rows, (4, 2), 16, torch.float32)
    want = run([q, k, v], d, plan, backend)
    packed = torch.cat([q, k, v], dim=1).detach().requires_grad_()
    parts = packed.split([4, 2, 2], dim=1)
    out = mk.tree_attention(*parts, plan, backend=backend)
    (grad,) = torch.autograd.grad(out, packed, d.transpose(0, 2).contiguous().transpose(0, 2))
    assert torch.equal(out, want[0]) and torch.equal(grad, torch.cat(want[2:], dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to(backend):
    plan = mk.plan_tree([])
    xs, d = inputs(3, (2, 1), 16, torch.float32)
    assert all(not x.any() for x in run(xs, d, plan, backend))
    xs, d = inputs(0, (2, 1), 16, torch.float32)
    assert mk.tree_attention(*xs, plan, backend=backend).shape == (0, 2, 16)


def test_no_gradient_kept_without_need():
    plan = mk.plan_tree(replies(1, 3, 8, 6))
    (q, k, v), _ = inputs(plan.num_rows, (4, 2), 16, torch.float32)
    with torch.no_grad():
        assert mk.tree_attention(q, k, v, plan).grad_fn is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 2)}, r"q has shape \[3, 2\]; expected \[rows, heads, head_dim\]"),
        ({"k": torch.zeros(3, 2, 16, dtype=torch.float64)}, "k is float64; expected float32"),
        ({"v": torch.zeros(3, 1, 16)}, "expected k and v alike"),
        ({"q": torch.zeros(3, 3, 16)}, "3 query heads cannot share 2 KV heads"),
        ({"q": torch.zeros(2, 4, 16), "k": torch.zeros(2, 2, 16), "v": torch.zeros(2, 2, 16)}, "q has 2 rows"),
        ({"scale": float("nan")}, "got scale nan"),
        ({"backend": "cuda"}, "there is no cuda kernel for tree_attention"),
        ({"backend": "fast"}, "got backend 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    plan = mk.plan_tree([[1, 2, 3]])
    good = {"q": torch.zeros(3, 4, 16), "k": torch.zeros(3, 2, 16), "v": torch.zeros(3, 2, 16)}
    with pytest.raises(ValueError, match=message):
        mk.tree_attention(**(good | change), plan=plan)


def test_doctor_lists_it():
    report = mk.doctor()["tree_attention"]
    assert report["cpu"] is None and report["torch"] is None and "no cuda kernel" in report["cuda"]


def test_the_reference_on_a_gpu_is_nobody_s_silent_choice(monkeypatch):
    module = importlib.import_module("m2kernels.tree_attention")
    monkeypatch.setattr(module, "_tree_attention_torch", lambda q, *rest: (q, None))
    module._warn_of_reference.cache_clear()
    plan = mk.plan_tree([[1, 2, 3], [1, 2]])
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        q, kv = (torch.empty(plan.num_rows, heads, 16, device="cuda") for heads in (4, 2))
        reason = module.unsupported_reason("triton", q, plan)
        if reason is None:
            pytest.skip("triton can")
        mk.tree_attention(q, kv, kv, plan, backend="torch")
        assert not caught
        for _ in range(2):
            mk.tree_attention(q, kv, kv, plan)
    assert len(caught) == 1 and reason in str(caught[0].message)
