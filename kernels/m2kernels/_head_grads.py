"""Gradients of the LM head, summed over chunks of rows: float32, whatever the dtype of the GEMMs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from m2kernels._head import Head

Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Of (hidden, weight, bias): float32, but the weight's of a single chunk, which may have the dtype of
the GEMMs; None where not wanted."""


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """Where the gradient of the weight goes.

    Attributes:
        into: float32 [Vl, D] that it is added to; None: a new tensor.
        scale: what is added to `into` is multiplied by it.
        wide: a new tensor must be float32, also that of a single chunk.
    """

    into: torch.Tensor | None = None
    scale: float = 1.0
    wide: bool = False


class WeightSum:
    """The weight's gradient.

    A new one lends its memory for the logits of the chunk that is the first in it (see
    :meth:`HeadKernels.forward`), so how the rows are cut is asked here.
    """

    def __init__(self, head: Head, target: WeightTarget) -> None:
        self.head, self.target = head, target
        wide = target.wide or head.problem.weight.dtype != head.problem.dtype
        self.narrow = torch.float32 if wide else head.problem.dtype
        self.dtype = torch.float32
        self.fresh: torch.Tensor | None = None  # memory that no gradient has been written to
        self.total = target.into

    def room(self, count: int, width: int) -> int:
        """Rows of a first chunk whose logits fit into the gradient's memory, and the rest into the budget."""
        if self.total is not None:
            return 0
        kernels, dim = self.head.kernels, self.head.weight.shape[1]
        most = self.head.problem.chunk_bytes // kernels.row_bytes(dim, width)
        if count <= min(kernels.lent_rows(dim, self.narrow), most):
            return count
        return min(kernels.lent_rows(dim, torch.float32), most)

    def cut(self, parts: int) -> None:
        """There will be so many chunks: one alone needs no float32 sum."""
        self.dtype = self.narrow if parts <= 1 else torch.float32

    def lend(self, rows: int) -> torch.Tensor | None:
        """Memory for the logits of a chunk of so many rows, if it is to be the first here and they fit."""
        if self.total is not None or rows > self.head.kernels.lent_rows(self.head.weight.shape[1], self.dtype):
            return None
        return self._memory()

    def _memory(self) -> torch.Tensor:
        if self.fresh is None:
            self.fresh = self.head.weight.new_empty(self.head.weight.shape, dtype=self.dtype)
        return self.fresh

    def add(self, dz: torch.Tensor, hidden: torch.Tensor, scale: float) -> None:
        """Add scale * dz^T hidden of a chunk; to `target.into` times its own factor too."""
        first = self.total is None
        if self.total is None:
            self.total = self._memory()
        self.head.kernels.weight_grad(dz, hidden, self.total, first=first, scale=self.target.scale * scale)

    def finish(self, scale: float | torch.Tensor, into: torch.Tensor | None) -> torch.Tensor | None:
        """The sum times `scale`, or None after adding it to `into`; what is in `target.into` stays as it is."""
        if into is None:
            if self.total is None:
                return self._memory().zero_()
            if self.target.into is None:
                _scale(self.total, scale)
            return self.total
        if self.total is not None and self.total is not into:
            if isinstance(scale, float):
                into.add_(self.total, alpha=scale)
            else:
                into.addcmul_(self.total, scale)
        return None


class Part(NamedTuple):
    """What a chunk adds: dz [C, Vl] and hidden [C, D], rows `positions` of the problem's hidden."""

    dz: torch.Tensor
    hidden: torch.Tensor
    positions: slice | torch.Tensor


class HeadGrads:
    """Sums over chunks of the gradients of hidden, weight and bias, times a factor that is known at the end.

    The weight's is the large one, and a pass over it for the factor's sake costs as much as half a GEMM. So a chunk
    that is alone waits on a CPU as dz until the factor is there for the GEMM to multiply by; until then dz is all
    there is in memory, and of a loss without a backward no gradient is ever formed.

    Args:
        head: what the chunks are of.
        needs: gradients wanted, of (hidden, weight, bias).
        target: where the weight's goes.
        scale: what all gradients are multiplied by once they are summed; with `target.into` a number.
    """

    def __init__(
        self,
        head: Head,
        needs: tuple[bool, bool, bool],
        target: WeightTarget | None = None,
        scale: float | torch.Tensor = 1.0,
    ) -> None:
        p = head.problem
        target = WeightTarget() if target is None else target
        assert target.into is None or isinstance(scale, float)
        self.head, self.scale, self.added = head, scale, target.into is not None
        self.waits = False
        self.waiting: Part | None = None

        def zeros(like: torch.Tensor) -> torch.Tensor:
            return torch.zeros(like.shape, dtype=torch.float32, device=like.device)

        self.to_hidden = zeros(p.hidden) if needs[0] else None
        self.to_weight = WeightSum(head, target) if needs[1] else None
        self.to_bias = zeros(p.bias) if needs[2] and p.bias is not None else None

    def chunks(self, count: int, width: int) -> list[slice]:
        """Cut `count` rows of logits of `width` columns; the chunks are to be added in this order."""
        lent = 0 if self.to_weight is None else self.to_weight.room(count, width)
        parts = self.head.chunks(count, width, lent)
        self.cut(len(parts))
        return parts

    def cut(self, parts: int) -> None:
        """There will be so many chunks."""
        if self.to_weight is not None:
            self.to_weight.cut(parts)
            self.waits = parts == 1 and not self.added and not self.head.hidden.is_cuda

    def lend(self, rows: int) -> torch.Tensor | None:
        """See :meth:`WeightSum.lend`."""
        return None if self.to_weight is None else self.to_weight.lend(rows)

    def add(self, dz: torch.Tensor, chunk_hidden: torch.Tensor, positions: slice | torch.Tensor) -> None:
        """Add a :class:`Part`."""
        part = Part(dz, chunk_hidden, positions)
        if self.waits:
            assert self.waiting is None, "one chunk was announced"
            self.waiting = part
        else:
            self._add(part, self.scale if self.added else 1.0)

    def _add(self, part: Part, scale: float | torch.Tensor) -> None:
        """Form the products; that of the weight times `scale`."""
        dz, positions = part.dz, part.positions
        if self.to_hidden is not None:
            rows = self.head.kernels.hidden_grad(*self._valid(dz)).float()
            if isinstance(positions, slice):
                self.to_hidden[positions] += rows
            elif rows.is_cuda:  # index_add adds in any order there
                self.to_hidden.index_put_((positions.long(),), rows, accumulate=True)
            else:
                self.to_hidden.index_add_(0, positions, rows)
        if self.to_bias is not None:
            self.to_bias += dz.sum(dim=0, dtype=torch.float32)
        if self.to_weight is not None:  # the last: dz may lie in its memory
            self.to_weight.add(dz, part.hidden, float(scale))

    def _valid(self, dz: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dz and the weight without padding, whose zero gradient would not hide a NaN in the weight."""
        valid, weight = self.head.num_valid, self.head.weight
        return (dz, weight) if valid == weight.shape[0] else (dz[:, :valid], weight[:valid])

    def finish(self, factor: float | torch.Tensor = 1.0, into: torch.Tensor | None = None) -> Grads:
        """The sums times `factor`, once.

        Args:
            factor: what has gone into `target.into` stays without it.
            into: float32 [Vl, D] that the weight's is added to; there is then none to return.
        """
        scale = self.scale * factor
        rest = scale  # of the weight's
        if self.waiting is not None:
            assert self.to_weight is not None
            self.to_weight.total = into
            self._add(self.waiting, scale)
            self.waiting, rest = None, 1.0
        for grad in (self.to_hidden, self.to_bias):
            if grad is not None:
                _scale(grad, scale)
        to_weight = None if self.to_weight is None else self.to_weight.finish(rest, into)
        return self.to_hidden, to_weight, self.to_bias


def _scale(grad: torch.Tensor, factor: float | torch.Tensor) -> None:
    if not (isinstance(factor, float) and factor == 1.0):
        grad.mul_(factor)


def to_inputs(
    grads: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients in the dtypes of the tensors that they are of."""
    pairs = zip(grads, inputs, strict=True)
    return tuple(g if g is None or x is None else g.to(x.dtype) for g, x in pairs)
