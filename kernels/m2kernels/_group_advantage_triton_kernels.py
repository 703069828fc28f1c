"""Triton kernel of the group advantage. Its launch is in ``_group_advantage_triton.py``."""

import triton
import triton.language as tl


@triton.jit
def _others(reward_ptr, group_ptr, valid_ptr, num_rows, base, label, BLOCK_OTHERS: tl.constexpr):
    """Rewards of the rows from `base` on, f64 [BLOCK_OTHERS], and which are of `label` [R, BLOCK_OTHERS]."""
    j = base + tl.arange(0, BLOCK_OTHERS)
    live = j < num_rows
    if valid_ptr is not None:
        live &= tl.load(valid_ptr + j, mask=live, other=0) != 0
    reward = tl.load(reward_ptr + j, mask=live, other=0.0).to(tl.float64)
    same = tl.load(group_ptr + j, mask=live, other=0)[None, :] == label[:, None]
    return reward[None, :], same & live[None, :]


@triton.jit
def advantage_kernel(
    reward_ptr,
    group_ptr,
    valid_ptr,  # or None
    advantage_ptr,
    num_rows,
    eps: "fp64",
    LEAVE_ONE_OUT: tl.constexpr,
    DIVIDE_BY_STD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Advantage of BLOCK_ROWS rows."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < num_rows
    live = inside
    if valid_ptr is not None:
        live &= tl.load(valid_ptr + row, mask=inside, other=0) != 0
    label = tl.load(group_ptr + row, mask=inside, other=0)
    count = tl.zeros((BLOCK_ROWS,), tl.float64)
    total = tl.zeros((BLOCK_ROWS,), tl.float64)
    for base in range(0, num_rows, BLOCK_OTHERS):
        reward, same = _others(reward_ptr, group_ptr, valid_ptr, num_rows, base, label, BLOCK_OTHERS)
        count += tl.sum(same.to(tl.float64), 1)
        total += tl.sum(tl.where(same, reward, 0.0), 1)
    mean = total / tl.where(count > 0.0, count, 1.0)
    many = count > 1.0
    fewer = tl.where(many, count - 1.0, 1.0)
    scale = tl.full((BLOCK_ROWS,), 1.0, tl.float64)
    if LEAVE_ONE_OUT:
        scale = tl.where(many, count / fewer, scale)
    if DIVIDE_BY_STD:
        squares = tl.zeros((BLOCK_ROWS,), tl.float64)
        for base in range(0, num_rows, BLOCK_OTHERS):
            reward, same = _others(reward_ptr, group_ptr, valid_ptr, num_rows, base, label, BLOCK_OTHERS)
            apart = tl.where(same, reward - mean[:, None], 0.0)
            squares += tl.sum(apart * apart, 1)
        scale = scale / (tl.sqrt(squares / fewer) + eps)
    apart = tl.load(reward_ptr + row, mask=live, other=0.0).to(tl.float64) - mean
    # A zero of its own: eps may be 0, and 0 / 0 must not follow.
    advantage = tl.where(live & (apart != 0.0), apart * scale, 0.0)
    tl.store(advantage_ptr + row, advantage.to(tl.float32), mask=inside)
