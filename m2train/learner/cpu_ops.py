"""RMSNorm and SwiGLU with hand-written gradients for the CPU, where autograd's own take several passes over memory.

Measured with torch 2.13.0+cpu on one AMD EPYC core with avx512_bf16, bf16, 4800 tokens, forward and backward:
RMSNorm of 576 channels 31.5 -> 10.3 ms, SwiGLU of 2 x 1536 channels 65.6 -> 39.0 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

_BLOCK = 256  # rows worked on at a time, so that fp32 temporaries stay in the L2 cache


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / rms(x) * weight` over the last dim, statistics in fp32."""
    out: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return out


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """`silu(first half) * second half` of the last dim."""
    out: torch.Tensor = _SwiGlu.apply(x)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, scale = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        d_x = torch.empty(x.shape, dtype=x.dtype)
        d_weight = torch.zeros(size, dtype=torch.float32)
        wide = weight.float()
        rows = zip(*(t.reshape(-1, t.shape[-1]).split(_BLOCK) for t in (x, grad, scale.float())), strict=True)
        out = d_x.view(-1, size).split(_BLOCK)
        for (part_x, part_g, part_s), target in zip(rows, out, strict=True):
            normed = part_x.float() * part_s
            g = part_g.to(torch.float32, copy=True)
            d_weight += torch.einsum("ij,ij->j", g, normed)
            g.mul_(wide)
            shift = torch.linalg.vecdot(g, normed).div_(size)
            target.copy_(g.addcmul_(normed, shift[:, None], value=-1).mul_(part_s))
        return d_x, d_weight.to(weight.dtype), None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        d_x = torch.empty(x.shape, dtype=x.dtype)
        parts = zip(*(t.reshape(-1, t.shape[-1]).split(_BLOCK) for t in (x, grad, d_x)), strict=True)
        for part, g, out in parts:
            gate, up = part.chunk(2, dim=-1)
            d_gate, d_up = out.chunk(2, dim=-1)
            torch.mul(F.silu(gate), g, out=d_up)
            torch.ops.aten.silu_backward.grad_input(g * up, gate, grad_input=d_gate)
        return d_x
