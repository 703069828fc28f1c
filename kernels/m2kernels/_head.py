"""Driver of the LM head: rows, chunks and tensor parallelism.

Knows no backend: it hands chunks of gathered rows to :class:`m2kernels._head_kernels.HeadKernels`
and merges the tile statistics of all ranks in the vocabulary's order; sums of the gradients are in
:mod:`m2kernels._head_grads`. Shared by linear_logprob and linear_policy_loss.
"""

import importlib
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
            # Again: with a group it is known only now how many ids there are, and a traced call has not been checked.
            total = self.vocab.total
            check_ids("LM head", "target", p.target, total if p.vocab_size is None else min(total, p.vocab_size))
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
