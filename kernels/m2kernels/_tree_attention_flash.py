"""Tree attention of a forest of chains, which is causal attention on sequences one after another: varlen kernels.

Packages, the first that is there: `flash_attn_interface` (FlashAttention-3, for Hopper), `flash_attn` 2, torch's own
`torch.nn.attention.varlen` (2.11 and later; FlashAttention-2). They attend from the lower right of each sequence, all
take the same arguments here, and return (out [rows, Hq, D], lse f32 [Hq, rows], ...).
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2kernels.plan_tree import TreePlan, upload

_PACKAGES = ("flash_attn_interface", "flash_attn")
_HALF = (torch.bfloat16, torch.float16)
_MAX_DIM = 256


def flash_reason(q: Tensor | None = None, plan: TreePlan | None = None, deterministic: bool = False) -> str | None:
    """Why no varlen kernel can run here, on q [N, Hq, D], or on this forest; None if one can.

    With `deterministic` its backward has to be.
    """
    if q is not None and q.device.type != "cuda":
        return f"q is on {q.device.type}; varlen kernels are CUDA's"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    function, missing = _package()
    if function is None and not _torch_has_varlen():
        return f"{missing}, and torch {torch.__version__} has no torch.nn.attention.varlen with window_size; 2.11 has"
    if function is None and deterministic and not torch.are_deterministic_algorithms_enabled():
        return (
            f"{missing}, and the backward of torch's varlen kernel is deterministic only under "
            "torch.use_deterministic_algorithms(True)"
        )
    if q is not None and q.dtype not in _HALF:
        return f"q is {q.dtype}; varlen kernels take bfloat16 and float16"
    if q is not None and q.dim() == 3 and (q.shape[2] > _MAX_DIM or q.shape[2] % 8):
        return f"head_dim is {q.shape[2]}; varlen kernels take multiples of 8 up to {_MAX_DIM}"
    if plan is not None:
        row = first_branch(plan)
        if row is not None:
            return f"the forest branches at row {row}; varlen kernels know chains alone"
    return None


def first_branch(plan: TreePlan) -> int | None:
    """First row whose parent is not the row before it, though it has one; None: every tree is a chain."""
    parent = plan.segments.parent
    aside = (parent >= 0) & (parent != np.arange(len(parent)) - 1)
    return int(plan.segments.start[aside.argmax()]) if aside.any() else None


@functools.cache
def _package() -> tuple[Callable[..., Any] | None, str]:
    """The varlen function of the first package that has one, or None and why there is none."""
    missing = []
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            missing.append(f"{name} is not installed")
            continue
        try:  # one built for another torch is found, and breaks here
            return importlib.import_module(name).flash_attn_varlen_func, ""
        except (ImportError, OSError, AttributeError, RuntimeError) as err:
            missing.append(f"{name} does not import ({type(err).__name__}: {err})")
    return None, ", ".join(missing)


@functools.cache
def _torch_has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def _bounds(plan: TreePlan, device: torch.device) -> tuple[Tensor, int]:
    """cu_seqlens int32 [trees + 1] on `device` and the longest tree; worked out once a plan."""
    key = f"chain_bounds {device}"
    found = plan.derived.get(key)
    if found is None:
        roots = plan.segments.start[plan.segments.parent < 0]
        ends = np.append(roots, plan.num_rows).astype(np.int32)
        longest = int(np.diff(ends).max(initial=0))
        found = plan.derived[key] = (upload([torch.from_numpy(ends)], device)[0], longest)
    assert isinstance(found, tuple)
    return found


def flash_tree_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, scale: float, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`m2kernels.tree_attention`: out and lse f32 [N, Hq], without a gradient; the forest is of chains."""
    num = plan.num_rows
    bounds, longest = _bounds(plan, q.device)
    rows = [x[:num] for x in (q, k, v)]
    args = (*rows, bounds, bounds, longest, longest)
    attend, _ = _package()
    if attend is None:
        out, lse = _torch_varlen(args, scale)
    else:
        options = {"softmax_scale": scale, "causal": True, "deterministic": deterministic}
        # A FlashAttention-3 without the option returns lse unasked.
        if "return_attn_probs" in inspect.signature(attend).parameters:
            options["return_attn_probs"] = True
        out, lse = attend(*args, **options)[:2]
    lse = lse.detach().t()
    padding = q.shape[0] - num
    if padding:
        out = torch.cat([out, out.new_zeros(padding, *out.shape[1:])])
        lse = torch.cat([lse, lse.new_zeros(padding, lse.shape[1])])
    return out, lse


def _torch_varlen(args: tuple[Any, ...], scale: float) -> tuple[Tensor, Tensor]:
    """torch follows its own switch for a deterministic backward, `torch.use_deterministic_algorithms`."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    found = varlen_attn(
        *args,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=args[0].shape[1] != args[1].shape[1],
    )
    assert isinstance(found, tuple)
    return found
