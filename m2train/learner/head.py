"""LM head at selected rows: log-prob of a target and entropy, without ever holding a [tokens, vocabulary] tensor.

Rows are done in chunks; the forward keeps one fp32 number per row (the log-sum-exp), the backward computes the logits
of a chunk again. The vocabulary may be sharded over a tensor-parallel group: three small all-reduces a chunk.

    z = hidden[rows] @ weight.T / temperature,  logp = z[target] - lse(z),  entropy = lse(z) - sum(p z)
    d logp / dz = onehot - p,                   d entropy / dz = -p (z - lse + entropy)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F

# fp32 elements of one chunk of logits: 128 MiB, large enough for full GEMM speed, small beside the model.
_CHUNK_ELEMENTS = 1 << 25
_BLOCK_ELEMENTS = 1 << 18  # 1 MiB of fp32: the L2 cache of a core
_MASKED = -1e30  # finite: exp gives 0 and 0 * _MASKED is 0, where -inf would give NaN


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    rows: torch.Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of `target[i]` after row `rows[i]`, and the entropy there.

    Args:
        hidden: [N, D], the same on all ranks of `tp_group`. Its gradient is this rank's part; summing the parts is
            left to the caller, whose sequence-parallel gather or copy does it anyway.
        weight: [V / tp, D], this rank's shard.
        target: int64 [M], global token ids.
        rows: int64 [M], rows of `hidden`.
        temperature: logits are divided by it.
        tp_group: None or a group of one: the whole vocabulary is here.
        vocab_start: global id of this shard's first row.
        vocab_size: ids from here on are padding and get no mass.

    Returns:
        f32[M] twice, differentiable in hidden and weight.
    """
    out: tuple[torch.Tensor, torch.Tensor] = _LinearLogprob.apply(
        hidden, weight, target, rows, temperature, tp_group, vocab_start, vocab_size
    )
    return out


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        rows: torch.Tensor,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
        vocab_start: int,
        vocab_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = tp_group if tp_group is not None and dist.get_world_size(tp_group) > 1 else None
        shard = _Shard(weight, temperature, vocab_start, vocab_size)
        size = rows.numel()
        logp, entropy, lse = (torch.empty(size, dtype=torch.float32, device=hidden.device) for _ in range(3))
        for part in _chunks(size, weight.shape[0]):
            top, sums = shard.sums(hidden.index_select(0, rows[part]), target[part])
            if group is not None:
                whole = top.clone()
                dist.all_reduce(whole, dist.ReduceOp.MAX, group=group)
                _shift(sums, top - whole)
                dist.all_reduce(sums, group=group)
                top = whole
            total, weighted, picked = sums
            log_sum = total.log()
            logp[part] = picked - top - log_sum
            entropy[part] = log_sum - weighted / total
            lse[part] = top + log_sum
        ctx.save_for_backward(hidden, weight, target, rows, lse, entropy)
        ctx.shard = (temperature, vocab_start, vocab_size)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, g_logp: torch.Tensor | None, g_entropy: torch.Tensor | None) -> tuple[Any, ...]:
        hidden, weight, target, rows, lse, entropy = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden)
        d_weight: torch.Tensor | None = None
        shard = _Shard(weight, *ctx.shard)
        live = _live(g_logp, g_entropy, rows.numel())  # zero-gradient rows (clipped, zero advantage) cost nothing
        for part in _chunks(live.numel(), weight.shape[0]):
            pick = live[part]
            row = rows[pick]
            h = hidden.index_select(0, row)
            g = [None if x is None else x[pick] for x in (g_logp, g_entropy)]
            dz = shard.gradient(h, target[pick], lse[pick], entropy[pick], g[0], g[1])
            d_hidden.index_add_(0, row, dz @ weight)
            if d_weight is None:
                d_weight = dz.t() @ h
            else:  # many chunks: bf16 would lose the small ones
                d_weight = d_weight.float().add_(dz.t() @ h)
        d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None


def _shift(sums: torch.Tensor, by: torch.Tensor) -> None:
    """Rebase sums of exp(z - top) and exp(z - top) (z - top), in place, to a top that is `by` (<= 0) away."""
    total, weighted, _ = sums
    weighted.addcmul_(total, by)
    sums[:2].mul_(by.exp())


class _Shard:
    """Logits of this rank's part of the vocabulary.

    On the CPU the GEMM does a whole chunk and the element-wise maths a few rows at a time, whose fp32 logits stay in
    the cache; on CUDA the chunk is one block.
    """

    def __init__(self, weight: torch.Tensor, temperature: float, vocab_start: int, vocab_size: int) -> None:
        self.weight = weight
        self.start = vocab_start
        self.scale = 1.0 / temperature
        self.real = min(max(vocab_size - vocab_start, 0), weight.shape[0])

    def sums(self, h: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """top[n] = max z, and [3, n]: sum of e = exp(z - top), sum of e (z - top), z[target] (0 if not here)."""
        top = torch.empty(h.shape[0], dtype=torch.float32, device=h.device)
        sums = torch.empty(3, h.shape[0], dtype=torch.float32, device=h.device)
        local, mine = self._local(target)
        for block, z in self._blocks(h):
            top[block] = z.amax(dim=1)
            sums[2, block] = z.gather(1, local[block, None])[:, 0].mul_(mine[block])
            z.sub_(top[block, None])
            e = z.exp()
            sums[0, block] = e.sum(dim=1)
            sums[1, block] = torch.linalg.vecdot(e, z)
        return top, sums

    def gradient(
        self,
        h: torch.Tensor,
        target: torch.Tensor,
        lse: torch.Tensor,
        entropy: torch.Tensor,
        g_logp: torch.Tensor | None,
        g_entropy: torch.Tensor | None,
    ) -> torch.Tensor:
        """d loss / d (logits before the temperature), in the weight's dtype."""
        local, mine = self._local(target)
        g = torch.zeros_like(entropy) if g_logp is None else g_logp
        out = torch.empty(h.shape[0], self.weight.shape[0], dtype=self.weight.dtype, device=h.device)
        for block, z in self._blocks(h):
            z.sub_(lse[block, None])
            if g_entropy is None:
                dz = z.exp_().mul_(-g[block, None])
            else:
                factor = (z + entropy[block, None]).mul_(-g_entropy[block, None]).sub_(g[block, None])
                dz = z.exp_().mul_(factor)
            dz.scatter_add_(1, local[block, None], (g * mine)[block, None])
            out[block] = dz.mul_(self.scale) if self.scale != 1.0 else dz
        return out

    def _local(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        local = target - self.start
        mine = (local >= 0) & (local < self.real)
        return local.clamp(0, max(self.real - 1, 0)), mine

    def _blocks(self, h: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, their fp32 z, ours to overwrite)."""
        if h.is_cuda and h.dtype != torch.float32:
            logits = torch.mm(h, self.weight.t(), out_dtype=torch.float32)
        else:  # no CPU GEMM has fp32 output for bf16 input: the logits are rounded once
            logits = F.linear(h, self.weight)
        step = logits.shape[0] if h.is_cuda else max(1, _BLOCK_ELEMENTS // logits.shape[1])
        for start in range(0, logits.shape[0], step):
            block = slice(start, start + step)
            z = logits[block].float()
            if self.scale != 1.0:
                z.mul_(self.scale)
            if self.real < z.shape[1]:
                z[:, self.real :] = _MASKED
            yield block, z


def _chunks(size: int, vocab: int) -> list[slice]:
    step = max(64, _CHUNK_ELEMENTS // vocab)
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def _live(g_logp: torch.Tensor | None, g_entropy: torch.Tensor | None, size: int) -> torch.Tensor:
    given = [g for g in (g_logp, g_entropy) if g is not None]
    if not given:
        return torch.empty(0, dtype=torch.int64)
    live = torch.stack([g != 0 for g in given]).any(dim=0)  # NaN != 0: a broken gradient is not hidden
    return live.nonzero()[:, 0] if size else torch.empty(0, dtype=torch.int64, device=live.device)
