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
from m2kernels._head_kernels import HeadKernels, HeadSettings, RowStats, TileStats
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
ROW_CONFIG = {"BLOCK_ROWS": 8, "TILES": 4, "num_warps": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptTiles:
    """What forward leaves for grad: E [C, Vl], rows padded to 128 bytes, and what it is relative to."""

    scratch: Tensor
    z_target: Tensor
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


def _temperature(settings: HeadSettings) -> tuple[Tensor | None, float]:
    """(per row, scalar) inverse temperature; only one of them is read."""
    if isinstance(settings.inv_temperature, Tensor):
        return settings.inv_temperature.float().contiguous(), 1.0
    return None, float(settings.inv_temperature)


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
    target: Tensor,
    settings: HeadSettings,
    stats: TileStats,
    scratch: Tensor | None,
    programs: int,
) -> Launch:
    """The launch of the forward GEMM into `stats` ([T, C]) and, when given, `scratch` [C, Vl]."""
    config = GEMM_CONFIGS[weight.dtype]
    (rows, dim), cols = hidden.shape, weight.shape[0]
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n)
    row_temp, inv_temp = _temperature(settings)

    def describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)

    args = (
        describe(hidden, [config.block_m, config.block_k]),
        describe(weight, [config.block_n, config.block_k]),
        None if scratch is None else describe(scratch, [config.block_m, TILE // 2]),
        None if settings.bias is None else settings.bias.contiguous(),
        row_temp,
        target,
        *stats,
        rows,
        cols,
        settings.num_valid,
        dim,
        inv_temp,
        settings.softcap,
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


def logits_launch(logits: Tensor, target: Tensor, settings: HeadSettings, stats: TileStats) -> Launch:
    """The launch that reduces logits [C, Vl] into `stats` ([T, C])."""
    row_temp, inv_temp = _temperature(settings)
    rows, cols = logits.shape
    args = (logits, row_temp, target, *stats, rows, cols, settings.num_valid, logits.stride(0), inv_temp)
    return Launch(
        kernel=kernels.logits_forward_kernel,
        grid=_row_grid(rows, cols),
        args=(*args, settings.softcap),
        meta=ROW_CONFIG,
    )


def grad_launch(
    source: Tensor,
    dz: Tensor,
    target: Tensor,
    settings: HeadSettings,
    z_target: Tensor,
    anchor: Tensor | None,
    rows: RowStats,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> Launch:
    """The launch that turns E (or, without `anchor`, logits) into the gradient of the raw logits."""
    row_temp, inv_temp = _temperature(settings)
    num_rows, cols = source.shape
    args: tuple[Any, ...] = (source, dz, row_temp, target, z_target, anchor, rows.log_norm, rows.log_norm_low, rows.logp)
    if grad_entropy is None:
        args = (*args, None, grad_logp, None)
    else:
        args = (*args, rows.entropy, grad_logp, grad_entropy)
    args = (*args, num_rows, cols, settings.num_valid, source.stride(0), dz.stride(0), inv_temp, settings.softcap)
    return Launch(kernel=kernels.head_backward_kernel, grid=_row_grid(num_rows, cols), args=args, meta=ROW_CONFIG)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _dense_rows(rows: RowStats) -> RowStats:
    dense = (rows.log_norm.contiguous(), rows.log_norm_low.contiguous(), rows.logp.contiguous())
    return RowStats(*dense, _dense(rows.entropy))


class TritonHead(HeadKernels):
    """Backend ``triton``. Its forward is invariant always; there is no faster mode."""

    tile: int = TILE
    row_step: int = _HALF.block_m

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, settings: HeadSettings, *, entropy: bool, keep: bool
    ) -> tuple[TileStats, Any]:
        """See :meth:`HeadKernels.forward`; the scratch is E with its anchors."""
        assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight {weight.dtype}"
        rows, cols = hidden.shape[0], weight.shape[0]
        stats = _new_statistics(hidden, rows, cols, entropy)
        scratch = None
        if keep:
            scratch = hidden.new_empty((rows, triton.cdiv(cols, 64) * 64))[:, :cols]
        if rows and cols:
            hidden, weight, target = _mappable(hidden), _mappable(weight), target.contiguous()
            programs = num_programs(hidden.device)
            forward_launch(hidden, weight, target, settings, stats, scratch, programs).run(hidden.device)
        if scratch is None:
            return _by_row(stats), None
        return _by_row(stats), KeptTiles(scratch=scratch, z_target=stats.z_target, anchor=stats.top)

    def grad(
        self,
        kept: KeptTiles,
        target: Tensor,
        settings: HeadSettings,
        rows: RowStats,
        grad_logp: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        """See :meth:`HeadKernels.grad`; the result lies in the memory of E."""
        e, grads = kept.scratch, (grad_logp.contiguous(), _dense(grad_entropy))
        launch = grad_launch(
            e, e, target.contiguous(), settings, kept.z_target, kept.anchor, _dense_rows(rows), *grads
        )
        launch.run(e.device)
        return e


class TritonLogits:
    """The same statistics and gradient for logits that exist already."""

    tile: int = TILE

    def forward(self, logits: Tensor, target: Tensor, settings: HeadSettings, *, entropy: bool) -> TileStats:
        """logits [C, Vl] of any float dtype up to float32, rows dense -> statistics."""
        assert settings.bias is None, "logits hold their bias already"
        rows, cols = logits.shape
        stats = _new_statistics(logits, rows, cols, entropy)
        logits_launch(logits, target.contiguous(), settings, stats).run(logits.device)
        return _by_row(stats)

    def grad(
        self,
        logits: Tensor,
        target: Tensor,
        settings: HeadSettings,
        z_target: Tensor,
        rows: RowStats,
        grad_logp: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Gradient of the logits, into `out` (the logits themselves: in place) or a new tensor."""
        out = torch.empty_like(logits) if out is None else out
        grads = (grad_logp.contiguous(), _dense(grad_entropy))
        launch = grad_launch(logits, out, target.contiguous(), settings, z_target, None, _dense_rows(rows), *grads)
        launch.run(logits.device)
        return out
