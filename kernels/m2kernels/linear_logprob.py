"""Log-prob of given targets, and entropy, from hidden states and the LM head's weight.

    raw = hidden[rows] @ weight.T + bias, z = softcap(raw) / temperature
    logp = z[target] - lse(z), entropy = lse(z) - sum(p z), p = exp(z - lse(z))

No [M, V] tensor is ever kept: rows go in chunks, the forward keeps 16 bytes a row, the backward
computes a chunk's logits again and skips rows whose incoming gradient is exactly zero.

Numerics. Each tile of 128 entries is summed relative to its own largest z, the target left out; the
tiles are merged in float64, in the vocabulary's order, relative to the target's z, so that
logp = -log1p(sum of exp(z - z_target)): nothing cancels for confident tokens, no exp overflows, and
no collective is needed before the sums. Measured on exact float32 logits, V = 152064: relative error
of |logp| < 1e-2 at most 1.0e-7; 1.6e-7 with all exps anchored at the target (which overflows for
p < e^-88), and all digits lost by log-sum-exp minus z and by online softmax. Under a common offset of
1000 the same, where log-sum-exp minus z is off by 5.6e-5. One minus p at the target is -expm1(logp).

On the CPU the C++ GEMM has float32 logits for bfloat16 inputs as well (the error of log-probs falls
from 6e-2 to 4e-6 with |z| to 15), and a logit is one chain of products whatever is beside it. That
costs nothing from a few rows on, so no mode gives the invariance up. With torch's GEMM a chunk and C++ for its rows
alone (float32, D = 576, V = 49152, one thread of an AMD EPYC with AVX-512 beside other load,
medians of interleaved ratios) 5, 33 and 717 rows took 1.46, 1.35 and 1.57 times the CPU time forward, and 1.37, 1.21
and 1.26 times with backward; only one row, a matrix times a vector, took less: 0.80 and 0.97 times.
"""

from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from m2kernels._head import HEAD_SCHEMA, Head, HeadProblem, head_reason
from m2kernels._head_check import make_problem
from m2kernels._head_grads import HeadGrads, to_inputs
from m2kernels._head_kernels import RowStats, Upstream
from m2kernels._live_rows import LiveRows

_OP = "linear_logprob"
_NUM_ARGS = len(HeadProblem.__slots__)


class LogProb(NamedTuple):
    """What :func:`linear_logprob` and :func:`m2kernels.logprob` return.

    Attributes:
        logp: f32[M].
        entropy: f32[M], in nats; None when not asked for.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None


def unsupported_reason(
    backend: str, hidden: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Why `backend` (triton | cpu | torch) cannot run here, or with GEMMs of `dtype` on this hidden."""
    return head_reason(backend, hidden, dtype)


def row_stats(head: Head, *, entropy: bool) -> RowStats:
    """Statistics of all M rows, chunk by chunk; nothing of a chunk is kept."""
    out = head.hidden.new_empty(4, head.num_rows, dtype=torch.float32)
    for part in head.chunks(head.num_rows, head.widest()):
        found, _ = head.statistics(head.gather(part), entropy=entropy, keep=False)
        for k, value in enumerate((found.log_norm, found.log_norm_low, found.logp, found.entropy)):
            if value is not None:
                out[k, part] = value
    return RowStats(out[0], out[1], out[2], out[3] if entropy else None)


def head_backward(head: Head, stats: RowStats, upstream: Upstream, grads: HeadGrads) -> None:
    """Add to `grads`: logits again, chunk by chunk, of rows with a gradient. stats and upstream are of all M rows."""
    live = LiveRows(upstream).positions()  # on a GPU the one wait of the call
    for part in grads.chunks(live.numel(), head.weight.shape[0]):
        pick = part if live.numel() == head.num_rows else live[part]
        chunk = head.gather(pick)
        lend = grads.lend(chunk.hidden.shape[0])
        kept = head.kernels.recompute(chunk.hidden, head.weight, chunk.settings, lend)
        rows = RowStats(*(None if x is None else x[pick] for x in stats))  # type: ignore[arg-type]
        part_of = Upstream(*(None if x is None else x[pick] for x in upstream))  # type: ignore[arg-type]
        dz = head.kernels.grad_rows(kept, chunk.settings, rows, part_of, None)
        grads.add(dz, chunk.hidden, chunk.positions)


@torch.library.custom_op(
    "m2kernels::linear_logprob_fwd",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),  # it waits for counts on the host
    schema=f"({HEAD_SCHEMA}, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _fwd(*args: Any) -> tuple[torch.Tensor, ...]:
    *problem, entropy = args
    stats = row_stats(Head(HeadProblem(*problem)), entropy=entropy)
    measured = stats.logp.new_empty(0) if stats.entropy is None else stats.entropy.clone()
    return stats.logp.clone(), measured, stats.log_norm.clone(), stats.log_norm_low.clone()


@torch.library.custom_op(
    "m2kernels::linear_logprob_bwd",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),  # it waits for counts on the host
    schema=f"(Tensor grad_logp, Tensor? grad_entropy, Tensor logp, Tensor entropy, Tensor log_norm, "
    f"Tensor log_norm_low, {HEAD_SCHEMA}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
)
def _bwd(*args: Any) -> tuple[torch.Tensor, ...]:
    grad_logp, grad_entropy, logp, entropy, log_norm, low, *problem, needs = args
    head = Head(HeadProblem(*problem))
    stats = RowStats(log_norm, low, logp, entropy if entropy.numel() else None)
    sums = HeadGrads(head, tuple(needs))
    head_backward(head, stats, Upstream(grad_logp, grad_entropy), sums)
    grads = to_inputs(sums.finish(), problem[:3])
    return tuple(logp.new_empty(0) if g is None else g for g in grads)


@_fwd.register_fake
def _fwd_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    hidden, target, entropy = args[0], args[3], args[-1]

    def rows(count: int | torch.SymInt) -> torch.Tensor:
        return hidden.new_empty(count, dtype=torch.float32)

    size = target.shape[0]
    return rows(size), rows(size if entropy else 0), rows(size), rows(size)


@_bwd.register_fake
def _bwd_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    logp, inputs, needs = args[2], args[6:9], args[-1]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else logp.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:_NUM_ARGS]


def _backward(
    ctx: Any, grad_logp: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    *tensors, logp, entropy, log_norm, low = ctx.saved_tensors
    grads: list[Any] = [None] * (_NUM_ARGS + 1)
    if grad_logp is None and grad_entropy is None:
        return tuple(grads)
    to_logp = torch.zeros_like(logp) if grad_logp is None else grad_logp.contiguous()
    to_entropy = None if grad_entropy is None or not entropy.numel() else grad_entropy.contiguous()
    needs = [bool(ctx.needs_input_grad[i]) for i in range(3)]
    found = torch.ops.m2kernels.linear_logprob_bwd(
        to_logp, to_entropy, logp, entropy, log_norm, low, *tensors, *ctx.settings, needs
    )
    grads[:3] = [g if need else None for g, need in zip(found, needs, strict=True)]
    return tuple(grads)


def _no_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError("linear_logprob has no second derivative")


_fwd.register_autograd(_backward, setup_context=_setup_context)
_bwd.register_autograd(_no_second_derivative)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> LogProb:
    """Log-prob of `target[i]` after row `rows[i]` of hidden, and the entropy there.

    Args:
        hidden: [N, D] float32, bfloat16 or float16; the same on all ranks of tp_group. Its
            gradient is this rank's part: the sum over the ranks is the caller's, whose copy or
            sequence-parallel gather does it anyway (Megatron's convention).
        weight: [V, D], or this rank's [V/tp, D] (widths may differ). Frozen, it costs no dW. GEMMs
            run in the wider dtype of the two, or in autocast's; dW is summed in float32.
        target: int32 or int64 [M], global ids. Out of range: ValueError on CPU, -inf elsewhere. No id
            is ignored (labels with -100: rows = (labels != -100).nonzero()[:, 0], target = labels[rows]).
        rows: int32 or int64 [M], rows of hidden, in any order and repeated at will; only these are
            read. None: all rows, M = N.
        bias: [V or V/tp] or None.
        temperature: what z is divided by: a number over 0, or float32 [M].
        softcap: raw logits become softcap * tanh(raw / softcap); None: they stay.
        vocab_size: ids from here on are padding and get no mass; None: there is no padding.
        entropy: also return the entropy, differentiable as well.
        tp_group: process group that the vocabulary is sharded over. A chunk takes one all-gather; the
            first call with its shards takes one more, waits for it, and remembers them (two heads
            of one D and vocab_size over one group must not differ in some ranks' shards alone).
        vocab_start: global id of this shard's first row.
        backend: auto | triton | cpu | torch.
        chunk_bytes: budget of a chunk's logits; None: ``m2kernels._head.CHUNK_BYTES``.

    Returns:
        LogProb(logp, entropy). Run to run the same to the bit, gradients too; and, with every
        backend but torch, logp and entropy are the same to the bit whatever the other rows, the chunks
        and the tensor-parallel degree (shards that begin at multiples of 128; others within 2 ulp, of
        1 for an entropy below it).

    Raises:
        ValueError: a wrong shape, dtype, device or option, shards that overlap or leave a gap, or a
            backend that cannot run.
    """
    problem = make_problem(
        _OP, hidden, weight, target, rows=rows, bias=bias, temperature=temperature, softcap=softcap,
        vocab_size=vocab_size, tp_group=tp_group, vocab_start=vocab_start, backend=backend,
        chunk_bytes=chunk_bytes,
    )  # fmt: skip
    logp, measured, _, _ = torch.ops.m2kernels.linear_logprob_fwd(*problem.args(), entropy)
    return LogProb(logp, measured if entropy else None)
