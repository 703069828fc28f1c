"""Tree attention on Hopper by Triton: launches, tile shapes, and the autograd function.

Forward: the FlashAttention-2 recurrence (Dao, arXiv 2307.08691) in base 2, one program a query tile and head. It
walks the planner's list: the diagonal and the other partial tiles with the mask j <= i < subtree_end[j], worked out
from one integer a key, then the full tiles without any. Programs start longest first, some heads at a time so that
their keys stay in L2. 4 D flops a pair and head in the tiles; every tile reads 2 D elements a key from L2.

Backward, deterministic (the default): delta = rowsum(out * d_out); dq over the forward's list, one program a query
tile and head; dk and dv, one program a KV tile and KV head, over the heads of the group times one contiguous range of
queries, which is all that the smallest and largest subtree_end of the tile allow. KV tiles that very many rows see (a
prompt's) are split; their parts are added in a fixed order. No atomics; 14 D flops a pair, two of the seven products
being done twice. `deterministic=False`: the dk/dv pass also adds dq up in float32 by atomics, 10 D flops a pair.

Nothing here has been timed: no GPU was at hand.
"""

from dataclasses import dataclass, replace
from math import log, log2
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from m2kernels import _tree_attention_triton_kernels as kernels
from m2kernels._triton import ALIGNMENT, Launch, num_programs
from m2kernels.plan_tree import BackwardUnits, TreePlan, TreeTiles

L2_KEYS = 32 << 20
"""Bytes of K and V that a wave of heads may have: most of what an H100 keeps in L2, the rest being queries'."""
UNITS_PER_PROGRAM = 4
"""A unit of the dK/dV pass is at most its share of the work if each SM had this many."""
MIN_UNIT = 4
"""Tiles below which a KV block is not split: a part costs a float32 tile written and read."""
DELTA_CONFIG = {"BLOCK_M": 32, "num_warps": 4}
REDUCE_CONFIG = {"ROWS": 16, "num_warps": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class PassConfig:
    """Shape of one pass.

    Attributes:
        block_m: rows of a tile of queries.
        block_n: keys of a tile.
        num_warps, num_stages: as Triton takes them.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeConfig:
    """The three passes; `fused` is the dk/dv pass that adds up dq too."""

    forward: PassConfig
    dq: PassConfig
    dkdv: PassConfig
    fused: PassConfig


def tree_config(dtype: torch.dtype, dim: int, tiles: TreeTiles) -> TreeConfig:
    """Tile shapes for a dtype and head_dim (64 | 128), within the plan's blocks; none spills, see the sm_90 gate.

    A warp group (4 warps) takes 64 rows of a product. In 16 bits 8 warps hold a tile of 128 stationary rows; 64
    moving ones, or both gradients and both score tiles of the backward would not fit the registers, and with dq as a
    third gradient only 64 stationary ones at head_dim 128. float32 products are made without tensor cores, to full
    precision; a thread holds whole rows of their operands, hence the small tiles.
    """
    block, kv_block = tiles.block, tiles.kv_block
    if dtype == torch.float32:
        size = 32 if dim == 64 else 16
        small = PassConfig(block_m=min(block, size), block_n=min(kv_block, size), num_warps=8, num_stages=1)
        return TreeConfig(forward=small, dq=small, dkdv=small, fused=small)
    wide = PassConfig(block_m=block, block_n=kv_block, num_warps=8 if block >= 128 else 4, num_stages=3)
    narrow = replace(wide, block_n=min(kv_block, 64))
    dkdv = replace(wide, block_m=min(block, 64), block_n=block, num_stages=2)
    fused = replace(dkdv, block_n=min(block, 64), num_warps=8) if dim == 128 else dkdv
    return TreeConfig(forward=wide, dq=narrow, dkdv=dkdv, fused=fused)


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeShape:
    """What the launches of one call have in common."""

    tiles: TreeTiles
    subtree_end: Tensor
    heads: int
    kv_heads: int
    dim: int
    scale: float
    config: TreeConfig

    @classmethod
    def of(cls, q: Tensor, k: Tensor, plan: TreePlan, scale: float) -> "TreeShape":
        """Of q [N, Hq, D] and k [N, Hkv, D]."""
        dim = q.shape[2]
        return cls(
            tiles=plan.tiles,
            subtree_end=plan.subtree_end,
            heads=q.shape[1],
            kv_heads=k.shape[1],
            dim=dim,
            scale=scale,
            config=tree_config(q.dtype, dim, plan.tiles),
        )

    @property
    def num_rows(self) -> int:
        """Of the plan; a tensor may have more, which are padding."""
        return self.subtree_end.shape[0]

    @property
    def stride(self) -> int:
        """Between the heads of a row statistic [heads, rows]: whole 64 bytes."""
        return -(-self.num_rows // 16) * 16

    @property
    def scale_log2(self) -> float:
        """Of the scores, in base 2."""
        return self.scale * log2(2.718281828459045)

    def wave(self, itemsize: int) -> int:
        """KV heads that run together, a divisor of all: their keys share L2."""
        fit = L2_KEYS // max(1, 2 * self.num_rows * self.dim * itemsize)
        return max(n for n in range(1, self.kv_heads + 1) if self.kv_heads % n == 0 and n <= max(1, fit))

    def describe(self, x: Tensor, rows: int) -> TensorDescriptor:
        """Tiles of `rows` rows of one head. It ends at the plan's last row: padding reads as 0, is not written."""
        return TensorDescriptor(x, [self.num_rows, *x.shape[1:]], _strides(x), [rows, 1, self.dim])

    def listed(self, k: Tensor) -> tuple[Any, ...]:
        """What the passes over query tiles take alike: the planner's lists, and sizes."""
        tiles = self.tiles
        lists = (tiles.forward_order, tiles.forward_start, tiles.forward_full, tiles.forward_kv)
        wave = self.wave(k.element_size()) * (self.heads // self.kv_heads)
        return (self.subtree_end, *lists, self.num_rows, len(tiles.min_end), self.stride, wave)

    def query_grid(self, config: PassConfig) -> tuple[int]:
        """One program a query tile and head."""
        return (len(self.tiles.min_end) * (self.tiles.block // config.block_m) * self.heads,)

    def meta(self, config: PassConfig) -> dict[str, Any]:
        """Compile-time arguments that all three passes take."""
        return {
            "GROUP": self.heads // self.kv_heads,
            "DIM": self.dim,
            "BLOCK": self.tiles.block,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "PRECISION": "ieee",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }


def _strides(x: Tensor) -> list[int]:
    """Of [rows, heads, D]; that of an axis of length 1, which may be anything, as if dense."""
    head = x.stride(1) if x.shape[1] > 1 else x.shape[2]
    return [x.stride(0) if x.shape[0] > 1 else x.shape[1] * head, head, 1]


def _mappable(x: Tensor) -> Tensor:
    """The tensor, or a dense copy: a tensor map asks for 16 bytes of its base and strides, and D side by side."""
    row, head, _ = (stride * x.element_size() for stride in _strides(x))
    good = x.stride(2) == 1 and row > 0 and head > 0 and not row % ALIGNMENT and not head % ALIGNMENT
    if good and (x.is_meta or x.data_ptr() % ALIGNMENT == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def forward_launch(shape: TreeShape, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """The launch into out [N, Hq, D] and lse f32 [Hq, shape.stride], base 2."""
    config = shape.config.forward
    args = (
        shape.describe(q, config.block_m),
        shape.describe(k, config.block_n),
        shape.describe(v, config.block_n),
        shape.describe(out, config.block_m),
        lse,
        *shape.listed(k),
        shape.scale_log2,
    )
    meta = shape.meta(config) | {"KV_BLOCK": shape.tiles.kv_block}
    return Launch(kernel=kernels.tree_forward_kernel, grid=shape.query_grid(config), args=args, meta=meta)


def delta_launch(shape: TreeShape, out: Tensor, d_out: Tensor, delta: Tensor) -> Launch:
    """The launch into delta f32 [Hq, shape.stride]; out is dense."""
    args = (out, d_out, delta, shape.num_rows, shape.stride, *_strides(d_out)[:2])
    meta = {"HEADS": shape.heads, "DIM": shape.dim, **DELTA_CONFIG}
    grid = (triton.cdiv(shape.num_rows, DELTA_CONFIG["BLOCK_M"]), shape.heads)
    return Launch(kernel=kernels.tree_delta_kernel, grid=grid, args=args, meta=meta)


def dq_launch(
    shape: TreeShape, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, dq: Tensor, lse: Tensor, delta: Tensor
) -> Launch:
    """The launch into dq [N, Hq, D]."""
    config = shape.config.dq
    args = (
        shape.describe(q, config.block_m),
        shape.describe(k, config.block_n),
        shape.describe(v, config.block_n),
        shape.describe(d_out, config.block_m),
        shape.describe(dq, config.block_m),
        lse,
        delta,
        *shape.listed(k),
        shape.scale,
        shape.scale_log2,
    )
    meta = shape.meta(config) | {"KV_BLOCK": shape.tiles.kv_block, "RELOAD": q.dtype == torch.float32}
    return Launch(kernel=kernels.tree_dq_kernel, grid=shape.query_grid(config), args=args, meta=meta)


def dkdv_launch(
    shape: TreeShape,
    units: BackwardUnits,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    dk: Tensor,
    dv: Tensor,
    partial: Tensor,
    dq_sum: Tensor | None,
    lse: Tensor,
    delta: Tensor,
) -> Launch:
    """The launch into dk, dv [N, Hkv, D], `partial` f32 [slots, Hkv, 2, block, D] and, when given, dq_sum f32."""
    config, tiles = (shape.config.dkdv if dq_sum is None else shape.config.fused), shape.tiles
    args = (
        shape.describe(q, config.block_m),
        k,
        v,
        shape.describe(d_out, config.block_m),
        *(shape.describe(x, config.block_n) for x in (dk, dv)),
        partial,
        dq_sum,
        lse,
        delta,
        shape.subtree_end,
        units.units,
        tiles.min_end,
        tiles.max_end,
        shape.num_rows,
        len(units.units),
        shape.stride,
        shape.wave(k.element_size()),
        *_strides(k)[:2],
        *_strides(v)[:2],
        shape.scale,
        shape.scale_log2,
    )
    meta = shape.meta(config) | {"KV_HEADS": shape.kv_heads}
    grid = (len(units.units) * (tiles.block // config.block_n) * shape.kv_heads,)
    return Launch(kernel=kernels.tree_dkdv_kernel, grid=grid, args=args, meta=meta)


def reduce_launch(shape: TreeShape, units: BackwardUnits, partial: Tensor, dk: Tensor, dv: Tensor) -> Launch:
    """The launch that adds the parts of split KV blocks up into dk and dv, which are dense."""
    block = shape.tiles.block
    args = (partial, dk, dv, units.splits, shape.num_rows)
    meta = {"KV_HEADS": shape.kv_heads, "DIM": shape.dim, "BLOCK": block, **REDUCE_CONFIG}
    grid = (len(units.splits), shape.kv_heads, block // REDUCE_CONFIG["ROWS"])
    return Launch(kernel=kernels.tree_reduce_kernel, grid=grid, args=args, meta=meta)


def backward_units(plan: TreePlan, kv_heads: int, programs: int) -> BackwardUnits:
    """The plan's dK/dV work for so many KV heads and programs at a time; cut once, kept for all layers."""
    key = f"triton_units_{kv_heads}_{programs}"
    units = plan.derived.get(key)
    if units is None:
        fair = -(-plan.tiles.num_backward_tiles * kv_heads // (UNITS_PER_PROGRAM * programs))
        units = plan.derived[key] = plan.tiles.backward_units(max(MIN_UNIT, fair))
    assert isinstance(units, BackwardUnits)
    return units


class TritonTreeAttention(torch.autograd.Function):
    """`(q, k, v, plan, scale > 0, deterministic) -> (out, lse f32 [Hq, stride] in base 2, no gradient)`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_mappable(x) for x in (q, k, v))
        shape = TreeShape.of(q, k, plan, scale)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        out[shape.num_rows :] = 0
        lse = q.new_empty((shape.heads, shape.stride), dtype=torch.float32)
        forward_launch(shape, q, k, v, out, lse).run(q.device)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.shape, ctx.deterministic = plan, shape, deterministic
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        shape, plan = ctx.shape, ctx.plan
        d_out = _mappable(d_out)
        delta = torch.empty_like(lse)
        delta_launch(shape, out, d_out, delta).run(q.device)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for grad in (dq, dk, dv):
            grad[shape.num_rows :] = 0
        units = backward_units(plan, shape.kv_heads, num_programs(q.device))
        dq_sum = None
        # One slot at least: without the buffer it would be another kernel, compiled in mid-run.
        sizes = (max(units.num_slots, 1), shape.kv_heads, 2, shape.tiles.block, shape.dim)
        partial = q.new_empty(sizes, dtype=torch.float32)
        if not ctx.deterministic:
            dq_sum = q.new_zeros((shape.num_rows, *q.shape[1:]), dtype=torch.float32)
        dkdv_launch(shape, units, q, k, v, d_out, dk, dv, partial, dq_sum, lse, delta).run(q.device)
        if units.num_slots:
            reduce_launch(shape, units, partial, dk, dv).run(q.device)
        if dq_sum is None:
            dq_launch(shape, q, k, v, d_out, dq, lse, delta).run(q.device)
        else:
            torch.mul(dq_sum, shape.scale, out=dq[: shape.num_rows])
        return dq, dk, dv, None, None, None


def triton_tree_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, scale: float, deterministic: bool, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """See :func:`m2kernels.tree_attention`: out and, if wanted, the natural log-sum-exp f32 [N, Hq]."""
    if plan.tokens.device != q.device:
        raise ValueError(
            f"tree_attention: the plan is on {plan.tokens.device}, q on {q.device}; move it once for all layers: "
            "plan = plan.to(q.device)"
        )
    out, low = TritonTreeAttention.apply(q, k, v, plan, scale, deterministic)
    if not want_lse:
        return out, None
    lse = low.new_zeros(q.shape[0], q.shape[1])
    torch.mul(low[:, : plan.num_rows].t(), log(2.0), out=lse[: plan.num_rows])
    return out, lse
