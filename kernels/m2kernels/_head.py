"""Driver of the LM head: rows, chunks, tensor parallelism and the GEMMs of the gradients.

Knows no backend: it hands chunks of gathered rows to :class:`m2kernels._head_kernels.HeadKernels`
and merges the tile statistics of all ranks in the vocabulary's order. Shared by linear_logprob,
linear_policy_loss and (without the GEMMs) logprob.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from m2kernels._check import check_ids
from m2kernels._head_kernels import HeadKernels, HeadSettings, RowStats
from m2kernels._head_torch import TorchHead
from m2kernels._native import machine_reason
from m2kernels._triton import triton_head_reason
from m2kernels._vocab_group import VocabGroup

HEAD_BACKENDS = ("cpu", "triton", "torch")
"""In the order in which ``auto`` tries them."""

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Default budget of one chunk's logits, by device: enough rows for full GEMM speed, small beside a
model. The argument ``chunk_bytes`` overrides it; results of the forward do not depend on it."""

HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? rows, Tensor? temperatures, "
    "float temperature, float? softcap, int? vocab_size, int vocab_start, str? group, str backend, "
    "int chunk_bytes, ScalarType dtype"
)


@dataclass(frozen=True, slots=True)
class HeadProblem:
    """Arguments of a head op, checked, in the order of :data:`HEAD_SCHEMA`.

    Attributes:
        hidden: [N, D].
        weight: [Vl, D], this rank's shard.
        bias: [Vl] or None.
        target: int [M], global ids.
        rows: int [M] or None: then M = N.
        temperatures: f32[M], or None: `temperature` holds for all rows.
        temperature: see above.
        softcap: see HeadSettings.
        vocab_size: ids from here on are padding; None: the shards hold none.
        vocab_start: global id of the shard's first row.
        group: name of the tensor-parallel process group, or None.
        backend: one of HEAD_BACKENDS.
        chunk_bytes: budget of a chunk's logits.
        dtype: of the GEMMs; hidden and weight are converted to it.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    rows: torch.Tensor | None
    temperatures: torch.Tensor | None
    temperature: float
    softcap: float | None
    vocab_size: int | None
    vocab_start: int
    group: str | None
    backend: str
    chunk_bytes: int
    dtype: torch.dtype

    def args(self) -> tuple[Any, ...]:
        """The fields as an op's arguments."""
        return tuple(getattr(self, name) for name in self.__slots__)


class Chunk(NamedTuple):
    """Gathered rows of one chunk.

    Attributes:
        hidden: [C, D] in the GEMM's dtype.
        settings: for the kernels.
        positions: rows of the problem's hidden that these are: a slice, or int [C].
    """

    hidden: torch.Tensor
    settings: HeadSettings
    positions: slice | torch.Tensor


def head_reason(backend: str, hidden: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why `backend` cannot run here, or with GEMMs of `dtype` on this hidden; None if it can."""
    if backend == "torch":
        return None
    if backend == "triton":
        return triton_head_reason(hidden, dtype)
    if hidden is not None and hidden.device.type != "cpu":
        return f"hidden is on {hidden.device.type}"
    if dtype not in (None, torch.float32, torch.bfloat16):
        return f"the computation is in {dtype}; the C++ kernels take float32 and bfloat16"
    return machine_reason("cpu")


def head_kernels(backend: str) -> HeadKernels:
    """The kernels of a backend that :func:`head_reason` has passed."""
    if backend == "torch":
        return TorchHead()
    if backend == "cpu":
        from m2kernels._head_cpu import CpuHead

        return CpuHead()
    kernels: HeadKernels = importlib.import_module("m2kernels._head_triton").TritonHead()
    return kernels


class Head:
    """One call's head, ready to do chunks of rows."""

    def __init__(self, problem: HeadProblem) -> None:
        self.problem = problem
        self.num_rows = problem.target.shape[0]
        self.kernels = head_kernels(problem.backend)
        self.weight = self.kernels.prepare(problem.weight.detach().to(problem.dtype))
        self.hidden = problem.hidden.detach()
        self.bias = None if problem.bias is None else problem.bias.detach().contiguous()
        width = self.weight.shape[0]
        limit = width if problem.vocab_size is None else problem.vocab_size - problem.vocab_start
        self.num_valid = min(max(limit, 0), width)
        local = problem.target.long() - problem.vocab_start
        self.target = torch.where((local >= 0) & (local < self.num_valid), local, -1)
        self.vocab: VocabGroup | None = None

    def widest(self) -> int:
        """Width of the widest shard; the group is met on first use, by all ranks alike."""
        if self.vocab is None:
            p = self.problem
            width, dim = self.weight.shape
            self.vocab = VocabGroup(p.group, p.vocab_start, width, self.kernels, self.weight, (dim, p.vocab_size))
            if p.group is not None:  # now it is known how many ids there are
                check_ids("LM head", "target", p.target, self.vocab.total)
        return self.vocab.widest

    def step(self, width: int) -> int:
        """Rows whose logits of `width` columns fit the budget, a multiple of the kernels' step."""
        step = self.kernels.row_step
        rows = self.problem.chunk_bytes // max(width * self.kernels.logit_bytes(self.weight.dtype), 1)
        return max(rows // step, 1) * step

    def chunks(self, count: int, width: int, lent: int = 0) -> list[slice]:
        """Equal parts of `count` rows within the budget; but the first has `lent` rows where those are more."""
        if count == 0:
            return []
        step = self.kernels.row_step
        most = self.step(width)
        first = min(lent, count) if lent > most else 0
        head = [slice(0, first)] if first else []
        if first == count:
            return head
        parts = -(-(count - first) // most)
        size = -(-(count - first) // (parts * step)) * step
        return head + [slice(i, min(i + size, count)) for i in range(first, count, size)]

    def gather(self, part: slice | torch.Tensor) -> Chunk:
        """Rows `part` of the problem's M, a slice or int64 positions."""
        p = self.problem
        index = part if p.rows is None else p.rows[part]
        hidden = self.hidden[index] if isinstance(index, slice) else self.hidden.index_select(0, index)
        inverse = 1.0 / p.temperature if p.temperatures is None else p.temperatures[part].float().reciprocal()
        settings = HeadSettings(
            target=self.target[part],
            bias=self.bias,
            inv_temperature=inverse,
            softcap=p.softcap,
            num_valid=self.num_valid,
        )
        return Chunk(hidden.to(p.dtype).contiguous(), settings, index)

    def statistics(
        self, chunk: Chunk, *, entropy: bool, keep: bool, lend: torch.Tensor | None = None
    ) -> tuple[RowStats, Any]:
        """Forward of a chunk, over the whole vocabulary; with `keep` also the scratch of its gradient."""
        self.widest()
        assert self.vocab is not None
        stats, kept = self.kernels.forward(
            chunk.hidden, self.weight, chunk.settings, entropy=entropy, keep=keep, lend=lend
        )
        return self.vocab.merge(stats, chunk.settings.target), kept


class HeadGrads:
    """Sums of the gradients over chunks: float32, whatever the dtype of the GEMMs.

    Args:
        head: what the chunks are of.
        needs: gradients wanted, of (hidden, weight, bias).
        into: float32 [Vl, D] that the weight's gradient is added to, times `scale`.
        scale: for `into` alone.
        wide: the weight's gradient must be float32, also that of a single chunk.
        after: what all gradients are multiplied by once they are summed; with `into` a number.
    """

    def __init__(
        self,
        head: Head,
        needs: tuple[bool, bool, bool],
        *,
        into: torch.Tensor | None = None,
        scale: float = 1.0,
        wide: bool = False,
        after: float | torch.Tensor = 1.0,
    ) -> None:
        p = head.problem
        self.head = head
        self.after, self.scale = after, 1.0
        if into is not None:
            assert isinstance(after, float)
            self.scale = scale * after
        self.added = into is not None
        self.narrow = torch.float32 if wide or p.weight.dtype != p.dtype else p.dtype
        self.dtype = torch.float32
        self.unborn: torch.Tensor | None = None  # memory of to_weight, before it holds anything

        def zeros(like: torch.Tensor) -> torch.Tensor:
            return torch.zeros(like.shape, dtype=torch.float32, device=like.device)

        self.to_hidden = zeros(p.hidden) if needs[0] else None
        self.weight = needs[1]
        self.to_weight = into
        self.to_bias = zeros(p.bias) if needs[2] and p.bias is not None else None

    def chunks(self, count: int, width: int) -> list[slice]:
        """Cut `count` rows, and say what dtype the weight's gradient has: a single chunk needs no float32 sum."""
        parts = self.head.chunks(count, width, self._room(count, width))
        self.cut(len(parts))
        return parts

    def cut(self, parts: int) -> None:
        """There will be so many chunks."""
        self.dtype = self.narrow if parts <= 1 else torch.float32

    def _room(self, count: int, width: int) -> int:
        """Rows of a first chunk whose logits fit into the weight's gradient, and the rest into the budget."""
        if not self.weight or self.to_weight is not None:
            return 0
        kernels, dim = self.head.kernels, self.head.weight.shape[1]
        most = self.head.problem.chunk_bytes // kernels.row_bytes(dim, width)
        if count <= min(kernels.lent_rows(dim, self.narrow), most):
            return count
        return min(kernels.lent_rows(dim, torch.float32), most)

    def lend(self, rows: int) -> torch.Tensor | None:
        """Memory of the weight's gradient, for the logits of the chunk that is to be the first in it; or None."""
        if not self.weight or self.to_weight is not None:
            return None
        weight = self.head.weight
        if rows > self.head.kernels.lent_rows(weight.shape[1], self.dtype):
            return None
        if self.unborn is None:
            self.unborn = weight.new_empty(weight.shape, dtype=self.dtype)
        return self.unborn

    def add(self, dz: torch.Tensor, chunk_hidden: torch.Tensor, positions: slice | torch.Tensor) -> None:
        """Add a chunk: dz [C, Vl] and hidden [C, D], rows `positions` of the problem's hidden."""
        if self.to_hidden is not None:
            part = self.head.kernels.hidden_grad(*self._valid(dz)).float()
            if isinstance(positions, slice):
                self.to_hidden[positions] += part
            elif part.is_cuda:  # index_add adds in any order there
                self.to_hidden.index_put_((positions.long(),), part, accumulate=True)
            else:
                self.to_hidden.index_add_(0, positions, part)
        if self.to_bias is not None:
            self.to_bias += dz.sum(dim=0, dtype=torch.float32)
        if self.weight:
            first = self.to_weight is None
            if self.to_weight is None:
                shape = dz.shape[1], chunk_hidden.shape[1]
                self.to_weight = dz.new_empty(shape, dtype=self.dtype) if self.unborn is None else self.unborn
            self.head.kernels.weight_grad(dz, chunk_hidden, self.to_weight, first=first, scale=self.scale)

    def _valid(self, dz: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dz and the weight without padding, whose zero gradient would not hide a NaN in the weight."""
        valid, weight = self.head.num_valid, self.head.weight
        return (dz, weight) if valid == weight.shape[0] else (dz[:, :valid], weight[:valid])

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(d hidden, d weight, d bias): float32, but a single chunk's weight; None where not wanted."""
        if self.weight and self.to_weight is None:
            if self.unborn is not None:
                self.to_weight = self.unborn.zero_()
            else:
                self.to_weight = torch.zeros_like(self.head.problem.weight, memory_format=torch.contiguous_format)
        if not (isinstance(self.after, float) and self.after == 1.0):
            for grad in (self.to_hidden, None if self.added else self.to_weight, self.to_bias):
                if grad is not None:
                    grad.mul_(self.after)
        return self.to_hidden, self.to_weight, self.to_bias


def to_inputs(
    grads: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients in the dtypes of the tensors that they are of."""
    pairs = zip(grads, inputs, strict=True)
    return tuple(g if g is None or x is None else g.to(x.dtype) for g, x in pairs)
