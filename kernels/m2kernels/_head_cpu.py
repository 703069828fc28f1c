"""The LM head's backend for the CPU: torch's GEMM, C++ row kernels (csrc/cpu/head_rows.h).

The forward multiplies panels of PANEL rows by blocks of BLOCK vocabulary entries, both padded to
full size, so that a logit is the same to the bit whatever else is in the batch or the shard; the
statistics read each block while it is in the cache.
"""

from typing import Any

import torch

from m2kernels._head_kernels import HeadKernels, HeadSettings, RowStats, TileStats

PANEL = 64
"""Rows of a GEMM call of the invariant forward."""
BLOCK = 1024
"""Vocabulary entries of one; a multiple of the tile."""

_ops = torch.ops.m2kernels


def _columns(settings: HeadSettings, start: int, width: int) -> tuple[Any, ...]:
    """The settings of columns [start, start + width) as arguments of the ops."""
    inverse = settings.inv_temperature
    per_row = inverse if isinstance(inverse, torch.Tensor) else None
    bias = None if settings.bias is None else settings.bias[start : start + width].float()
    scalar = 1.0 if isinstance(inverse, torch.Tensor) else inverse
    valid = min(max(settings.num_valid - start, 0), width)
    return bias, per_row, scalar, settings.softcap or 0.0, valid


def _rows(settings: HeadSettings, part: slice) -> HeadSettings:
    """The settings of some rows of the chunk."""
    inverse = settings.inv_temperature
    if not isinstance(inverse, torch.Tensor):
        return settings
    return HeadSettings(
        bias=settings.bias, inv_temperature=inverse[part], softcap=settings.softcap, num_valid=settings.num_valid
    )


class CpuHead(HeadKernels):
    """Backend ``cpu``."""

    tile = 128
    row_step = PANEL

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
        """See :meth:`HeadKernels.forward`; the scratch is the logits."""
        rows, width = hidden.shape[0], weight.shape[0]
        stats = self._new_stats(rows, width, entropy)
        kept = hidden.new_empty(rows, width) if keep else None
        scratch = hidden.new_empty(PANEL, BLOCK)
        panel = hidden.new_zeros(PANEL, hidden.shape[1])
        for top in range(0, rows, PANEL):
            part = slice(top, min(top + PANEL, rows))
            count = part.stop - top
            whole = hidden[part]
            if count < PANEL:
                panel[:count] = whole
                whole = panel
            for start in range(0, width, BLOCK):
                stop = min(start + BLOCK, width)
                self._block(whole, weight, start, scratch)
                logits = scratch[:count, : stop - start]
                if kept is not None:
                    kept[part, start:stop] = logits
                self._measure(logits, target[part], _rows(settings, part), start, stats, part)
        return stats, kept

    def _block(self, panel: torch.Tensor, weight: torch.Tensor, start: int, out: torch.Tensor) -> None:
        """One GEMM of full size; the columns past the weight's end are filler."""
        block = weight[start : start + BLOCK]
        if block.shape[0] < BLOCK:
            padded = weight.new_zeros(BLOCK, weight.shape[1])
            padded[: block.shape[0]] = block
            block = padded
        torch.mm(panel, block.t(), out=out)

    def _new_stats(self, rows: int, width: int, entropy: bool) -> TileStats:
        tiles = -(-width // self.tile)
        new = torch.empty(3 if entropy else 2, rows, tiles, dtype=torch.float32, device="cpu")
        z_target = torch.zeros(rows, dtype=torch.float32, device="cpu")
        return TileStats(z_target, new[0], new[1], new[2] if entropy else None)

    def _measure(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        settings: HeadSettings,
        start: int,
        stats: TileStats,
        part: slice,
    ) -> None:
        """Statistics of logits [C, W], columns from `start`, rows `part`."""
        width = logits.shape[1]
        tiles = slice(start // self.tile, -(-(start + width) // self.tile))
        _ops.head_stats(
            logits,
            target - start,
            *_columns(settings, start, width),
            stats.z_target[part],
            stats.top[part, tiles],
            stats.total[part, tiles],
            None if stats.moment is None else stats.moment[part, tiles],
        )

    def recompute(
        self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, settings: HeadSettings
    ) -> Any:
        """See :meth:`HeadKernels.recompute`: one GEMM."""
        return torch.mm(hidden, weight.t())

    def grad(
        self,
        kept: Any,
        target: torch.Tensor,
        settings: HeadSettings,
        rows: RowStats,
        grad_logp: torch.Tensor,
        grad_entropy: torch.Tensor | None,
    ) -> torch.Tensor:
        """See :meth:`HeadKernels.grad`; in place."""
        return self._grad(kept, kept, target, settings, rows, grad_logp, grad_entropy)

    def merge(self, stats: TileStats) -> RowStats:
        """See :meth:`HeadKernels.merge`."""
        moment = None if stats.moment is None else stats.moment.contiguous()
        out = _ops.head_merge(stats.z_target, stats.top.contiguous(), stats.total.contiguous(), moment)
        return RowStats(out[0], out[1], out[2], None if moment is None else out[3])

    def tile_stats(
        self, logits: torch.Tensor, target: torch.Tensor, settings: HeadSettings, *, entropy: bool
    ) -> TileStats:
        """Statistics of logits [C, Vl] that are there already."""
        stats = self._new_stats(logits.shape[0], logits.shape[1], entropy)
        self._measure(logits, target, settings, 0, stats, slice(0, logits.shape[0]))
        return stats

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
        return self._grad(logits, logits.new_empty(logits.shape), target, settings, rows, grad_logp, grad_entropy)

    def _grad(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        target: torch.Tensor,
        settings: HeadSettings,
        rows: RowStats,
        grad_logp: torch.Tensor,
        grad_entropy: torch.Tensor | None,
    ) -> torch.Tensor:
        stats = rows.log_norm, rows.log_norm_low, rows.logp, rows.entropy
        columns = _columns(settings, 0, logits.shape[1])
        dense = [None if x is None else x.contiguous() for x in (*stats, grad_logp, grad_entropy)]
        _ops.head_grad(logits, out, target, *columns, *dense)
        return out
