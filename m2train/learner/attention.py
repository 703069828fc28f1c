"""Core attention over prefix forests for Megatron's layers, with rotary embedding by position.

Rows lie in `[tokens, heads, dim]` (THD) and attend to themselves and to the rows above them in their tree; sequences
packed one after another are a forest of chains. Such a one goes to a varlen kernel where there is one (CUDA, bf16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

import m2kernels as mk
from m2kernels.tree_attention import unsupported_reason


@dataclass
class PackedRows(PackedSeqParams):
    """Megatron's packing description plus what our core attention needs; passes through GPTModel untouched.

    The cumulative lengths are those of the sequences one after another, and None if they share rows.
    """

    forest: mk.TreePlan | None = None
    cos: torch.Tensor | None = None
    """[tokens, 1, dim / 2], in the model's dtype"""
    sin: torch.Tensor | None = None
    deterministic: bool = True


def packed_rows(
    forest: mk.TreePlan, inverse_frequencies: torch.Tensor, dtype: torch.dtype, *, deterministic: bool = True
) -> PackedRows:
    """Describe a packed micro-batch.

    Args:
        forest: on the device of the frequencies.
        inverse_frequencies: fp32 [dim / 2].
        dtype: of cos and sin.
        deterministic: the backward's sums have a fixed order.
    """
    angle = forest.position.float()[:, None] * inverse_frequencies
    apart = forest.num_rows == forest.num_input_tokens
    cu = forest.cu_seqlens() if apart else None
    longest = max(forest.lengths) if apart else None
    return PackedRows(
        qkv_format="thd",
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        forest=forest,
        cos=angle.cos().to(dtype)[:, None],
        sin=angle.sin().to(dtype)[:, None],
        deterministic=deterministic,
    )


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


class ThdCoreAttention(torch.nn.Module):
    """Attention within each packed tree; takes the place of Megatron's DotProductAttention.

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
        assert packed.forest is not None, "packed_rows() made no description"
        query = _Rotate.apply(query, packed.cos, packed.sin)
        key = _Rotate.apply(key, packed.cos, packed.sin)
        fixed = packed.deterministic
        reason = unsupported_reason("flash", query, packed.forest, deterministic=fixed)
        flash = packed.cu_seqlens_q is not None and reason is None
        backend = "flash" if flash else "auto"
        out = mk.tree_attention(
            query, key, value, packed.forest, scale=self.scale, deterministic=fixed, backend=backend
        )
        return out.reshape(out.shape[0], -1)
