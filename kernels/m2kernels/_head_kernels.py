"""What a backend of the LM head offers to its driver (:mod:`m2kernels._head`).

A backend turns a chunk of rows into statistics of fixed vocabulary tiles, and later the same chunk
into the gradient of its logits. Everything else is the driver's and shared by all backends: rows,
chunks, tensor parallelism, the merge of the tiles, the GEMMs of the gradients.

    raw = hidden @ weight.T + bias
    z = softcap(raw) * inv_temperature,  softcap(x) = cap tanh(x / cap)
    dlogp / dz = onehot - p,  dentropy / dz = -p (z - log_norm + entropy),  p = exp(z - log_norm)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from m2kernels._live_rows import LiveRows

_GRAD_BLOCK_BYTES = 32 << 20  # of a low-precision product on its way into a float32 sum
_DEPTH_BLOCK = 2048  # vocabulary entries summed in one GEMM


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSettings:
    """What the kernels need to know about the rows of a chunk and this shard of the vocabulary.

    Attributes:
        target: int64 [C], local column, or -1 where another rank holds it.
        bias: [Vl] of any float dtype, or None.
        inv_temperature: scalar, or f32[C] for the rows of the chunk.
        softcap: None or over 0; applied before the temperature.
        num_valid: columns from here on are padding and get no mass.
    """

    target: torch.Tensor
    bias: torch.Tensor | None
    inv_temperature: float | torch.Tensor
    softcap: float | None
    num_valid: int


class TileStats(NamedTuple):
    """Per row and vocabulary tile, the TARGET'S COLUMN LEFT OUT of top, total and moment.

    Leaving it out is what keeps log-probs near 0 exact: they become -log1p(total of the others).

    Attributes:
        z_target: f32[C], z of the target; any value where another rank holds it.
        top: f32[C,T], the tile's anchor: its largest z; -inf for a tile without a column.
        total: f32[C,T], sum of exp(z - top).
        moment: f32[C,T], sum of (z - top) exp(z - top); None when no entropy is wanted.
    """

    z_target: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor
    moment: torch.Tensor | None


class RowStats(NamedTuple):
    """Per row, over the whole vocabulary: what the gradient needs.

    log_norm + log_norm_low is the log-sum-exp to twice fp32's precision: with logits that share a
    large offset, exp((z - log_norm) - log_norm_low) is as exact as without it.

    Attributes:
        log_norm: f32[C].
        log_norm_low: f32[C], what rounding took from log_norm.
        logp: f32[C], of the target.
        entropy: f32[C], or None.
    """

    log_norm: torch.Tensor
    log_norm_low: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor | None


class Upstream(NamedTuple):
    """Gradients of the loss in the results of a chunk.

    Attributes:
        logp: f32[C].
        entropy: f32[C], or None; then RowStats.entropy is not needed.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None = None


class HeadKernels:
    """Base of the backends. `forward`, and `grad` or `grad_rows`, must be there; the rest has a default.

    Attributes:
        tile: width of a vocabulary tile. Results are the same to the bit for every tensor-parallel
            degree whose shards begin at multiples of it.
        row_step: chunks are multiples of this many rows, as far as the rows allow.
    """

    tile: int
    row_step: int = 1

    def prepare(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [Vl, D], or a copy whose layout the kernels can read: once a call, not once a chunk."""
        return weight if weight.stride(1) == 1 or weight.shape[1] == 1 else weight.contiguous()

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
        """Statistics of a chunk.

        Args:
            hidden: [C, D], of the weight's dtype; C is at least 1.
            weight: [Vl, D] of :meth:`prepare`; Vl may be 0.
            settings: of this shard and chunk.
            entropy: also measure `moment`.
            keep: also return a scratch for :meth:`grad`, else None.
            lend: where to keep it: memory of the weight's gradient, which :meth:`weight_grad` of this chunk
                is going to be the first to fill. Never given to a backend whose :meth:`lent_rows` are 0.
        """
        raise NotImplementedError

    def recompute(
        self, hidden: torch.Tensor, weight: torch.Tensor, settings: HeadSettings, lend: torch.Tensor | None = None
    ) -> Any:
        """The scratch of :meth:`forward` alone; need not be equal to it to the bit."""
        return self.forward(hidden, weight, settings, entropy=False, keep=True, lend=lend)[1]

    def lent_rows(self, dim: int, dtype: torch.dtype) -> int:
        """Most rows of a chunk whose logits fit into their weight gradient [Vl, dim] of `dtype`; 0: no such thing."""
        return 0

    def row_bytes(self, dim: int, width: int) -> int:
        """Scratch of a row of a chunk besides its logits of `width` columns: hidden states, statistics of tiles."""
        return 8 * dim + 12 * (-(-width // self.tile))

    def grad(self, kept: Any, settings: HeadSettings, rows: RowStats, upstream: Upstream) -> torch.Tensor:
        """d loss / d raw, [C, Vl] in the weight's dtype; may be made in the memory of `kept`.

        Args:
            kept: the scratch of this chunk; used up by this call.
            settings: as in :meth:`forward`.
            rows: statistics over the whole vocabulary.
            upstream: what reaches the chunk.

        A row whose gradients are both zero gives zeros.
        """
        raise NotImplementedError

    def grad_rows(
        self, kept: Any, settings: HeadSettings, rows: RowStats, upstream: Upstream, live: LiveRows | None
    ) -> torch.Tensor:
        """:meth:`grad` of the rows `live` alone: [L, Vl], of any strides.

        Args:
            kept: as there, and so on.
            settings: of the chunk.
            rows: of the chunk.
            upstream: of the chunk.
            live: L rows of the chunk; None: all of them.
        """
        # Queued before the number of rows is asked for: it is what a GPU does while the host waits.
        dz = self.grad(kept, settings, rows, upstream)
        part = None if live is None else live.part()
        if part is None:
            return dz
        if dz.is_cuda:  # with the room behind its rows: cuBLAS is slow where they are not aligned
            picked = dz.new_empty(part.numel(), max(dz.stride(0), dz.shape[1]))[:, : dz.shape[1]]
            return torch.index_select(dz, 0, part, out=picked)
        for to, row in enumerate(part.tolist()):
            if to != row:
                dz[to].copy_(dz[row])
        return dz[: part.numel()]

    def hidden_grad(self, dz: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """dz [L, Vl] of :meth:`grad_rows` and weight [Vl, D] of one dtype -> [L, D], float32 or that dtype."""
        if dz.is_cuda and dz.dtype != torch.float32:  # chunks, and rows with several targets, are added to it
            return torch.mm(dz, weight, out_dtype=torch.float32)
        if dz.is_cuda or dz.dtype != torch.float32:
            return torch.mm(dz, weight)
        # A BLAS may add a whole vocabulary in one chain, which costs a digit: sums of blocks.
        total = dz.new_zeros(dz.shape[0], weight.shape[1])
        for part, rows in zip(dz.split(_DEPTH_BLOCK, dim=1), weight.split(_DEPTH_BLOCK), strict=True):
            total += torch.mm(part, rows)
        return total

    def weight_grad(
        self, dz: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, *, first: bool, scale: float
    ) -> None:
        """total [Vl, D] = scale * dz^T hidden if `first`, else it is added.

        `total` is float32, or of the dtype of dz; if it was lent to :meth:`forward`, dz lies in it.
        """
        if total.dtype == dz.dtype:
            total.addmm_(dz.t(), hidden, beta=0.0 if first else 1.0, alpha=scale)
            return
        if dz.is_cuda:  # never rounded, and the sum is the GEMM's own: no pass over it (torch 2.10 and later)
            beta = 0.0 if first else 1.0
            torch.addmm(total, dz.t(), hidden, out_dtype=torch.float32, beta=beta, alpha=scale, out=total)
            return
        step = max(_GRAD_BLOCK_BYTES // (hidden.shape[1] * 4), 1)
        for start in range(0, dz.shape[1], step):
            block, part = dz[:, start : start + step].t(), total[start : start + step]
            product = torch.mm(block, hidden)
            if first:
                torch.mul(product, scale, out=part)
            else:
                part.add_(product, alpha=scale)

    def tile_stats(self, logits: torch.Tensor, settings: HeadSettings, *, entropy: bool) -> TileStats:
        """Statistics of logits [C, Vl], rows dense, that a caller brings; only for the op logprob."""
        raise NotImplementedError

    def logits_grad(
        self, logits: torch.Tensor, settings: HeadSettings, rows: RowStats, upstream: Upstream
    ) -> torch.Tensor:
        """d loss / d logits, a new tensor of their dtype; only for the op logprob."""
        raise NotImplementedError

    def logit_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a kept logit, when the GEMM's inputs are of `dtype`."""
        return dtype.itemsize

    def merge(self, stats: TileStats) -> RowStats:
        """Tiles of the whole vocabulary, in its order, -> rows. z_target is -inf where no rank has it.

        In float64 and in a fixed order, which the number of rows does not change.
        """
        return merge_tiles(stats)


def _pairwise_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over dim 1, as a tree of neighbours: element-wise, and zeros at the end change no bit."""
    while x.shape[1] > 1:
        if x.shape[1] % 2:
            x = torch.cat([x, x.new_zeros(x.shape[0], 1)], dim=1)
        x = x[:, 0::2] + x[:, 1::2]
    return x[:, 0]


def merge_tiles(stats: TileStats) -> RowStats:
    """:meth:`HeadKernels.merge` with torch ops: everything is anchored at the target's z.

    With s the sum of exp(z - z_target) over the others, logp is -log1p(s): nothing cancels. Where
    some z is over 600 above z_target the anchor is the largest z instead, and where z_target is inf
    (an overflow), which gives NaN.
    """
    target, top = stats.z_target.double(), stats.top.double()
    largest = top.amax(dim=1)
    near = (largest - target <= 600) & (target < torch.inf)
    anchor = torch.where(near, target, largest)
    shift = top - anchor[:, None]
    scale = torch.where(stats.total == 0, 0, shift.exp())
    total = stats.total.double()
    others = _pairwise_sum(scale * total)
    own = torch.where(near, 1, (target - anchor).exp())
    log_sum = torch.where(near, others.log1p(), (own + others).log())
    log_norm = anchor + log_sum
    high = log_norm.float()
    low = torch.where(high.isinf(), 0, log_norm - high.double()).float()
    logp = torch.where(near, 0.0, target - anchor) - log_sum
    entropy = None
    if stats.moment is not None:
        shifted = torch.where(stats.total == 0, 0, stats.moment.double() + shift * total)
        own_part = torch.where(own == 0, 0, own * (target - anchor))
        weighted = _pairwise_sum(scale * shifted) + torch.where(near, 0, own_part)
        entropy = (log_sum - weighted / (own + others)).float()
    return RowStats(high, low, logp.float(), entropy)
