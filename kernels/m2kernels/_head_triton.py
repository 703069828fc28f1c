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
from m2kernels._head_kernels import HeadSettings, RowStats, TileStats
from m2kernels._triton import Launch, interpreting, num_programs, triton_reason

TILE: int = kernels.TILE.value
ALIGNMENT = 16  # bytes: what a tensor map asks of its base and of its row stride
MAX_VOCAB = 2**31 - 512  # column numbers are int32, also those past the end of the last block


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmConfig:
    """Shape of the forward GEMM for one dtype. The bits of the result do not depend on the last four.

    Attributes:
        block_m, block_n, block_k: tile of rows, ids and hidden dimensions.
        shift: natural-log units by which E is lifted, so that float16's subnormals come later.
        precision: of a product of float32 operands; the 16-bit ones are exact.
        group_m: row tiles that are walked together for the sake of L2.
        num_warps, num_stages: as Triton takes them.
        num_stages_keep: when E is kept: it passes through shared memory, and with one stage more
            Triton 3.6 spills two registers.
    """

    block_m: int
    block_n: int
    block_k: int
    shift: float
    precision: str
    group_m: int
    num_warps: int
    num_stages: int
    num_stages_keep: int


_HALF = GemmConfig(
    block_m=128,
    block_n=256,
    block_k=64,
    shift=0.0,
    precision="ieee",
    group_m=16,
    num_warps=8,
    num_stages=4,
    num_stages_keep=3,
)
GEMM_CONFIGS = {
    torch.bfloat16: _HALF,
    torch.float16: replace(_HALF, shift=10.0),
    torch.float32: replace(
        _HALF, block_n=128, block_k=32, precision="tf32x3", num_stages=2, num_stages_keep=2
    ),
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


def interpreter_reason(dtype: torch.dtype) -> str | None:
    """Triton's interpreter does integer arithmetic on bfloat16, silently; the tests mend it."""
    if not interpreting() or dtype != torch.bfloat16:
        return None
    from triton.runtime import interpreter

    return None if getattr(interpreter, "BF16_IS_MENDED", False) else "Triton's interpreter is wrong in bfloat16"


def unsupported_reason(hidden: Tensor | None = None, weight: Tensor | None = None) -> str | None:
    """Why Triton cannot run the head here, or on hidden [N, D] and weight [Vl, D]; None if it can."""
    if hidden is None or weight is None:
        return triton_reason(None, (9, 0))
    why = triton_reason(weight.device.type, (9, 0))
    if why is not None:
        return why
    if weight.dtype not in GEMM_CONFIGS:
        return f"weight is {weight.dtype}; the kernels take bfloat16, float16, float32"
    if not _aligned_rows(weight):
        return f"rows of weight (strides {list(weight.stride())}) do not start at multiples of {ALIGNMENT} bytes"
    if weight.shape[1] * weight.element_size() % ALIGNMENT:
        return f"dim {weight.shape[1]} is no multiple of {ALIGNMENT // weight.element_size()}"
    if weight.shape[0] > MAX_VOCAB:
        return f"{weight.shape[0]} ids; the kernels take {MAX_VOCAB}"
    return interpreter_reason(weight.dtype)


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
        None if scratch is None else describe(scratch, [config.block_m, TILE]),
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
        "num_stages": config.num_stages if scratch is None else config.num_stages_keep,
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
    args = (source, dz, row_temp, target, z_target, anchor, rows.log_norm, rows.logp)
    if grad_entropy is None:
        args = (*args, None, grad_logp, None)
    else:
        args = (*args, rows.entropy, grad_logp, grad_entropy)
    args = (*args, num_rows, cols, settings.num_valid, source.stride(0), dz.stride(0), inv_temp, settings.softcap)
    return Launch(
        kernel=kernels.head_backward_kernel, grid=_row_grid(num_rows, cols), args=args, meta=ROW_CONFIG
    )


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class TritonHead:
    """The kernels of :class:`m2kernels._head_kernels.HeadKernels`, on one device."""

    tile: int = TILE

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, settings: HeadSettings, *, entropy: bool, keep: bool
    ) -> tuple[TileStats, Any]:
        """hidden [C, D] and weight [Vl, D] of one dtype, target int [C] or -1 -> statistics, and E."""
        assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight {weight.dtype}"
        if not _aligned_rows(hidden):
            hidden = hidden.clone(memory_format=torch.contiguous_format)
        rows, cols = hidden.shape[0], weight.shape[0]
        stats = _new_statistics(hidden, rows, cols, entropy)
        scratch = None
        if keep:
            padded = triton.cdiv(cols, 64) * 64
            scratch = hidden.new_empty((rows, padded))[:, :cols]
        if rows:
            programs = num_programs(hidden.device)
            launch = forward_launch(hidden, weight, target.contiguous(), settings, stats, scratch, programs)
            launch.run(hidden.device)
        kept = None
        if scratch is not None:
            kept = KeptTiles(scratch=scratch, z_target=stats.z_target, anchor=stats.top)
        return _by_row(stats), kept

    def grad(
        self,
        kept: KeptTiles,
        target: Tensor,
        settings: HeadSettings,
        rows: RowStats,
        grad_logp: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        """Gradient of the raw logits [C, Vl], in the memory of E: `kept` serves once."""
        dense = RowStats(rows.log_norm.contiguous(), _dense(rows.entropy), rows.logp.contiguous())
        grads = grad_logp.contiguous(), _dense(grad_entropy)
        launch = grad_launch(
            kept.scratch, kept.scratch, target.contiguous(), settings, kept.z_target, kept.anchor, dense, *grads
        )
        launch.run(kept.scratch.device)
        return kept.scratch


class TritonLogits:
    """The same statistics and gradient for logits that exist already."""

    tile: int = TILE

    def forward(self, logits: Tensor, target: Tensor, settings: HeadSettings, *, entropy: bool) -> TileStats:
        """logits [C, Vl] of any float dtype up to float32, rows dense -> statistics."""
        stats = _new_statistics(logits, *logits.shape, entropy)
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
        dense = RowStats(rows.log_norm.contiguous(), _dense(rows.entropy), rows.logp.contiguous())
        grads = grad_logp.contiguous(), _dense(grad_entropy)
        launch = grad_launch(logits, out, target.contiguous(), settings, z_target, None, dense, *grads)
        launch.run(logits.device)
        return out
