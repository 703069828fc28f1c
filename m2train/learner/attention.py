"""Core attention over packed sequences for the local layer spec, with rotary embedding by position.

Sequences lie one after another in `[tokens, heads, dim]` (THD); each attends causally to itself only. On CUDA, bf16
goes to torch's varlen flash attention. Elsewhere sequences of similar length are stacked with padding behind them:
under a causal mask no real token sees the padding, so no mask tensor is needed and one SDPA call serves many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.nn import functional as F

# A sequence joins a stack if it is at least this part of the longest one in it: bounds the padding.
_MIN_FILL = 0.8


@dataclass
class PackedRows(PackedSeqParams):
    """Megatron's packing description plus what our core attention needs; passes through GPTModel untouched."""

    cos: torch.Tensor | None = None
    """[tokens, 1, dim / 2], in the model's dtype"""
    sin: torch.Tensor | None = None
    stacks: tuple[Stack, ...] = ()
    back: torch.Tensor | None = None
    """int64 [tokens]: where each token lies in the concatenation of all stacks"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Sequences of similar length as one padded batch."""

    num: int
    length: int
    rows: torch.Tensor
    """int64 [num * length]: the packed row at each place; padding points at the sequence's first row"""
    real: torch.Tensor
    """int64 [tokens of the stack]: the packed rows that are real"""
    place: torch.Tensor
    """int64 [tokens of the stack]: where each of `real` lies in the stack"""

    def to(self, device: torch.device) -> Stack:
        """The same on another device."""
        rows, real, place = (x.to(device) for x in (self.rows, self.real, self.place))
        return Stack(num=self.num, length=self.length, rows=rows, real=real, place=place)


def packed_rows(lengths: Sequence[int], inverse_frequencies: torch.Tensor, dtype: torch.dtype) -> PackedRows:
    """Describe sequences of these lengths lying one after another; positions restart in each.

    Args:
        lengths: tokens of each sequence, all positive.
        inverse_frequencies: fp32 [dim / 2]; its device is the result's.
        dtype: of cos and sin.
    """
    device = inverse_frequencies.device
    sizes = torch.tensor(lengths, dtype=torch.int32)
    ends = torch.cumsum(sizes, 0, dtype=torch.int32)
    cu = torch.cat([torch.zeros(1, dtype=torch.int32), ends]).to(device)
    position = torch.cat([torch.arange(n) for n in lengths]).to(device)
    angle = position.float()[:, None] * inverse_frequencies
    longest = max(lengths)
    stacks, back = _stacks(lengths)
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cos=angle.cos().to(dtype)[:, None],
        sin=angle.sin().to(dtype)[:, None],
        stacks=tuple(stack.to(device) for stack in stacks),
        back=back.to(device),
    )


def _stacks(lengths: Sequence[int]) -> tuple[list[Stack], torch.Tensor]:
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    stacks: list[Stack] = []
    back = torch.empty(starts[-1], dtype=torch.int64)
    offset = 0
    while order:
        longest = lengths[order[0]]
        members = [i for i in order if lengths[i] >= _MIN_FILL * longest]
        order = order[len(members) :]
        place = torch.arange(longest)
        rows = torch.cat([starts[i] + torch.where(place < lengths[i], place, 0) for i in members])
        local = torch.cat([k * longest + torch.arange(lengths[i]) for k, i in enumerate(members)])
        real = torch.cat([starts[i] + torch.arange(lengths[i]) for i in members])
        back[real] = offset + local
        stacks.append(Stack(num=len(members), length=longest, rows=rows, real=real, place=local))
        offset += rows.numel()
    return stacks, back


class _Rotate(torch.autograd.Function):
    """Rotary embedding of `x [tokens, heads, dim]` by halves; the gradient is the rotation backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return out


class _Stacked(torch.autograd.Function):
    """Rows of `x` at the places of a padded stack. Padding gets no gradient, so the way back is a selection too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stack: Stack) -> torch.Tensor:
        ctx.stack, ctx.shape = stack, x.shape
        return x.index_select(0, stack.rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        stack = ctx.stack
        out = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        return out.index_copy_(0, stack.real, grad.index_select(0, stack.place)), None


class _Unstacked(torch.autograd.Function):
    """Real tokens picked from the concatenated stacks, in packed order."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.shape = y.shape
        return y.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (back,) = ctx.saved_tensors
        return torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device).index_copy_(0, back, grad), None


class ThdCoreAttention(torch.nn.Module):
    """Causal attention within each packed sequence; takes the place of Megatron's DotProductAttention.

    Args:
        config: the TransformerConfig.
        softmax_scale: default `kv_channels ** -0.5`.
        **_: what Megatron hands to every core attention (layer number, mask type, process groups...).
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedRows,
        **_: Any,
    ) -> torch.Tensor:
        """`query [t, heads, dim]`, `key`, `value [t, kv heads, dim]` -> `[t, heads * dim]`."""
        packed = packed_seq_params
        assert packed.cos is not None and packed.sin is not None, "packed_rows() made no rotary tables"
        query = _Rotate.apply(query, packed.cos, packed.sin)
        key = _Rotate.apply(key, packed.cos, packed.sin)
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            out = _varlen(query, key, value, packed, self.scale)
        else:
            out = _stacked_sdpa(query, key, value, packed, self.scale)
        return out.reshape(out.shape[0], -1)


def _stacked_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows, scale: float
) -> torch.Tensor:
    # fp32 on the CPU also for bf16 models: torch 2.13's CPU flash attention took 176 ms in bf16 and 58 ms in fp32 for
    # 32 x 150 tokens, 9/3 heads of 64, forward and backward on 2 Zen cores with avx512_bf16.
    dtype = query.dtype
    outs = []
    for stack in packed.stacks:
        parts = [_Stacked.apply(x, stack).float() for x in (query, key, value)]
        q, k, v = (x.view(stack.num, stack.length, x.shape[1], x.shape[2]).transpose(1, 2) for x in parts)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(o.transpose(1, 2).reshape(stack.num * stack.length, q.shape[1], q.shape[3]))
    together = torch.cat(outs) if len(outs) > 1 else outs[0]
    return _Unstacked.apply(together, packed.back).to(dtype)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out
