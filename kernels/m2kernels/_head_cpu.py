"""The LM head's backend for the CPU, in C++.

csrc/cpu/head_tiles.h multiplies and measures in one go, with the chunk's rows as vector lanes, so
kept logits are [vocabulary, lanes]: their transpose goes into the GEMMs of the gradients. Logits
are float32 for bfloat16 inputs too. csrc/cpu/head_rows.h does logits that a caller brings.
"""

from typing import Any

import torch

from m2kernels._head_kernels import HeadKernels, HeadSettings, RowStats, TileStats

_ops = torch.ops.m2kernels


_LANES = 16


def _columns(settings: HeadSettings) -> tuple[Any, ...]:
    """The settings as arguments of the ops."""
    inverse = settings.inv_temperature
    bias = None if settings.bias is None else settings.bias.float()
    cap = settings.softcap or 0.0
    if isinstance(inverse, torch.Tensor):
        return bias, inverse, 1.0, cap, settings.num_valid
    return bias, None, inverse, cap, settings.num_valid


def _dense(rows: RowStats, grad_logp: torch.Tensor, grad_entropy: torch.Tensor | None) -> list[torch.Tensor | None]:
    given = rows.log_norm, rows.log_norm_low, rows.logp, rows.entropy, grad_logp, grad_entropy
    return [None if x is None else x.contiguous() for x in given]


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
        target: torch.Tensor,
        settings: HeadSettings,
        *,
        entropy: bool,
        keep: bool,
    ) -> tuple[TileStats, Any]:
        """See :meth:`HeadKernels.forward`; the scratch is the logits and the weight's dtype."""
        rows, lanes = hidden.shape[0], -(-hidden.shape[0] // _LANES) * _LANES
        tiles = -(-weight.shape[0] // self.tile)
        stats = hidden.new_empty(3 if entropy else 2, tiles, lanes, dtype=torch.float32)
        z_target = hidden.new_zeros(lanes, dtype=torch.float32)
        kept = self._multiply(hidden, weight, target, settings, z_target, stats, keep=keep)
        top, total, *moment = stats[:, :, :rows].transpose(1, 2)
        return TileStats(z_target[:rows], top, total, moment[0] if moment else None), kept

    def recompute(
        self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, settings: HeadSettings
    ) -> Any:
        """See :meth:`HeadKernels.recompute`."""
        return self._multiply(hidden, weight, target, settings, None, None, keep=True)

    def _multiply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        settings: HeadSettings,
        z_target: torch.Tensor | None,
        stats: torch.Tensor | None,
        *,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.dtype] | None:
        lanes = -(-hidden.shape[0] // _LANES) * _LANES
        kept = hidden.new_empty(weight.shape[0], lanes, dtype=torch.float32) if keep else None
        columns = _columns(settings)
        _ops.head_tiles(hidden, weight, target, *columns, z_target, stats, kept)
        return None if kept is None else (kept, weight.dtype)

    def grad_rows(
        self,
        kept: Any,
        target: torch.Tensor,
        settings: HeadSettings,
        rows: RowStats,
        grad_logp: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        live: torch.Tensor | None,
    ) -> torch.Tensor:
        """See :meth:`HeadKernels.grad_rows`; in the memory of the logits, the transpose of a dense matrix."""
        logits, dtype = kept
        columns = _columns(settings)
        narrow = dtype == torch.bfloat16
        _ops.head_lanes(logits, narrow, target, *columns, *_dense(rows, grad_logp, grad_entropy), live)
        return logits.view(dtype)[:, : target.shape[0] if live is None else live.shape[0]].t()

    def merge(self, stats: TileStats) -> RowStats:
        """See :meth:`HeadKernels.merge`."""
        moment = None if stats.moment is None else stats.moment.contiguous()
        out = _ops.head_merge(stats.z_target, stats.top.contiguous(), stats.total.contiguous(), moment)
        return RowStats(out[0], out[1], out[2], None if moment is None else out[3])

    def tile_stats(
        self, logits: torch.Tensor, target: torch.Tensor, settings: HeadSettings, *, entropy: bool
    ) -> TileStats:
        """Statistics of logits [C, Vl] that are there already."""
        rows, width = logits.shape
        stats = logits.new_empty(3 if entropy else 2, rows, -(-width // self.tile), dtype=torch.float32)
        z_target = logits.new_zeros(rows, dtype=torch.float32)
        top, total, *rest = stats
        moment = rest[0] if rest else None
        _ops.head_stats(logits, target, *_columns(settings), z_target, top, total, moment)
        return TileStats(z_target, top, total, moment)

    def logits_grad(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        settings: HeadSettings,
        rows: RowStats,
        grad_logp: torch.Tensor,
        grad_entropy: torch.Tensor | None,
    ) -> torch.Tensor:
        """Gradient of logits [C, Vl] (before bias, cap and temperature), a new tensor of their dtype."""
        out = logits.new_empty(logits.shape)
        columns = _columns(settings)
        _ops.head_grad(logits, out, target, *columns, *_dense(rows, grad_logp, grad_entropy))
        return out
