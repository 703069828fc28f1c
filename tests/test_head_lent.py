"""Logits of the LM head that lie in the memory of their weight gradient until it is formed (backend cpu)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_testing import assert_kernel
from test_linear_policy_loss import head_case, oracle, plain_torch, run, two_ops

import m2kernels as mk
from m2kernels import _head_cpu, _head_grads, _head_policy
from m2kernels.linear_logprob import unsupported_reason

pytestmark = pytest.mark.skipif(unsupported_reason("cpu") is not None, reason=str(unsupported_reason("cpu")))

VOCAB = 4000
SMALL = VOCAB * 4 * 48  # bytes: 48 rows of logits; the rest of a row is small beside them
SPEC = mk.LossSpec(entropy_coef=0.1)


@pytest.fixture
def lent(monkeypatch):
    """Numbers of rows whose logits were lent memory, call after call."""
    seen = []
    multiply = _head_cpu.CpuHead._multiply

    def spy(self, hidden, *args, lend, **kwargs):
        out = multiply(self, hidden, *args, lend=lend, **kwargs)
        if lend is not None:
            assert out[0].data_ptr() == lend.data_ptr()
            seen.append(hidden.shape[0])
        return out

    monkeypatch.setattr(_head_cpu.CpuHead, "_multiply", spy)
    return seen


def unlent(monkeypatch):
    monkeypatch.setattr(_head_cpu.CpuHead, "lent_rows", lambda *a: 0)


def case_of(dim, rows, dtype=torch.float32, weight_dtype=None):
    leaves, case = head_case(VOCAB, dim, [rows // 4, rows - rows // 4 - 3, 3], dtype, hidden_rows=50)
    if weight_dtype is not None:
        leaves[1] = leaves[1].detach().to(weight_dtype).requires_grad_()
    return leaves, case


@pytest.mark.parametrize(
    ("dim", "dtype", "weight_dtype"),
    [
        (64, torch.float32, None),
        (72, torch.float32, None),  # not whole vectors: torch's GEMM, slab by slab
        (128, torch.bfloat16, None),
        (130, torch.bfloat16, None),
        (256, torch.float32, None),  # most of the gradient lies behind the logits
        (512, torch.bfloat16, None),
        (96, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["loss", "two ops"])
def test_the_same_bits_as_in_memory_of_their_own(dim, dtype, weight_dtype, op, lent, monkeypatch):
    monkeypatch.setattr(_head_cpu, "_SLAB_BYTES", 7 * 64 * 4)  # many slabs, the last one short
    leaves, case = case_of(dim, 64, dtype, weight_dtype)
    fn = mk.linear_policy_loss if op == "loss" else two_ops
    loss, grads, _ = run(leaves, case, SPEC, fn, backend="cpu", upstream=2.0)
    assert lent == [64]
    unlent(monkeypatch)
    want_loss, want, _ = run(leaves, case, SPEC, fn, backend="cpu", upstream=2.0)
    assert lent == [64] and torch.equal(loss, want_loss)
    for mine, other in zip(grads, want, strict=True):
        if dim == 72 and mine.shape == leaves[1].shape:  # a slab is another shape to the BLAS
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
        else:
            assert mine.dtype == other.dtype and torch.equal(mine, other)


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 40), st.integers(1, 300))
def test_no_slab_writes_what_is_still_to_be_read(vocab, narrow, more, step):
    wide = narrow + more
    unread = vocab
    for slab, aside in _head_cpu._slabs(vocab, narrow, wide, step):
        assert slab.stop == unread and 0 <= slab.start < slab.stop
        unread = slab.start
        written = slab.start * wide
        assert written >= unread * narrow, "an entry that is still to be read is gone"
        assert aside or written >= slab.stop * narrow, "the slab writes its own factor"
        assert not aside or slab.stop - slab.start <= step
    assert unread == 0


def test_two_threads(lent, monkeypatch):
    leaves, case = case_of(128, 90)
    threads = torch.get_num_threads()
    _, want, _ = run(leaves, case, SPEC, backend="cpu")
    torch.set_num_threads(2)
    try:
        _, grads, _ = run(leaves, case, SPEC, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert lent == [90, 90]
    for mine, other in zip(grads, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_than_there_is_memory_to_lend(dtype, lent):
    # The weight's gradient is float32 then: 64 rows of logits lie in it, the others in chunks of 48.
    leaves, case = case_of(64, 200, dtype)
    want_loss, want, _ = oracle(leaves, case, SPEC)
    plain_loss, plain, _ = run(leaves, case, SPEC, plain_torch)
    loss, grads, _ = run(leaves, case, SPEC, backend="cpu", chunk_bytes=SMALL)
    assert lent == [64]
    assert_kernel("loss", loss, plain_loss, want_loss, eps=1e-6)
    for name, mine, torchs, exact in zip(("hidden", "weight"), grads, plain, want, strict=True):
        assert_kernel(name, mine, torchs, exact, eps=1e-6)


def test_chunks():
    leaves, case = case_of(64, 200)
    seen = []
    original = _head_grads.HeadGrads.chunks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_head_grads.HeadGrads, "chunks", lambda *a: seen.append(original(*a)) or seen[-1])
        run(leaves, case, SPEC, backend="cpu", chunk_bytes=SMALL)
        frozen = {"denom": 7.0, "spec": SPEC, "backend": "cpu", "chunk_bytes": SMALL, **case}
        mk.linear_policy_loss(leaves[0], leaves[1].detach(), **frozen)
        run(leaves, case, SPEC, backend="cpu")
    assert seen == [
        [slice(0, 64), slice(64, 112), slice(112, 160), slice(160, 200)],
        [slice(0, 48), slice(48, 96), slice(96, 144), slice(144, 192), slice(192, 200)],
        [slice(0, 200)],
    ]


def test_rows_without_a_gradient(lent, monkeypatch):
    leaves, case = case_of(64, 60)
    case["advantage"][0] = 0.0  # a quarter of the rows is squeezed out of the logits that are kept
    spec = mk.LossSpec()
    _, grads, _ = run(leaves, case, spec, backend="cpu")
    case["advantage"] = torch.zeros_like(case["advantage"])
    _, none, _ = run(leaves, case, spec, backend="cpu")
    assert lent == [60, 60] and not any(g.any() for g in none)
    unlent(monkeypatch)
    case = case_of(64, 60)[1]
    case["advantage"][0] = 0.0
    for mine, other in zip(grads, run(leaves, case, spec, backend="cpu")[1], strict=True):
        assert torch.equal(mine, other)


def test_memory_that_a_chunk_without_a_gradient_did_not_need(lent, monkeypatch):
    leaves, case = case_of(64, 200)
    case["advantage"] = torch.ones(200)
    case["advantage"][:100] = 0.0
    case["per_token"] = True
    _, grads, _ = run(leaves, case, mk.LossSpec(), backend="cpu", chunk_bytes=SMALL)
    assert lent == [64, 48]  # rows 0 .. 63 have no gradient; of 64 .. 111 some have
    unlent(monkeypatch)
    _, want, _ = run(leaves, case, mk.LossSpec(), backend="cpu", chunk_bytes=SMALL)
    for mine, other in zip(grads, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_sequences_that_fit_only_there_are_done_once(lent, monkeypatch):
    monkeypatch.setattr(_head_policy, "_two_passes", lambda *a: pytest.fail("done twice"))
    leaves, case = case_of(96, 90)  # a sequence of 65: over the 48 rows of the budget
    spec = mk.LossSpec(kind="gspo")
    loss, grads, _ = run(leaves, case, spec, backend="cpu", chunk_bytes=SMALL)
    assert lent == [90]
    want_loss, want, _ = run(leaves, case, spec, backend="cpu")
    assert torch.equal(loss, want_loss)
    for mine, other in zip(grads, want, strict=True):
        assert torch.equal(mine, other)


def test_not_with_main_grad(lent):
    leaves, case = case_of(64, 60)
    main_grad = torch.zeros(VOCAB, 64)
    out = mk.linear_policy_loss(*leaves, denom=7.0, spec=SPEC, main_grad=main_grad, grad_scale=1.0, **case)
    out.loss.backward()
    assert lent == []
    _, (_, want), _ = run(leaves, case, SPEC, backend="cpu")
    torch.testing.assert_close(main_grad, want, rtol=1e-5, atol=1e-7)
