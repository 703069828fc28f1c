"""Driver of the policy loss on the LM head: chunk by chunk, logits become their gradient while they are at hand.

Shared by the eager and the compiled form of :func:`m2kernels.linear_policy_loss`.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from m2kernels._head import Chunk, Head, HeadProblem
from m2kernels._head_grads import HeadGrads, WeightTarget
from m2kernels._live_rows import LiveRows
from m2kernels._policy_grads import PolicyTerms
from m2kernels.linear_logprob import head_backward, row_stats


class LinearPolicyLoss(NamedTuple):
    """What :func:`m2kernels.linear_policy_loss` returns.

    Attributes:
        loss: 0-d float32, differentiable once in hidden, weight and bias.
        logp: f32[M], without a gradient.
        entropy: f32[M], without a gradient.
        metrics: as of :func:`m2kernels.policy_loss`.
    """

    loss: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor
    metrics: dict[str, torch.Tensor]


def sequence_chunks(seq: torch.Tensor, most: int) -> list[slice] | None:
    """Chunks of whole sequences of at most `most` rows, or None when one is longer. Reads seq on the host."""
    lengths = torch.unique_consecutive(seq, return_counts=True)[1].tolist()
    if max(lengths, default=0) > most:
        return None
    chunks: list[slice] = []
    start = end = 0
    for length in lengths:
        if end + length - start > most:
            chunks.append(slice(start, end))
            start = end
        end += length
    return [*chunks, slice(start, end)] if end > start else chunks


def loss_and_grads(
    problem: HeadProblem, terms: PolicyTerms, needs: tuple[bool, bool, bool], target: WeightTarget
) -> tuple[LinearPolicyLoss, HeadGrads | None]:
    """Loss, and the sums that finish with its gradients.

    Args:
        problem: the head.
        terms: the loss.
        needs: gradients wanted, of (hidden, weight, bias).
        target: what becomes of the weight's.

    Returns:
        The result without a graph, and the sums, whose factor is the upstream gradient; None when none are wanted.
    """
    head = Head(problem)
    if not any(needs):
        stats = row_stats(head, entropy=True)
        assert stats.entropy is not None
        return _finish(terms, stats.logp, stats.entropy), None
    cut = terms.by_token()
    width = head.widest()
    scale: float | torch.Tensor = 1.0
    if problem.dtype == torch.float16:
        # A denominator in the millions would leave nothing of a gradient in float16: it divides the float32 sums.
        cut, scale = cut.hardly_divided()
        target = replace(target, wide=True)
    grads = HeadGrads(head, needs, target, scale)
    parts = grads.chunks(head.num_rows, width)
    if cut.couples_tokens() and len(parts) > 1:
        aligned = sequence_chunks(terms.seq, head.step(width))
        if aligned is None:
            logp, entropy = _two_passes(head, cut, grads)
            return _finish(terms, logp, entropy), grads
        parts = aligned
        grads.cut(len(parts))
    logp = head.hidden.new_empty(head.num_rows, dtype=torch.float32)
    entropy = torch.empty_like(logp)
    for part in parts:
        logp[part], entropy[part] = _one_chunk(head, head.gather(part), cut.take(part), part.start, grads)
    return _finish(terms, logp, entropy), grads


def _one_chunk(
    head: Head, chunk: Chunk, terms: PolicyTerms, start: int, grads: HeadGrads
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logp, entropy) of a chunk, which begins at row `start`; its gradients are added to `grads`."""
    rows, kept = head.statistics(chunk, entropy=True, keep=True, lend=grads.lend(chunk.hidden.shape[0]))
    assert rows.entropy is not None
    upstream = terms.gradients(rows.logp, rows.entropy)
    live = LiveRows(upstream)
    if live.known_empty():
        return rows.logp, rows.entropy
    dz = head.kernels.grad_rows(kept, chunk.settings, rows, upstream, live)
    part, at = live.part(), chunk.positions
    if part is None:
        grads.add(dz, chunk.hidden, at)
    elif part.numel():
        grads.add(dz, chunk.hidden.index_select(0, part), part + start if isinstance(at, slice) else at[part])
    return rows.logp, rows.entropy


def _two_passes(head: Head, terms: PolicyTerms, grads: HeadGrads) -> tuple[torch.Tensor, torch.Tensor]:
    """(logp, entropy): all log-probs first, then the gradients from logits computed again: four GEMMs."""
    stats = row_stats(head, entropy=True)
    assert stats.entropy is not None
    head_backward(head, stats, terms.gradients(stats.logp, stats.entropy), grads)
    return stats.logp, stats.entropy


def _finish(terms: PolicyTerms, logp: torch.Tensor, entropy: torch.Tensor) -> LinearPolicyLoss:
    loss, metrics = terms.loss(logp, entropy)
    return LinearPolicyLoss(loss, logp, entropy, metrics)
