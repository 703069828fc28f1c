"""Group advantage by Triton: one launch, every block of rows walks over all rows.

The same plan as the CUDA kernel: B^2 label reads out of L1, sums in double in a fixed order, no
sort, no atomics.
"""

from typing import Any

import torch
import triton

from m2kernels import _group_advantage_triton_kernels as kernels
from m2kernels._triton import Launch

META = {"BLOCK_ROWS": 16, "BLOCK_OTHERS": 256, "num_warps": 4}


def advantage_launch(
    advantage: torch.Tensor,
    reward: torch.Tensor,
    group: torch.Tensor,
    valid: torch.Tensor | None,
    leave_one_out: bool,
    divide_by_std: bool,
    eps: float,
) -> Launch:
    """The launch for reward f32 [B], group int [B], valid bool [B] -> advantage f32 [B]."""
    rows = reward.shape[0]
    meta: dict[str, Any] = {"LEAVE_ONE_OUT": leave_one_out, "DIVIDE_BY_STD": divide_by_std, **META}
    return Launch(
        kernel=kernels.advantage_kernel,
        grid=(triton.cdiv(rows, META["BLOCK_ROWS"]),),
        args=(reward, group, valid, advantage, rows, eps),
        meta=meta,
    )


def group_advantage_triton(reward: torch.Tensor, *args: Any) -> torch.Tensor:
    """Arguments of the native op, contiguous -> advantage, like reward."""
    advantage = torch.empty_like(reward)
    advantage_launch(advantage, reward, *args).run(reward.device)
    return advantage
