"""Attention over a prefix forest: every row sees itself and the rows above it, each row once.

    s = scale q[i] . k[j] for j <= i < subtree_end[j],  lse = log(sum(exp(s))),  o[i] = sum(exp(s - lse) v[j])

It equals causal attention on the sequences apart, where rows that they share would be computed many times over.
Backends: `triton` walks the planner's tiles on a GPU (see _tree_attention_triton.py); `cpu` cuts the forest into
dense pieces (_tree_attention_cpu.py); `flash` hands a forest of chains to a varlen kernel (_tree_attention_flash.py),
only when it is asked for; `torch` is the reference, any device and dtype: each chain attends to a copy of its path.
"""

import functools
import math
import warnings
from typing import Literal, overload

import torch

from m2kernels._backend import BACKENDS, choose_backend
from m2kernels._check import check_device, check_dtype
from m2kernels._tree_attention_cpu import CpuTreeAttention
from m2kernels._tree_attention_flash import flash_reason, flash_tree_attention
from m2kernels._triton import triton_tree_reason
from m2kernels.plan_tree import TreePlan

_OP = "tree_attention"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


TREE_BACKENDS = (*BACKENDS, "flash")
"""`auto` never gets to the last one: where `torch` is reached it can run."""


def unsupported_reason(
    backend: str, q: torch.Tensor | None = None, plan: TreePlan | None = None, *, deterministic: bool = False
) -> str | None:
    """Why `backend` (cuda | cpu | triton | torch | flash) cannot run here, on these queries or this plan, or with a
    deterministic backward; None if it can."""
    if backend == "torch":
        return None
    if backend == "cuda":
        return "there is no cuda kernel for tree_attention"
    if backend == "triton":
        return triton_tree_reason(q, None if plan is None else plan.tiles.block)
    if backend == "flash":
        return flash_reason(q, plan, deterministic)
    if q is not None and q.device.type != "cpu":
        return f"q is on {q.device.type}"
    return None


def _check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TreePlan, scale: float) -> None:
    """Raise ValueError for a wrong shape, dtype or device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{_OP}: {name} has shape {list(x.shape)}; expected [rows, heads, head_dim]")
        check_dtype(_OP, name, x, _DTYPES if name == "q" else (q.dtype,))
        check_device(_OP, name, x, q)
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"{_OP}: q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; expected k and v alike, "
            "and the same rows and head_dim in all three"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{_OP}: {q.shape[1]} query heads cannot share {k.shape[1]} KV heads; use a multiple")
    if q.shape[0] < plan.num_rows:
        raise ValueError(f"{_OP}: q has {q.shape[0]} rows; expected the plan's {plan.num_rows}, or more (padding)")
    if not math.isfinite(scale):
        raise ValueError(f"{_OP}: got scale {scale}; expected a finite number")


@overload
def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    deterministic: bool = True,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> torch.Tensor: ...


@overload
def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of each packed row to itself and the rows above it in its tree.

    Args:
        q: [N, Hq, D], bf16, fp16, fp32 or fp64. Rows past plan.num_rows are padding: never read, 0 in the result and
            in the gradients.
        k: [N, Hkv, D]; query head h reads KV head h // (Hq / Hkv).
        v: [N, Hkv, D].
        plan: from :func:`m2kernels.plan_tree`; row j is visible to row i iff j <= i < plan.subtree_end[j].
        scale: of the scores; None is D ** -0.5.
        deterministic: False lets a backend use a faster backward whose sums have no fixed order: triton and flash
            have one. torch's varlen kernel follows torch.use_deterministic_algorithms instead, and is refused while
            that is off and this is True.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: auto | triton | cpu | torch | flash. flash takes a forest of chains alone, and is never `auto`'s
            choice.

    Returns:
        o [N, Hq, D] in q's dtype; with return_lse (o, lse float32 [N, Hq], float64 for float64; no gradient).
        Differentiable once in q, k, v.

    Raises:
        ValueError: a wrong shape, dtype or device, a backend that cannot run, or, for triton, a plan that is not on
            q's device.
    """
    number = q.shape[-1] ** -0.5 if scale is None and q.dim() == 3 and q.shape[-1] else float(scale or 0.0)
    _check_inputs(q, k, v, plan, number)
    chosen = choose_backend(
        _OP, backend, lambda name: unsupported_reason(name, q, plan, deterministic=deterministic), TREE_BACKENDS
    )
    if chosen == "torch" and backend == "auto" and q.is_cuda:
        _warn_of_reference(str(unsupported_reason("triton", q, plan)))
    if not plan.num_rows or not q.numel():
        chosen = "torch"
    if number <= 0:  # the kernels mask, or take a running maximum, before they scale
        q, number = (-q, -number) if number else (q * 0, 1.0)
    lse: torch.Tensor | None
    if chosen == "cpu":
        out, lse = CpuTreeAttention.apply(q, k, v, plan, number)
    elif chosen == "triton":
        from m2kernels._tree_attention_triton import triton_tree_attention

        out, lse = triton_tree_attention(q, k, v, plan, number, deterministic, return_lse)
    elif chosen == "flash":
        out, lse = flash_tree_attention(q, k, v, plan, number, deterministic)
    else:
        out, lse = _tree_attention_torch(q, k, v, plan, number)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


@functools.cache
def _warn_of_reference(reason: str) -> None:
    """Once a reason: nobody should train on the reference without knowing."""
    warnings.warn(
        f"{_OP}: the readable reference runs, with all scores of a path at once, since triton cannot: {reason}",
        stacklevel=3,
    )


def _tree_attention_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TreePlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each chain of segments, every one the next one's parent and right before it, attends to its path."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_wide, k_wide, v_wide = (x.to(work) for x in (q, k, v))
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    outs, lses = [], []
    for first, last, path in _chains(plan):
        rows = path.to(q.device)
        # [Hkv, group, queries, D] and [Hkv, 1, keys, D]
        queries = q_wide[first:last].unflatten(1, (heads, group)).permute(1, 2, 0, 3)
        keys, values = (_pick(x, rows).transpose(0, 1)[:, None] for x in (k_wide, v_wide))
        scores = queries @ keys.transpose(2, 3) * scale
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(len(rows) - (last - first) + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        out = scores.softmax(dim=3) @ values
        outs.append(out.permute(2, 0, 1, 3).flatten(1, 2))
        lses.append(scores.detach().logsumexp(dim=3).permute(2, 0, 1).flatten(1, 2))
    padding = q_wide[plan.num_rows :]
    outs.append(padding.masked_fill(torch.ones_like(padding, dtype=torch.bool), 0.0))
    lses.append(padding.new_zeros(padding.shape[:2]))
    return torch.cat(outs).to(q.dtype), torch.cat(lses)


def _pick(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows]. The backward of index_select adds in a fixed order on the CPU, that of indexing does on CUDA."""
    return x[rows] if x.is_cuda else x.index_select(0, rows)


def _chains(plan: TreePlan) -> list[tuple[int, int, torch.Tensor]]:
    """First row, past the last, and int64 rows of the whole path, for each chain in packed order."""
    seg = plan.segments
    found, s = [], 0
    while s < len(seg.start):
        head = s
        while s + 1 < len(seg.start) and seg.parent[s + 1] == s:
            s += 1
        runs = [torch.arange(int(seg.start[p]), int(seg.end[p]), device="cpu") for p in seg.path(s)]
        found.append((int(seg.start[head]), int(seg.end[s]), torch.cat(runs)))
        s += 1
    return found
