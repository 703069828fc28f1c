"""The head against autograd in float64 on full logits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from m2train.learner import head
from m2train.learner.head import linear_logprob

N, D, V, M = 40, 16, 131, 57


def case(dtype: torch.dtype, padded: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, D, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(padded, D, generator=g).to(dtype).requires_grad_()
    rows = torch.randint(0, N, (M,), generator=g)  # rows repeat, and some are left out
    target = torch.randint(0, V, (M,), generator=g)
    return hidden, weight, rows, target, torch.randn(2, M, generator=g)


def ours(
    hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, target: torch.Tensor, t: float
) -> tuple[torch.Tensor, ...]:
    return linear_logprob(
        hidden, weight, target, rows=rows, temperature=t, tp_group=None, vocab_start=0, vocab_size=V
    )


def truth(
    hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, target: torch.Tensor, t: float
) -> tuple[torch.Tensor, ...]:
    z = (hidden.double()[rows] @ weight.double()[:V].T) / t
    logp = z.log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1 << 25, 64 * 256])
@pytest.mark.parametrize(("t", "with_entropy"), [(1.0, False), (0.7, True)])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int, t: float, with_entropy: bool) -> None:
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(head, "_BLOCK_ELEMENTS", 1000)  # several blocks of 3 rows, the last one shorter
    hidden, weight, rows, target, g = case(torch.float32, 256)
    got, want = ours(hidden, weight, rows, target, t), truth(hidden, weight, rows, target, t)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-5)
    scale = g if with_entropy else g * torch.tensor([[1.0], [0.0]])
    upstream = (scale[0], scale[1]) if with_entropy else (scale[0],)
    mine = torch.autograd.grad(got[: len(upstream)], [hidden, weight], upstream)
    theirs = torch.autograd.grad(want[: len(upstream)], [hidden, weight], [u.double() for u in upstream])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)
    assert not mine[1][V:].any(), "padding rows have no gradient"


def test_common_offset_and_large_logits() -> None:
    """An offset of 1e3 on all logits, spread over 40: no overflow, no loss of mass."""
    hidden, weight, rows, target, _ = case(torch.float32, 256)
    with torch.no_grad():
        hidden[:, 0], weight[:, 0] = 1.0, 1000.0
        weight[:, 1:] *= 5.0
    got, want = ours(hidden, weight, rows, target, 1.0), truth(hidden, weight, rows, target, 1.0)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-3)


def test_rows_without_gradient_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, rows, target, g = case(torch.float32, V)
    logp, _ = ours(hidden, weight, rows, target, 1.0)
    upstream = g[0] * (torch.arange(M) % 3 == 0)
    seen: list[int] = []
    gradient = head._Shard.gradient
    monkeypatch.setattr(head._Shard, "gradient", lambda self, h, *a: seen.append(h.shape[0]) or gradient(self, h, *a))
    got = torch.autograd.grad(logp, [hidden, weight], upstream)
    want = torch.autograd.grad(truth(hidden, weight, rows, target, 1.0)[0], [hidden, weight], upstream.double())
    assert sum(seen) == int((upstream != 0).sum())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def test_bf16_error_is_that_of_torch() -> None:
    hidden, weight, rows, target, g = case(torch.bfloat16, 256)
    got, want = ours(hidden, weight, rows, target, 1.0)[0], truth(hidden, weight, rows, target, 1.0)[0]
    plain = (hidden[rows] @ weight[:V].T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max() + 1e-6
    mine = torch.autograd.grad(got, [hidden, weight], g[0])
    theirs = torch.autograd.grad(plain, [hidden, weight], g[0])
    exact = torch.autograd.grad(want, [hidden, weight], g[0].double())
    for a, b, c in zip(mine, theirs, exact, strict=True):
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_no_rows() -> None:
    hidden, weight, *_ = case(torch.float32, V)
    none = torch.empty(0, dtype=torch.int64)
    logp, entropy = ours(hidden, weight, none, none, 1.0)
    assert logp.shape == entropy.shape == (0,)
    for grad in torch.autograd.grad(logp.sum() * 0.0, [hidden, weight]):
        assert not grad.any()


def test_broken_gradient_is_not_hidden() -> None:
    hidden, weight, rows, target, _ = case(torch.float32, V)
    logp, _ = ours(hidden, weight, rows, target, 1.0)
    grad = torch.autograd.grad(logp, hidden, torch.full((M,), float("nan")))[0]
    assert grad[rows].isnan().all()
