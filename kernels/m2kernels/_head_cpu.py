"""The LM head's backend for the CPU, in C++.

csrc/cpu/head_tiles.h multiplies and measures in one go, with the chunk's rows as vector lanes, so
kept logits are [vocabulary, lanes]: their transpose goes into the GEMMs of the gradients. Logits are
float32 for bfloat16 inputs too. A new weight gradient [vocabulary, D] lends its first bytes for them:
up to D rows of logits (bfloat16: half of that) take no memory of their own, and as large a chunk saves
passes over the weight and its gradient. The gradient is then formed from its end, see `_slabs`.
csrc/cpu/head_rows.h does logits that a caller brings.
"""

from collections.abc import Iterator
from typing import Any

import torch

from m2kernels._head_kernels import HeadKernels, HeadSettings, RowStats, TileStats, Upstream
from m2kernels._live_rows import LiveRows
from m2kernels._native import CPU_ERROR, cpu_bf16_dot

_ops = torch.ops.m2kernels


_LANES = 16
_SLAB_BYTES = 16 << 20  # of logits set aside, while the weight gradient is written that they lie in


def _slabs(vocab: int, narrow: int, wide: int, step: int) -> Iterator[tuple[slice, bool]]:
    """Cut a matrix that is formed in the memory of its own factor.

    Entry v of the factor lies at v * narrow, that of the result at v * wide, narrow <= wide. From the
    end on, the result of a slab touches no entry of the factor that is still to be read, and but near
    the beginning none of its own: the first slab is the share 1 - narrow / wide of all.

    Args:
        vocab: entries.
        narrow, wide: as above.
        step: entries that may be set aside at a time.

    Yields:
        Slabs in descending order, and whether its entries of the factor must be set aside before.
    """
    end = vocab
    while end > 0:
        start = min(-(-end * narrow // wide), max(end - step, 0))
        yield slice(start, end), start * wide < end * narrow
        end = start


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
            size = weight.shape[0], _lanes(hidden)
            kept = lend.view(-1).view(torch.float32)[: size[0] * size[1]].view(size)
        elif keep:
            kept = hidden.new_empty(weight.shape[0], _lanes(hidden), dtype=torch.float32)
        _ops.head_tiles(hidden, weight, *_columns(settings), z_target, stats, kept)
        return None if kept is None else (kept, weight.dtype)

    def grad_rows(
        self, kept: Any, settings: HeadSettings, rows: RowStats, upstream: Upstream, live: LiveRows | None
    ) -> torch.Tensor:
        """See :meth:`HeadKernels.grad_rows`; a transpose, in the memory of the logits."""
        logits, dtype = kept
        part = None if live is None else live.part()
        count = len(settings.target if part is None else part)
        _ops.head_lanes(logits, dtype == torch.bfloat16, *_columns(settings), *_dense(rows, upstream), part)
        return logits.view(dtype)[:, :count].t()

    def hidden_grad(self, dz: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See :meth:`HeadKernels.hidden_grad`."""
        width = _LANES if dz.dtype == torch.float32 else 2 * _LANES
        if weight.shape[1] % width or (dz.dtype != torch.float32 and not cpu_bf16_dot()):
            return super().hidden_grad(dz, weight)
        new = dz.new_empty if weight.shape[0] else dz.new_zeros  # an empty sum is zero
        out = new(dz.shape[0], weight.shape[1], dtype=torch.float32)
        _ops.head_dx(dz.t(), weight, out)
        return out

    def weight_grad(
        self, dz: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, *, first: bool, scale: float
    ) -> None:
        """See :meth:`HeadKernels.weight_grad`."""
        if dz.data_ptr() != total.data_ptr():
            self._weight_grad(dz, hidden, total, first=first, scale=scale)
            return
        pitch, wide = dz.stride(1) * dz.element_size(), total.stride(0) * total.element_size()
        for slab, aside in _slabs(total.shape[0], pitch, wide, max(_SLAB_BYTES // pitch, 1)):
            part = dz[:, slab]
            if aside:
                part = part.t().clone(memory_format=torch.contiguous_format).t()
            self._weight_grad(part, hidden, total[slab], first=first, scale=scale)

    def _weight_grad(
        self, dz: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, *, first: bool, scale: float
    ) -> None:
        if dz.dtype == torch.float32 and total.stride(1) == 1 and hidden.shape[1] % _LANES == 0:
            _ops.head_dw(dz.t(), hidden if scale == 1.0 else hidden * scale, total, not first)
        else:
            super().weight_grad(dz, hidden, total, first=first, scale=scale)

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
