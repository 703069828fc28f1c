"""The LM head on Hopper by Triton: launches, tile shapes, and what they cannot run.

Forward: one persistent GEMM over tiles of logits that never leave the registers; its epilogue
reduces them per row and per tile of 128 ids and, when a gradient will follow, stores
E = exp(z - anchor) in the weight's dtype (a relative precision: in [0, 1], no cancellation).
Backward: one pass that turns E into d loss / d logits in place. The GEMMs for dX and dW are the
driver's. 2 C V D flops and, with E, 2 C V bytes written; the pass reads and writes 2 C V each.

A row's statistics do not depend on the other rows: one tile shape per dtype, one K order, no
split-K, no atomics. Nothing here has been timed: no GPU was at hand.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from m2kernels import _head_triton_kernels as kernels
from m2kernels._head_kernels import HeadKernels, HeadSettings, RowStats, TileStats, Upstream
from m2kernels._triton import ALIGNMENT, Launch, num_programs

TILE: int = kernels.TILE.value


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmConfig:
    """Shape of the forward GEMM for one dtype. The bits of the result do not depend on the last three.

    Attributes:
        block_m, block_n, block_k: tile of rows, ids and hidden dimensions.
        shift: natural-log units by which E is lifted, so that float16's subnormals come later.
        precision: of a product of float32 operands; the 16-bit ones are exact.
        group_m: row tiles that are walked together for the sake of L2.
        num_warps, num_stages: as Triton takes them.
    """

    block_m: int
    block_n: int
    block_k: int
    shift: float
    precision: str
    group_m: int
    num_warps: int
    num_stages: int


_HALF = GemmConfig(
    block_m=128,
    block_n=256,
    block_k=64,
    shift=0.0,
    precision="ieee",
    group_m=16,
    num_warps=8,
    num_stages=4,
)
GEMM_CONFIGS = {
    torch.bfloat16: _HALF,
    torch.float16: replace(_HALF, shift=10.0),
    torch.float32: replace(_HALF, block_n=128, block_k=32, precision="tf32x3", num_stages=2),
}
FAR = 600.0
"""z this far above the target's become the anchor of the merge; as in merge_tiles."""
MERGE_CONFIG = {"BLOCK_ROWS": 16, "BLOCK_TILES": 64, "num_warps": 4}
ROW_CONFIG = {"BLOCK_ROWS": 8, "TILES": 4, "num_warps": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptTiles:
    """What forward leaves for grad: E [C, Vl], rows padded to 128 bytes, and what it is relative to."""

    scratch: Tensor
    anchor: Tensor  # [T, C]


def _aligned_rows(matrix: Tensor) -> bool:
    """Can a tensor map describe this matrix as it lies?"""
    if matrix.stride(1) != 1 or matrix.stride(0) * matrix.element_size() % ALIGNMENT:
        return False
    return matrix.is_meta or matrix.data_ptr() % ALIGNMENT == 0


def _mappable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy that a tensor map can describe; its rows are whole multiples of 16 bytes."""
    assert matrix.shape[1] * matrix.element_size() % ALIGNMENT == 0, f"{matrix.shape[1]} columns of {matrix.dtype}"
    return matrix if _aligned_rows(matrix) else matrix.clone(memory_format=torch.contiguous_format)


def _scaling(settings: HeadSettings) -> tuple[Tensor | None, float, float | None]:
    """Inverse temperature per row, or (None, scalar), and the cap."""
    softcap = None if settings.softcap is None else float(settings.softcap)
    if isinstance(settings.inv_temperature, Tensor):
        return settings.inv_temperature.float().contiguous(), 1.0, softcap
    return None, float(settings.inv_temperature), softcap


def _new_statistics(like: Tensor, rows: int, cols: int, entropy: bool) -> TileStats:
    """Buffers of the tile statistics, [T, C] each; z_target is 0 where no tile writes it."""
    sums = like.new_empty((3 if entropy else 2, triton.cdiv(cols, TILE), rows), dtype=torch.float32)
    z_target = like.new_zeros(rows, dtype=torch.float32)
    return TileStats(z_target, sums[0], sums[1], sums[2] if entropy else None)


def _by_row(stats: TileStats) -> TileStats:
    """The same as views [C, T], as the driver takes them."""
    moment = None if stats.moment is None else stats.moment.t()
    return TileStats(stats.z_target, stats.top.t(), stats.total.t(), moment)


def forward_launch(
    hidden: Tensor,
    weight: Tensor,
    settings: HeadSettings,
    stats: TileStats,
    scratch: Tensor | None,
    programs: int,
) -> Launch:
    """The launch of the forward GEMM into `stats` ([T, C]) and, when given, `scratch` [C, Vl]."""
    config = GEMM_CONFIGS[weight.dtype]
    (rows, dim), cols = hidden.shape, weight.shape[0]
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n)
    row_temp, inv_temp, softcap = _scaling(settings)

    def describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)

    args = (
        describe(hidden, [config.block_m, config.block_k]),
        describe(weight, [config.block_n, config.block_k]),
        None if scratch is None else describe(scratch, [config.block_m, TILE // 2]),
        None if settings.bias is None else settings.bias.contiguous(),
        row_temp,
        settings.target.contiguous(),
        *stats,
        rows,
        cols,
        settings.num_valid,
        dim,
        inv_temp,
        softcap,
    )
    meta = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "SHIFT": config.shift,
        "PRECISION": config.precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Launch(kernel=kernels.head_forward_kernel, grid=(min(programs, tiles),), args=args, meta=meta)


def _row_grid(rows: int, cols: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROW_CONFIG["BLOCK_ROWS"]), triton.cdiv(cols, ROW_CONFIG["TILES"] * TILE)


def logits_launch(logits: Tensor, settings: HeadSettings, stats: TileStats) -> Launch:
    """The launch that reduces logits [C, Vl] into `stats` ([T, C])."""
    row_temp, inv_temp, softcap = _scaling(settings)
    rows, cols = logits.shape
    target = settings.target.contiguous()
    args = (logits, row_temp, target, *stats, rows, cols, settings.num_valid, logits.stride(0), inv_temp)
    return Launch(
        kernel=kernels.logits_forward_kernel,
        grid=_row_grid(rows, cols),
        args=(*args, softcap),
        meta=ROW_CONFIG,
    )


def grad_launch(
    source: Tensor, dz: Tensor, settings: HeadSettings, anchor: Tensor | None, rows: RowStats, upstream: Upstream
) -> Launch:
    """The launch that turns E (or, without `anchor`, logits) into the gradient of the raw logits."""
    row_temp, inv_temp, softcap = _scaling(settings)
    num_rows, cols = source.shape
    if upstream.entropy is None:
        rows = rows._replace(entropy=None)
    args = (
        *(source, dz, row_temp, settings.target.contiguous(), anchor),
        *(_dense(x) for x in (*rows, *upstream)),
        *(num_rows, cols, settings.num_valid, source.stride(0), dz.stride(0), inv_temp, softcap),
    )
    return Launch(kernel=kernels.head_backward_kernel, grid=_row_grid(num_rows, cols), args=args, meta=ROW_CONFIG)


def merge_launch(stats: TileStats, out: Tensor) -> Launch:
    """The launch that turns tiles (fields [C, T], as :func:`_by_tiles` lays them) into rows: out f32 [4, C]."""
    assert all(x is None or x.t().is_contiguous() for x in stats[1:])
    rows, tiles = stats.top.shape
    args = (stats.z_target, stats.top, stats.total, stats.moment, out, rows, tiles, *stats.top.stride())
    meta = {"FAR": FAR, **MERGE_CONFIG}
    grid = (triton.cdiv(rows, MERGE_CONFIG["BLOCK_ROWS"]),)
    return Launch(kernel=kernels.head_merge_kernel, grid=grid, args=args, meta=meta)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _by_tiles(x: Tensor | None) -> Tensor | None:
    """[C, T] with a tile's rows side by side, as the forward writes it.

    The order of a sum over tiles follows from the layout, so tiles that ranks gathered get this one: the bits are
    those of one rank. (Row by row the merge without entropy also spills registers.)
    """
    return x if x is None or x.t().is_contiguous() else x.t().contiguous().t()


class TritonHead(HeadKernels):
    """Backend ``triton``. Its forward is invariant always; there is no faster mode.

    Tiles are fixed for the tensor cores' sake anyway, so all that invariance gives up is what a GPU might win for few
    rows by splitting K or by another shape: nobody has measured that here.
    """

    tile: int = TILE
    row_step: int = _HALF.block_m

    def prepare(self, weight: Tensor) -> Tensor:
        """See :meth:`HeadKernels.prepare`: a tensor map's alignment too."""
        return _mappable(weight)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        settings: HeadSettings,
        *,
        entropy: bool,
        keep: bool,
        lend: Tensor | None = None,
    ) -> tuple[TileStats, Any]:
        """See :meth:`HeadKernels.forward`; the scratch is E with its anchors."""
        assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight {weight.dtype}"
        rows, cols = hidden.shape[0], weight.shape[0]
        stats = _new_statistics(hidden, rows, cols, entropy)
        scratch = None
        if keep:
            scratch = hidden.new_empty((rows, triton.cdiv(cols, 64) * 64))[:, :cols]
        if rows and cols:
            hidden = _mappable(hidden)
            programs = num_programs(hidden.device)
            forward_launch(hidden, weight, settings, stats, scratch, programs).run(hidden.device)
        if scratch is None:
            return _by_row(stats), None
        return _by_row(stats), KeptTiles(scratch=scratch, anchor=stats.top)

    def grad(self, kept: KeptTiles, settings: HeadSettings, rows: RowStats, upstream: Upstream) -> Tensor:
        """See :meth:`HeadKernels.grad`; the result lies in the memory of E."""
        e = kept.scratch
        grad_launch(e, e, settings, kept.anchor, rows, upstream).run(e.device)
        return e

    def tile_stats(self, logits: Tensor, settings: HeadSettings, *, entropy: bool) -> TileStats:
        """Statistics of logits [C, Vl], rows dense, that are there already: one pass over them."""
        assert settings.bias is None, "logits hold their bias already"
        rows, cols = logits.shape
        stats = _new_statistics(logits, rows, cols, entropy)
        logits_launch(logits, settings, stats).run(logits.device)
        return _by_row(stats)

    def logits_grad(self, logits: Tensor, settings: HeadSettings, rows: RowStats, upstream: Upstream) -> Tensor:
        """Gradient of logits [C, Vl], a new dense tensor of their dtype: one pass."""
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        grad_launch(logits, out, settings, None, rows, upstream).run(logits.device)
        return out

    def merge(self, stats: TileStats) -> RowStats:
        """See :meth:`HeadKernels.merge`: one launch; without ranks nothing of the size of the tiles is made."""
        stats = TileStats(stats.z_target, *(_by_tiles(x) for x in stats[1:]))  # type: ignore[arg-type]
        out = stats.top.new_empty(4, stats.top.shape[0])
        merge_launch(stats, out).run(out.device)
        return RowStats(out[0], out[1], out[2], None if stats.moment is None else out[3])
