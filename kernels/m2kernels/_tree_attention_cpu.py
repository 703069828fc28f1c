"""Tree attention on the CPU as dense pieces without any mask tensor: causal squares and full rectangles.

Follow each segment to its largest child, which lies right behind it: that cuts the forest into chains, contiguous
runs of rows. The attention is then exactly

    one causal square a chain, over its own keys, and
    one full rectangle a branching: the rows below the smaller children see all keys of the chain down to there,

because those rows are contiguous too. A row is in one square and in at most log2(rows) rectangles, whose results are
merged by their log-sum-exp; the backward of each piece uses the merged one, so pieces add up without corrections.
Nothing is gathered but short chains, stacked by length; no key is copied or visited twice.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from m2kernels.plan_tree import Segments, TreePlan

# A chain joins a stack if it is at least this part of the longest one in it: bounds the padding.
_MIN_FILL = 0.8
# Rectangles of fewer keys have a backward of their own: see _few_keys_backward.
_FEW_KEYS = 4
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, slots=True)
class Stack:
    """Chains of similar length as one batch, padded behind; under a causal mask no real row sees the padding."""

    num: int
    length: int
    rows: torch.Tensor
    """int64 [num * length]: the packed row at each place; padding repeats the chain's first row"""
    real: torch.Tensor
    """int64 [rows of the chains]: their packed rows"""
    place: torch.Tensor
    """int64 [rows of the chains]: where each of `real` lies in the stack"""
    padded: bool


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a plan's attention is made of."""

    single: list[tuple[int, int]]
    """Chains worked on in place: first row, past the last."""
    stacks: list[Stack]
    rectangles: list[tuple[int, int, int, int]]
    """First query row, past the last, first key row, past the last."""


def pieces_of(plan: TreePlan) -> Pieces:
    """The plan's pieces, worked out once."""
    found = plan.derived.get("cpu_pieces")
    if found is None:
        found = plan.derived["cpu_pieces"] = _cut(plan.segments)
    assert isinstance(found, Pieces)
    return found


def _cut(seg: Segments) -> Pieces:
    num = len(seg.start)
    heavy = np.zeros(num, dtype=bool)  # goes on right behind its parent
    heavy[1:] = seg.parent[1:] == np.arange(num - 1)
    heads = np.flatnonzero(~heavy)
    chain = np.cumsum(~heavy) - 1
    first = seg.start[heads]
    last = np.append(seg.end[heads[1:] - 1], seg.end[-1:]) if num else first
    # Below the largest child (the next segment) of each segment lie the smaller ones, to the end of its subtree.
    above = np.flatnonzero(heavy) - 1
    below = seg.subtree_end[above + 1]
    branches = above[below < seg.subtree_end[above]]
    rectangles = np.stack(
        [
            seg.subtree_end[branches + 1],
            seg.subtree_end[branches],
            first[chain[branches]],
            seg.end[branches],
        ],
        axis=1,
    )
    single, stacks = _stack(first.astype(np.int64), last.astype(np.int64))
    return Pieces(single, stacks, [tuple(r) for r in rectangles.tolist()])


def _stack(first: np.ndarray, last: np.ndarray) -> tuple[list[tuple[int, int]], list[Stack]]:
    """Chains of a length of their own stay in place; the others are stacked, longest first."""
    single, stacks = [], []
    lengths = last - first
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        longest = int(lengths[order[0]])
        take = int((lengths[order] >= _MIN_FILL * longest).sum())
        members, order = order[:take], order[take:]
        if take == 1:
            single.append((int(first[members[0]]), int(last[members[0]])))
            continue
        step = np.arange(longest)
        inside = step < lengths[members][:, None]
        rows = first[members][:, None] + np.where(inside, step, 0)
        place = np.flatnonzero(inside.ravel())
        stacks.append(
            Stack(
                num=take,
                length=longest,
                rows=torch.from_numpy(rows.ravel()),
                real=torch.from_numpy(rows[inside]),
                place=torch.from_numpy(place),
                padded=not inside.all(),
            )
        )
    return single, stacks


def _batched(x: torch.Tensor, stack: Stack) -> torch.Tensor:
    """Rows of `x [rows, heads, dim]` as `[num, heads, length, dim]`."""
    return x.index_select(0, stack.rows).view(stack.num, stack.length, *x.shape[1:]).transpose(1, 2)


def _unbatched(y: torch.Tensor, stack: Stack) -> torch.Tensor:
    """The real rows of `[num, heads, length, ...]`, as `[rows of the chains, heads, ...]`."""
    flat = y.transpose(1, 2).reshape(stack.num * stack.length, y.shape[1], *y.shape[3:])
    return flat.index_select(0, stack.place) if stack.padded else flat


def _one(x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """A view of rows of `[rows, heads, ...]` as a batch of one, `[1, heads, rows, ...]`."""
    return x[first:last].transpose(0, 1)[None]


def _work_type(dtype: torch.dtype) -> torch.dtype:
    # fp32 also for bf16: torch 2.13's CPU flash attention took 176 ms in bf16 and 58 ms in fp32 for 32 x 150 tokens,
    # 9/3 heads of 64, forward and backward on 2 Zen cores with avx512_bf16.
    return torch.float64 if dtype == torch.float64 else torch.float32


class CpuTreeAttention(torch.autograd.Function):
    """`(q, k, v, plan, scale) -> (o, lse)`; lse has no gradient. Rows past the plan's are padding."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TreePlan, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pieces, work = pieces_of(plan), _work_type(q.dtype)
        wide = [x.to(work) for x in (q, k, v)]
        out = torch.zeros(q.shape, dtype=work, device=q.device)
        lse = torch.zeros(q.shape[:2], dtype=work, device=q.device)
        for first, last in pieces.single:
            o, part = _FORWARD(*(_one(x, first, last) for x in wide), 0.0, True, scale=scale)
            out[first:last], lse[first:last] = o[0].transpose(0, 1), part[0].t()
        for stack in pieces.stacks:
            o, part = _FORWARD(*(_batched(x, stack) for x in wide), 0.0, True, scale=scale)
            out.index_copy_(0, stack.real, _unbatched(o, stack))
            lse.index_copy_(0, stack.real, _unbatched(part, stack))
        for q0, q1, k0, k1 in pieces.rectangles:
            keys = (_one(x, k0, k1) for x in wide[1:])
            o, part = _FORWARD(_one(wide[0], q0, q1), *keys, 0.0, False, scale=scale)
            _merge(out[q0:q1], lse[q0:q1], o[0].transpose(0, 1), part[0].t())
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.scale = pieces, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor, _: Any) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        pieces, scale, work = ctx.pieces, ctx.scale, lse.dtype
        wide = [x.to(work) for x in (q, k, v)]
        d_out, out = d_out.to(work), out.to(work)
        d = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in wide]
        for first, last in pieces.single:
            rows = [_one(x, first, last) for x in (d_out, *wide, out, lse)]
            for total, part in zip(d, _BACKWARD(*rows, 0.0, True, scale=scale), strict=True):
                total[first:last] = part[0].transpose(0, 1)
        for stack in pieces.stacks:
            rows = [_batched(x, stack) for x in (d_out, *wide, out)]
            rest = _stacked_lse(lse, rows[0], stack)
            for total, part in zip(d, _BACKWARD(*rows, rest, 0.0, True, scale=scale), strict=True):
                total.index_copy_(0, stack.real, _unbatched(part, stack))
        for q0, q1, k0, k1 in pieces.rectangles:
            above, (query, *keys) = _one(d_out, q0, q1), wide
            args = (_one(query, q0, q1), *(_one(x, k0, k1) for x in keys), _one(out, q0, q1), _one(lse, q0, q1))
            if k1 - k0 < _FEW_KEYS:
                d_q, d_k, d_v = _few_keys_backward(above, args, scale)
            else:
                d_q, d_k, d_v = _BACKWARD(above, *args, 0.0, False, scale=scale)
            d[0][q0:q1] += d_q[0].transpose(0, 1)
            d[1][k0:k1] += d_k[0].transpose(0, 1)
            d[2][k0:k1] += d_v[0].transpose(0, 1)
        return d[0].to(q.dtype), d[1].to(k.dtype), d[2].to(v.dtype), None, None


def _few_keys_backward(
    d_out: torch.Tensor, args: tuple[torch.Tensor, ...], scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `_BACKWARD` computes, as plain products (FlashAttention-2, section 3.1.2, without tiles).

    For under 4 keys MKL's GEMM adds the rows one after the other: 5.8 times the error of the same keys among 4 or 8.
    """
    q, k, v, out, lse = args
    heads, num = k.shape[1], q.shape[2]
    d_out, q, out = (x[0].reshape(heads, -1, x.shape[3]) for x in (d_out, q, out))
    k, v = k[0], v[0]
    probs = (scale * (q @ k.mT) - lse.reshape(heads, -1, 1)).exp_()
    d_scores = d_out @ v.mT
    d_scores.sub_((d_out * out).sum(dim=2, keepdim=True)).mul_(probs).mul_(scale)
    d_q = (d_scores @ k).view(1, -1, num, k.shape[2])
    return d_q, _sum_over_rows(d_scores, q)[None], _sum_over_rows(probs, d_out)[None]


def _sum_over_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[heads, rows, m]`, `[heads, rows, n]` -> `a.mT @ b`, by blocks of 64 rows."""
    whole = a.shape[1] - a.shape[1] % 64
    blocks = (x[:, :whole].unflatten(1, (-1, 64)) for x in (a, b))
    return (next(blocks).mT @ next(blocks)).sum(dim=1) + a[:, whole:].mT @ b[:, whole:]


def _merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Add a piece's result `[rows, heads, dim]` and log-sum-exp `[rows, heads]`, in place."""
    total = torch.logaddexp(lse, other_lse)
    out.mul_((lse - total).exp_()[..., None]).addcmul_(other, (other_lse - total).exp_()[..., None])
    lse.copy_(total)


def _stacked_lse(lse: torch.Tensor, d_out: torch.Tensor, stack: Stack) -> torch.Tensor:
    """Log-sum-exp of the stack's rows. Padding gets no gradient (`d_out` is zeroed there) and no probability."""
    rows = _batched(lse[..., None], stack)[..., 0]
    if stack.padded:
        pad = torch.ones(stack.num * stack.length, dtype=torch.bool, device=lse.device)
        pad[stack.place] = False
        pad = pad.view(stack.num, 1, stack.length)
        d_out.masked_fill_(pad[..., None], 0.0)
        rows = rows.masked_fill(pad, torch.inf)
    return rows
