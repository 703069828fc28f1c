"""Group advantage: how much better a reward is than those of its group.

Maths (Baichuan-M2, section 3.3; "Dr. GRPO" leaves out the division): for a row i of group g,

    A_i = r_i - mean(r in g)                       baseline="mean"
    A_i = r_i - mean(r in g without i)             baseline="loo", = (r_i - mean) n / (n - 1)
    A_i / (std(r in g) + eps)                      scale="std", the sample standard deviation

Traffic: 4 B read and 4 B written a row, plus labels; launch-bound on a GPU, sort-bound on a CPU.
Trick: sums in double of fp32 rewards are exact for equal rewards, so such a group gets exact
zeros, not rounding noise that a division by a tiny std would blow up. Not differentiable.
"""

from typing import Any

import torch

from m2kernels._backend import choose_backend
from m2kernels._check import INTEGERS, check_device, check_dtype, check_vector
from m2kernels._native import CPU_ERROR, machine_reason
from m2kernels._triton import triton_reason

BASELINES = ("mean", "loo")
SCALES = ("none", "std")
MAX_GPU_ROWS = 32768
"""The CUDA and Triton kernels read B^2 labels; at more rows torch's sort-based path is the better one."""


def unsupported_reason(backend: str, reward: torch.Tensor | None = None) -> str | None:
    """Why `backend` (cuda | cpu | triton | torch) cannot run here, or on this reward; None if it can."""
    if backend == "torch":
        return None
    if reward is not None:
        if backend != "triton" and reward.device.type != backend:
            return f"reward is on {reward.device.type}"
        if reward.dtype != torch.float32:
            return f"reward is {reward.dtype}; the kernels take float32"
        if backend != "cpu" and reward.shape[0] > MAX_GPU_ROWS:
            return f"{reward.shape[0]} rows; the kernel takes at most {MAX_GPU_ROWS}"
    if backend == "triton":
        return triton_reason(None if reward is None else reward.device.type)
    return machine_reason(backend)


def _group_advantage_torch(
    reward: torch.Tensor,
    group: torch.Tensor,
    valid: torch.Tensor | None,
    baseline: str,
    scale: str,
    eps: float,
) -> torch.Tensor:
    """The same maths with torch ops, in float64; returns reward's dtype."""
    live = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
    r = torch.where(live, reward, 0).double()
    # Sorting by label gives dense group numbers without torch.unique, which would sync.
    label, order = torch.sort(group, stable=True)
    starts = torch.ones_like(label, dtype=torch.bool)
    starts[1:] = label[1:] != label[:-1]
    dense = torch.empty_like(order)
    dense[order] = starts.cumsum(0) - 1
    lengths = torch.zeros_like(order).index_add(0, dense, torch.ones_like(order))

    def group_sum(x: torch.Tensor) -> torch.Tensor:
        # In a fixed order, also on a GPU, where index_add of floats has none.
        return torch.segment_reduce(x[order], "sum", lengths=lengths, unsafe=True, initial=0)[dense]

    def all_equal() -> torch.Tensor:
        extremes = []
        for kind, outside in (("max", -torch.inf), ("min", torch.inf)):
            x = torch.where(live, r, outside)[order]
            extremes.append(torch.segment_reduce(x, kind, lengths=lengths, unsafe=True)[dense])
        return (extremes[0] == extremes[1]) & extremes[0].isfinite()

    n = group_sum(live.double())
    difference = torch.where(live, r - group_sum(r) / n.clamp(min=1), 0)
    if reward.dtype == torch.float64:  # sums of equal float64 values are rounded
        difference = torch.where(all_equal(), 0, difference)
    advantage = difference
    if baseline == "loo":
        advantage = advantage * torch.where(n > 1, n / (n - 1).clamp(min=1), 1)
    if scale == "std":
        variance = group_sum(difference.square()) / (n - 1).clamp(min=1)
        advantage = advantage / (variance.sqrt() + eps)
    return torch.where(difference == 0, 0, advantage).to(reward.dtype)


def _group_advantage_fake(reward: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(reward)


if CPU_ERROR is None:
    torch.library.register_fake("m2kernels::group_advantage", _group_advantage_fake)


@torch.library.custom_op(
    "m2kernels::group_advantage_triton",
    mutates_args=(),
    schema="(Tensor reward, Tensor group, Tensor? valid, bool leave_one_out, bool divide_by_std, float eps) "
    "-> Tensor",
)
def _group_advantage_triton(*args: Any) -> torch.Tensor:
    from m2kernels._group_advantage_triton import group_advantage_triton

    return group_advantage_triton(*args)


_group_advantage_triton.register_fake(_group_advantage_fake)


def group_advantage(
    reward: torch.Tensor,
    group: torch.Tensor,
    *,
    baseline: str = "mean",
    scale: str = "none",
    valid: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> torch.Tensor:
    """Advantage of every reward within its group (Baichuan-M2, section 3.3).

    Args:
        reward: float32 [B]. float64 is taken by backend torch.
        group: int32 or int64 [B]; any labels in any order.
        baseline: "mean" of the group, or "loo": the mean of the others.
        scale: "none", or "std": divide by the group's sample standard deviation plus `eps`.
        valid: bool [B]; rows that are False get 0 and take no part in any statistic, whatever
            they hold. None: all rows are valid.
        eps: added to the standard deviation; at least 0.
        backend: auto | cuda | cpu | triton | torch.

    Returns:
        Like reward, detached. A group of one, or of equal rewards, gives exact zeros.

    Raises:
        ValueError: a wrong shape, dtype, device or option, or a backend that cannot run.
    """
    op = "group_advantage"
    check_vector(op, "reward", reward)
    check_dtype(op, "reward", reward, (torch.float32, torch.float64))
    check_vector(op, "group", group, reward.shape[0])
    check_dtype(op, "group", group, INTEGERS)
    check_device(op, "group", group, reward)
    if valid is not None:
        check_vector(op, "valid", valid, reward.shape[0])
        check_dtype(op, "valid", valid, (torch.bool,))
        check_device(op, "valid", valid, reward)
    if baseline not in BASELINES:
        raise ValueError(f"{op}: got baseline {baseline!r}; expected one of {BASELINES}")
    if scale not in SCALES:
        raise ValueError(f"{op}: got scale {scale!r}; expected one of {SCALES}")
    if not eps >= 0:
        raise ValueError(f"{op}: got eps {eps}; expected a number of at least 0")
    chosen = choose_backend(op, backend, lambda name: unsupported_reason(name, reward))
    reward = reward.detach()
    if chosen == "torch":
        return _group_advantage_torch(reward, group, valid, baseline, scale, eps)
    ops = torch.ops.m2kernels
    registered = ops.group_advantage_triton if chosen == "triton" else ops.group_advantage
    result: torch.Tensor = registered(
        reward.contiguous(),
        group.contiguous(),
        None if valid is None else valid.contiguous(),
        baseline == "loo",
        scale == "std",
        float(eps),
    )
    return result
