"""The LM head's backend for the CPU, in C++.

csrc/cpu/head_tiles.h multiplies and measures in one go, with the chunk's rows as vector lanes, so
kept logits are [vocabulary, lanes]: their transpose goes into the GEMMs of the gradients. Logits are
float32 for bfloat16 inputs too. A new weight gradient [vocabulary, D] lends its rows for them: an
entry's logits lie where their sum will be written, so up to D rows of logits (bfloat16: half of that)
take no memory of their own (bfloat16: a half, for their gradient), and as large a chunk saves passes
over the weight and its gradient.
csrc/cpu/head_rows.h does logits that a caller brings.
"""

from typing import Any

import torch

from m2kernels._head_kernels import HeadKernels, HeadSettings, RowStats, TileStats, Upstream
from m2kernels._live_rows import LiveRows
from m2kernels._native import CPU_ERROR

_ops = torch.ops.m2kernels


_LANES = 16
_SLAB_BYTES = 16 << 20  # of logits set aside, while the weight gradient is written that they lie in


def _lanes(rows: torch.Tensor) -> int:
    return -(-rows.shape[0] // _LANES) * _LANES


def _writes(*args: Any) -> None:
    """Fake of the ops that write into their caller's tensors."""


def _merge_fake(z_target: torch.Tensor, *args: Any) -> torch.Tensor:
    return z_target.new_empty(4, z_target.shape[0])


if CPU_ERROR is None:
    for _name in ("head_tiles", "head_lanes", "head_dx", "head_dw", "head_stats", "head_grad"):
        torch.library.register_fake(f"m2kernels::{_name}", _writes)
    torch.library.register_fake("m2kernels::head_merge", _merge_fake)


def _columns(settings: HeadSettings) -> tuple[Any, ...]:
    """The settings as arguments of the ops: target, bias, temperatures, temperature, cap, num_valid."""
    inverse = settings.inv_temperature
    bias = None if settings.bias is None else settings.bias.float()
    cap = settings.softcap or 0.0
    if isinstance(inverse, torch.Tensor):
        return settings.target, bias, inverse, 1.0, cap, settings.num_valid
    return settings.target, bias, None, inverse, cap, settings.num_valid


def _dense(rows: RowStats, upstream: Upstream) -> list[torch.Tensor | None]:
    return [None if x is None else x.contiguous() for x in (*rows, *upstream)]


class CpuHead(HeadKernels):
    """Backend ``cpu``."""

    tile = 128
    row_step = 48  # lanes of a register block

    def logit_bytes(self, dtype: torch.dtype) -> int:
        """See :meth:`HeadKernels.logit_bytes`."""
        return 4

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        settings: HeadSettings,
        *,
        entropy: bool,
        keep: bool,
        lend: torch.Tensor | None = None,
    ) -> tuple[TileStats, Any]:
        """See :meth:`HeadKernels.forward`; the scratch is the logits and the weight's dtype."""
        rows, lanes = hidden.shape[0], _lanes(hidden)
        tiles = -(-weight.shape[0] // self.tile)
        stats = hidden.new_empty(3 if entropy else 2, tiles, lanes, dtype=torch.float32)
        z_target = hidden.new_zeros(lanes, dtype=torch.float32)
        kept = self._multiply(hidden, weight, settings, z_target, stats, keep=keep, lend=lend)
        top, total, *moment = stats[:, :, :rows].transpose(1, 2)
        return TileStats(z_target[:rows], top, total, moment[0] if moment else None), kept

    def recompute(
        self, hidden: torch.Tensor, weight: torch.Tensor, settings: HeadSettings, lend: torch.Tensor | None = None
    ) -> Any:
        """See :meth:`HeadKernels.recompute`."""
        return self._multiply(hidden, weight, settings, None, None, keep=True, lend=lend)

    def lent_rows(self, dim: int, dtype: torch.dtype) -> int:
        """See :meth:`HeadKernels.lent_rows`."""
        size = dim * dtype.itemsize
        return 0 if size % 4 else size // (4 * _LANES) * _LANES

    def _multiply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        settings: HeadSettings,
        z_target: torch.Tensor | None,
        stats: torch.Tensor | None,
        *,
        keep: bool,
        lend: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.dtype] | None:
        kept = None
        if keep and lend is not None:
            kept = lend.view(torch.float32)[:, : _lanes(hidden)]
        elif keep:
            kept = hidden.new_empty(weight.shape[0], _lanes(hidden), dtype=torch.float32)
        _ops.head_tiles(hidden, weight, *_columns(settings), z_target, stats, kept)
        return None if kept is None else (kept, weight.dtype)

    def grad_rows(
        self, kept: Any, settings: HeadSettings, rows: RowStats, upstream: Upstream, live: LiveRows | None
    ) -> torch.Tensor:
        """See :meth:`HeadKernels.grad_rows`; a transpose, in the memory of the logits but for lent bfloat16 ones."""
        logits, dtype = kept
        part = None if live is None else live.part()
        count = len(settings.target if part is None else part)
        out = None
        if dtype == torch.bfloat16 and logits.is_contiguous():
            out = logits.view(dtype)
        elif (
            dtype == torch.bfloat16
        ):  # half as large, and out of the way of the GEMM that writes where the logits lie
            out = logits.new_empty(logits.shape[0], -(-count // _LANES) * _LANES, dtype=dtype)
        _ops.head_lanes(logits, out, *_columns(settings), *_dense(rows, upstream), part)
        return (logits if out is None else out)[:, :count].t()

    def hidden_grad(self, dz: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See :meth:`HeadKernels.hidden_grad`; torch's GEMM is as fast for bfloat16."""
        if dz.dtype != torch.float32 or weight.shape[1] % _LANES:
            return super().hidden_grad(dz, weight)
        new = dz.new_empty if weight.shape[0] else dz.new_zeros  # an empty sum is zero
        out = new(dz.shape[0], weight.shape[1])
        _ops.head_dx(dz.t(), weight, out)
        return out

    def weight_grad(
        self, dz: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, *, first: bool, scale: float
    ) -> None:
        """See :meth:`HeadKernels.weight_grad`."""
        if dz.dtype == torch.float32 and total.stride(1) == 1 and hidden.shape[1] % _LANES == 0:
            _ops.head_dw(dz.t(), hidden if scale == 1.0 else hidden * scale, total, not first)
        elif dz.data_ptr() != total.data_ptr():
            super().weight_grad(dz, hidden, total, first=first, scale=scale)
        else:
            step = max(_SLAB_BYTES // (dz.shape[0] * dz.element_size()), 1)
            for start in range(0, dz.shape[1], step):
                slab = slice(start, start + step)
                aside = dz[:, slab].t().clone(memory_format=torch.contiguous_format).t()
                super().weight_grad(aside, hidden, total[slab], first=first, scale=scale)

    def merge(self, stats: TileStats) -> RowStats:
        """See :meth:`HeadKernels.merge`."""
        moment = None if stats.moment is None else stats.moment.contiguous()
        out = _ops.head_merge(stats.z_target, stats.top.contiguous(), stats.total.contiguous(), moment)
        return RowStats(out[0], out[1], out[2], None if moment is None else out[3])

    def tile_stats(self, logits: torch.Tensor, settings: HeadSettings, *, entropy: bool) -> TileStats:
        """Statistics of logits [C, Vl] that are there already."""
        rows, width = logits.shape
        stats = logits.new_empty(3 if entropy else 2, rows, -(-width // self.tile), dtype=torch.float32)
        z_target = logits.new_zeros(rows, dtype=torch.float32)
        top, total, *rest = stats
        moment = rest[0] if rest else None
        _ops.head_stats(logits, *_columns(settings), z_target, top, total, moment)
        return TileStats(z_target, top, total, moment)

    def logits_grad(
        self, logits: torch.Tensor, settings: HeadSettings, rows: RowStats, upstream: Upstream
    ) -> torch.Tensor:
        """Gradient of logits [C, Vl] (before bias, cap and temperature), a new tensor of their dtype."""
        out = logits.new_empty(logits.shape)
        _ops.head_grad(logits, out, *_columns(settings), *_dense(rows, upstream))
        return out
