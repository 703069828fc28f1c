"""The Triton head under the interpreter: float64 oracle, hostile inputs, invariance to the bit."""

from dataclasses import replace

import pytest
import test_linear_policy_loss as policy
import torch
from kernel_testing import assert_kernel
from triton_head_cases import (
    HeadCase,
    answer,
    check_gradient,
    check_head,
    check_statistics,
    make_case,
    oracle_rows,
)
from triton_testing import interpreted

import m2kernels as mk
from m2kernels._head_kernels import HeadSettings, TileStats, merge_tiles
from m2kernels._triton import triton_head_reason

pytest.importorskip("triton", reason="Triton is not installed: see `make test-triton`")
pytestmark = interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def head():
    from m2kernels._head_triton import TritonHead

    return TritonHead()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "entropy"])
def test_oracle(dtype, extras, entropy):
    # 131 rows: a full block and a ragged one. 72: no multiple of BLOCK_K. 650: of no block, 5.1 tiles.
    check_head(head(), make_case(dtype, 131, 72, 650, extras=extras, entropy=entropy))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "offset"), [(12.0, 0.0), (3.0, 1000.0)], ids=["peaked", "offset"])
def test_large_logits(dtype, scale, offset):
    case = make_case(dtype, 64, 64, 384, scale=scale, offset=offset)
    z = case.hidden.float() @ case.weight.float().t()
    assert float(z.abs().max()) > 40
    check_head(head(), case)


def test_a_target_that_is_out_of_reach():
    # p ~ e^-80: the sum of the others over the target's own weight still fits in float32.
    case = make_case(torch.float32, 8, 64, 256, scale=1.0)
    case.weight[5] = case.weight[5] - 80 * case.hidden[0] / case.hidden[0].dot(case.hidden[0])
    case.target[:] = 5
    logp, _, _ = answer(case, torch.float64)
    assert float(logp[0]) < -75
    check_head(head(), case)


def test_merge_equals_torch_on_hostile_tiles():
    # Targets far below and far above the rest, absent ones, tiles without a column, a NaN, confident rows.
    g = torch.Generator().manual_seed(0)
    top = torch.randn(40, 70, generator=g) * 5
    total = 1 + torch.rand(40, 70, generator=g) * 100
    moment = -torch.rand(40, 70, generator=g) * total
    target = torch.randn(40, generator=g)
    target[:7] = torch.tensor([-2000.0, -900.0, 900.0, 30.0, 1e30, -torch.inf, torch.inf])
    top[10:20] += 1000.0
    target[10:20] += 1000.0
    target[15:20] += 60.0  # logp near 0
    top[7:9], total[7:9], moment[7:9] = -torch.inf, 0.0, 0.0
    top[8, 3:5], total[8, 3:5] = 1.0, 2.0
    total[9, 1] = float("nan")
    stats = TileStats(target, top, total, moment)
    want = merge_tiles(stats)
    assert want.logp[6].isnan()
    for layout in (stats, TileStats(target, *(x.t().contiguous().t() for x in stats[1:]))):
        for a, b in zip(head().merge(layout), want, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-7, atol=1e-30, equal_nan=True)
    assert head().merge(stats._replace(moment=None)).entropy is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch(dtype):
    case = make_case(dtype, 150, 72, 650)
    whole, _ = head().forward(case.hidden, case.weight, case.settings, entropy=True, keep=True)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    for rows in (order, order[:7], torch.tensor([149]), torch.tensor([3, 3])):
        one = case.pick(rows)
        part, kept = head().forward(one.hidden, one.weight, one.settings, entropy=True, keep=False)
        assert kept is None
        for whole_field, field in zip(whole, part, strict=True):
            assert torch.equal(whole_field[rows], field)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_cut_at_a_tile_give_the_same_tiles(dtype):
    case = make_case(dtype, 20, 72, 650)
    whole, _ = head().forward(case.hidden, case.weight, case.settings, entropy=True, keep=False)
    tops = []
    for start, end in ((0, 128), (128, 512), (512, 650)):
        held = (case.target >= start) & (case.target < end)
        target = torch.where(held, case.target - start, -1)
        settings = replace(case.settings, target=target, num_valid=end - start)
        part, _ = head().forward(case.hidden, case.weight[start:end], settings, entropy=True, keep=False)
        tops.append(torch.stack(part[1:]))
        assert torch.equal(part.z_target[held], whole.z_target[held])
    assert torch.equal(torch.cat(tops, 2), torch.stack(whole[1:]))


def test_nan_stays_in_its_row_and_zero_gradients_hide_it():
    case = make_case(torch.float32, 10, 64, 256)
    clean, _ = head().forward(case.hidden, case.weight, case.settings, entropy=True, keep=False)
    case.hidden[4, 3] = float("nan")
    stats, kept = head().forward(case.hidden, case.weight, case.settings, entropy=True, keep=True)
    others = torch.arange(10) != 4
    for before, after in zip(clean, stats, strict=True):
        assert torch.equal(before[others], after[others])
    assert stats.total[4].isnan().all()
    case.grad_logp[4] = case.grad_entropy[4] = 0.0
    rows = oracle_rows(make_case(torch.float32, 10, 64, 256))
    dz = head().grad(kept, case.settings, rows, case.upstream)
    assert not dz.isnan().any() and not dz[4].any()


def test_nothing_to_do_and_unaligned_views():
    case = make_case(torch.bfloat16, 5, 64, 256)
    empty = case.pick(torch.arange(0))
    stats, _ = head().forward(empty.hidden, case.weight, empty.settings, entropy=True, keep=True)
    assert [x.shape for x in stats] == [(0,), (0, 2), (0, 2), (0, 2)]
    none = replace(case.settings, target=torch.full((5,), -1), num_valid=0)
    stats, kept = head().forward(case.hidden, case.weight[:0], none, entropy=False, keep=True)
    assert stats.top.shape == (5, 0) and kept.scratch.shape == (5, 0)
    want, _ = head().forward(case.hidden, case.weight, case.settings, entropy=False, keep=False)
    flat = torch.empty(256 * 64 + 1, dtype=torch.bfloat16)
    shifted = flat[1:].view(256, 64)
    shifted.copy_(case.weight)
    got, _ = head().forward(case.hidden, head().prepare(shifted), case.settings, entropy=False, keep=False)
    assert torch.equal(got.total, want.total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(dtype):
    # The same problem with its logits made first: an identity GEMM turns them into a head's case.
    case = make_case(torch.float32, 37, 72, 650)
    wide = torch.zeros(37, 700, dtype=dtype)
    logits = wide[:, :650]
    logits.copy_(case.hidden @ case.weight.t())
    temperature = 0.5 + torch.rand(37)
    settings = HeadSettings(target=case.target, bias=None, inv_temperature=temperature, softcap=15.0, num_valid=650)
    same = HeadCase(
        hidden=logits.clone(), weight=torch.eye(650, dtype=dtype), settings=settings,
        grad_logp=case.grad_logp, grad_entropy=case.grad_entropy,
    )  # fmt: skip
    check_statistics(head(), same, head().tile_stats(logits, settings, entropy=True), eps=1e-6)
    rows = oracle_rows(same)
    dz = head().logits_grad(logits, settings, rows, case.upstream)
    check_gradient(same, dz, eps=1e-6)


def test_logprob_end_to_end():
    case = make_case(torch.float32, 37, 72, 650)
    target = case.target.clamp(min=0)
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        logits = (case.hidden @ case.weight.t()).to(dtype).requires_grad_()
        if dtype == torch.float64:
            logp = torch.log_softmax(logits / 0.7, 1)
            entropy = -(logp.exp() * logp).sum(1)
            logp = logp.gather(1, target[:, None])[:, 0]
        else:
            logp, entropy = mk.logprob(logits, target, temperature=0.7, entropy=True, backend=backend)
        ((logp * case.grad_logp).sum() + (entropy * case.grad_entropy).sum()).backward()
        results.append((logp.detach(), entropy.detach(), logits.grad))
    for name, *values in zip(("logp", "entropy", "logits"), *results, strict=True):
        assert_kernel(name, *values, eps=1e-6)


def test_why_triton_cannot_run():
    hidden = torch.zeros(3, 20)
    assert triton_head_reason(hidden, torch.float32) is None
    assert "multiple of 8" in triton_head_reason(hidden, torch.bfloat16)
    assert "float64" in triton_head_reason(hidden, torch.float64)
    assert (
        triton_head_reason(hidden.to("meta"), torch.float32)
        == "TRITON_INTERPRET=1 takes CPU tensors; these are on meta"
    )
    with pytest.raises(ValueError, match="'triton' cannot run: hidden has 20 columns"):
        mk.linear_logprob(hidden.bfloat16(), hidden.bfloat16(), torch.zeros(3, dtype=int), backend="triton")


def op_case(dtype):
    case = make_case(dtype, 40, 64, 300, extras=True)
    rows = torch.randint(0, 39, (150,), generator=torch.Generator().manual_seed(3))  # the last row: never
    case.hidden[39] = float("nan")
    case.weight[-9:] = case.settings.bias[-9:] = 0.5  # padding: finite, for dX multiplies its zeros by it
    return case, rows, case.target.clamp(min=0)[rows]


def run_op(case, rows, target, **options):
    """linear_logprob with everything on -> outputs and gradients of hidden, weight, bias."""
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.settings.bias)]
    temperature = (1 / case.settings.inv_temperature)[rows]
    out = mk.linear_logprob(
        leaves[0], leaves[1], target, bias=leaves[2], rows=rows, temperature=temperature, softcap=20.0,
        vocab_size=case.settings.num_valid, entropy=True, **options,
    )  # fmt: skip
    (out.logp * case.grad_logp[rows]).sum().add((out.entropy * case.grad_entropy[rows]).sum()).backward()
    return out.logp.detach(), out.entropy.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logprob_end_to_end(dtype):
    case, rows, target = op_case(dtype)
    got = run_op(case, rows, target, backend="triton")
    plain = run_op(case, rows, target, backend="torch")
    s = case.settings
    picked = HeadCase(
        hidden=case.hidden[rows], weight=case.weight,
        settings=HeadSettings(
            target=target, bias=s.bias, inv_temperature=s.inv_temperature[rows], softcap=s.softcap,
            num_valid=s.num_valid,
        ),
        grad_logp=case.grad_logp[rows], grad_entropy=case.grad_entropy[rows],
    )  # fmt: skip
    logp, entropy, dz = answer(picked, torch.float64)
    weight = torch.where(torch.arange(300)[:, None] < s.num_valid, case.weight.double(), 0)
    to_hidden = torch.zeros(40, 64, dtype=torch.float64).index_add(0, rows, dz @ weight)
    want = (logp, entropy, to_hidden, dz.t() @ picked.hidden.double(), dz.sum(0))
    for name, a, b, c in zip(("logp", "entropy", "hidden", "weight", "bias"), got, plain, want, strict=True):
        assert_kernel(name, a, b, c, ratio=2.5, eps=1e-6)


def test_chunks_change_no_bit():
    case, rows, target = op_case(torch.bfloat16)
    whole = run_op(case, rows, target, backend="triton")
    parts = run_op(case, rows, target, backend="triton", chunk_bytes=1)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    again = run_op(case, rows, target, backend="triton", chunk_bytes=1)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_weight_that_no_tensor_map_fits_is_copied_once_a_call(monkeypatch):
    case = make_case(torch.bfloat16, 150, 64, 300)
    target = case.target.clamp(min=0)
    shifted = torch.empty(300 * 64 + 1, dtype=torch.bfloat16)[1:].view(300, 64).copy_(case.weight)
    clone, copies = torch.Tensor.clone, []

    def counted(x, **options):
        copies.append(tuple(x.shape))
        return clone(x, **options)

    monkeypatch.setattr(torch.Tensor, "clone", counted)
    results = []
    for weight, expected in ((case.weight, 0), (shifted, 1)):
        hidden, weight = case.hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        copies.clear()
        out = mk.linear_logprob(hidden, weight, target, backend="triton", chunk_bytes=1)
        assert copies.count((300, 64)) == expected
        grads = torch.autograd.grad(out.logp.sum(), (hidden, weight))
        assert copies.count((300, 64)) == 2 * expected
        results.append((out.logp.detach(), *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compile_fullgraph():
    case, rows, target = op_case(torch.float32)

    def step(hidden, weight):
        out = mk.linear_logprob(
            hidden * 1.0, weight, target, rows=rows, entropy=True, backend="triton", vocab_size=291
        )
        return out.logp.sum() + out.entropy.sum()

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
        loss = fn(hidden, weight)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_linear_policy_loss_end_to_end():
    case = make_case(torch.bfloat16, 40, 64, 300)
    target = case.target.clamp(min=0)
    old = torch.full((40,), -3.0)
    seq = torch.arange(40) // 8
    results = []
    for backend in ("triton", "torch"):
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
        out = mk.linear_policy_loss(
            hidden, weight, target, old, torch.randn(5, generator=torch.Generator().manual_seed(0)), seq, denom=40.0,
            backend=backend,
        )  # fmt: skip
        out.loss.backward()
        results.append((out.loss.detach(), out.logp, hidden.grad, weight.grad))
    for triton_value, torch_value in zip(*results, strict=True):
        torch.testing.assert_close(triton_value, torch_value, rtol=2e-2, atol=2e-3)


# ---- The matrix of the C++ kernels' tests, end to end.
@pytest.mark.parametrize(
    ("vocab", "depth", "lengths", "dtype"),
    [
        (128, 64, [9, 20], torch.bfloat16),
        (50257, 32, [3, 2], torch.bfloat16),
        (49152, 40, [3, 2], torch.float32),
        (151936, 16, [2, 1], torch.bfloat16),
        (300, 32, [1], torch.float32),
    ],
    ids=str,
)
def test_vocabularies(vocab, depth, lengths, dtype):
    leaves, case = policy.head_case(vocab, depth, lengths, dtype)
    policy.assert_loss(leaves, case, mk.LossSpec(entropy_coef=0.1), "triton")


@pytest.mark.parametrize("kind", ["gspo", "cispo"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_policy_losses(kind, dtype):
    leaves, case = policy.head_case(300, 32, [9, 14, 1], dtype)
    policy.assert_loss(leaves, case, mk.LossSpec(kind=kind), "triton")


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_large_logits_and_a_common_offset(dtype):
    leaves, case = policy.head_case(300, 32, [9, 14], dtype, scale=12.0, offset=1000.0)
    policy.assert_loss(leaves, case, mk.LossSpec(kind="cispo"), "triton")


def test_confident_tokens_are_exact():
    # Integer logits, the target ahead by 9 to 60: |logp| from 1e-2 to 1e-24.
    lead = torch.arange(9, 61).float()
    hidden = torch.zeros(len(lead), 4)
    hidden[:, 0], hidden[:, 1] = lead, 1.0
    weight = torch.zeros(64, 4)
    weight[5, 0] = 1.0
    weight[:, 1] = 1000.0 - torch.arange(64) % 3 * (torch.arange(64) != 5)
    out = mk.linear_logprob(hidden, weight, torch.full((len(lead),), 5), backend="triton")
    z = hidden.double() @ weight.double().T
    others = (z - z[:, 5:6]).exp()
    others[:, 5] = 0
    exact = -others.sum(dim=1).log1p()
    assert float(exact.abs().max()) < 1e-2
    assert float(((out.logp.double() - exact) / exact).abs().max()) <= 1e-6


def test_no_rows_no_gradient_and_layouts():
    hidden, weight = torch.randn(7, 32, requires_grad=True), torch.randn(300, 32, requires_grad=True)
    none = torch.empty(0, dtype=torch.int32)
    out = mk.linear_logprob(hidden, weight, none, rows=none, entropy=True, backend="triton")
    assert out.logp.shape == out.entropy.shape == (0,)
    assert not any(g.any() for g in torch.autograd.grad(out.logp.sum() + out.entropy.sum(), [hidden, weight]))
    target = torch.arange(7)
    out = mk.linear_logprob(hidden, weight, target, backend="triton")
    assert not any(g.any() for g in torch.autograd.grad(out.logp, [hidden, weight], torch.zeros(7)))
    strided = torch.stack([hidden.detach(), hidden.detach()], dim=2)[:, :, 0]
    across = weight.detach().t().contiguous().t()
    assert not strided.is_contiguous() and not across.is_contiguous()
    assert torch.equal(mk.linear_logprob(strided, across, target.int(), backend="triton").logp, out.logp)
