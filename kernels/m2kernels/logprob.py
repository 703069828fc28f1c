"""Log-prob of given targets, and entropy, from logits that a caller holds already.

The same statistics and gradient as :mod:`m2kernels.linear_logprob`, read once forward and once
backward; the backward writes the gradient of the logits and needs no other memory of their size.
"""

from typing import Any

import torch
from torch import distributed as dist

from m2kernels._backend import choose_backend
from m2kernels._check import INTEGERS, check_device, check_dtype, check_ids, check_vector
from m2kernels._head import HEAD_BACKENDS, head_kernels, head_reason
from m2kernels._head_check import FLOATS, check_temperature, group_name
from m2kernels._head_kernels import HeadSettings, RowStats, Upstream
from m2kernels._triton import triton_logits_reason
from m2kernels._vocab_group import VocabGroup
from m2kernels.linear_logprob import LogProb

_OP = "logprob"
_SCHEMA = (
    "Tensor logits, Tensor target, Tensor? temperatures, float temperature, int vocab_start, str? group, str backend"
)


def unsupported_reason(
    backend: str, logits: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Why `backend` (triton | cpu | torch) cannot run here, or on these logits; None if it can."""
    if backend == "triton":
        return triton_logits_reason(logits)
    return head_reason(backend, logits, dtype)


def _prepare(
    logits: torch.Tensor, target: torch.Tensor, temperatures: torch.Tensor | None, temperature: float, start: int
) -> tuple[torch.Tensor, HeadSettings]:
    """(logits with dense rows, settings)."""
    width = logits.shape[1]
    local = target.long() - start
    local = torch.where((local >= 0) & (local < width), local, -1)
    inverse = 1.0 / temperature if temperatures is None else temperatures.reciprocal()
    dense = logits if logits.stride(1) == 1 or width == 1 else logits.contiguous()
    return dense, HeadSettings(target=local, bias=None, inv_temperature=inverse, softcap=None, num_valid=width)


@torch.library.custom_op(
    "m2kernels::logprob_fwd",
    mutates_args=(),
    schema=f"({_SCHEMA}, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _fwd(*args: Any) -> tuple[torch.Tensor, ...]:
    logits, target, temperatures, temperature, start, group, backend, entropy = args
    dense, settings = _prepare(logits, target, temperatures, temperature, start)
    kernels = head_kernels(backend)
    vocab = VocabGroup(group, start, logits.shape[1], kernels, logits)
    check_ids(_OP, "target", target, vocab.total)
    rows = vocab.merge(kernels.tile_stats(dense, settings, entropy=entropy), settings.target)
    measured = rows.logp.new_empty(0) if rows.entropy is None else rows.entropy.clone()
    return rows.logp.clone(), measured, rows.log_norm.clone(), rows.log_norm_low.clone()


@torch.library.custom_op(
    "m2kernels::logprob_bwd",
    mutates_args=(),
    schema="(Tensor grad_logp, Tensor? grad_entropy, Tensor logp, Tensor entropy, Tensor log_norm, "
    f"Tensor log_norm_low, {_SCHEMA}) -> Tensor",
)
def _bwd(*args: Any) -> torch.Tensor:
    grad_logp, grad_entropy, logp, entropy, log_norm, low, *rest = args
    logits, target, temperatures, temperature, start, _, backend = rest
    dense, settings = _prepare(logits, target, temperatures, temperature, start)
    rows = RowStats(log_norm, low, logp, entropy if entropy.numel() else None)
    return head_kernels(backend).logits_grad(dense, settings, rows, Upstream(grad_logp, grad_entropy))


@_fwd.register_fake
def _fwd_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    target, entropy = args[1], args[-1]

    def rows(count: int | torch.SymInt) -> torch.Tensor:
        return args[0].new_empty(count, dtype=torch.float32)

    size = target.shape[0]
    return rows(size), rows(size if entropy else 0), rows(size), rows(size)


@_bwd.register_fake
def _bwd_fake(*args: Any) -> torch.Tensor:
    return torch.empty_like(args[6], memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.settings = inputs[3:7]


def _backward(
    ctx: Any, grad_logp: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    *tensors, logp, entropy, log_norm, low = ctx.saved_tensors
    if grad_logp is None and grad_entropy is None:
        return (None,) * 8
    to_logp = torch.zeros_like(logp) if grad_logp is None else grad_logp.contiguous()
    to_entropy = None if grad_entropy is None or not entropy.numel() else grad_entropy.contiguous()
    grad = torch.ops.m2kernels.logprob_bwd(to_logp, to_entropy, logp, entropy, log_norm, low, *tensors, *ctx.settings)
    return grad, *(None,) * 7


def _no_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError("logprob has no second derivative")


_fwd.register_autograd(_backward, setup_context=_setup_context)
_bwd.register_autograd(_no_second_derivative)


def logprob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    backend: str = "auto",
) -> LogProb:
    """Log-prob of each row's target, and the entropy, of logits / temperature.

    Args:
        logits: [M, V], or this rank's [M, V/tp], float32, bfloat16 or float16; all arithmetic is in
            float32 or wider.
        target: int32 or int64 [M], global ids. Out of range, -100 too: ValueError on CPU, -inf elsewhere.
        temperature: a number over 0, or float32 [M].
        entropy: also return the entropy, differentiable as well.
        tp_group: process group that the vocabulary is sharded over; its collectives are those of
            :func:`m2kernels.linear_logprob`.
        vocab_start: global id of this shard's first column.
        backend: auto | triton | cpu | torch.

    Returns:
        LogProb(logp, entropy), float32 [M], differentiable once in the logits.

    Raises:
        ValueError: a wrong shape, dtype, device or option, shards that overlap or leave a gap, or a
            backend that cannot run.
    """
    if logits.dim() != 2:
        raise ValueError(f"{_OP}: logits has shape {list(logits.shape)}; expected [rows, vocabulary]")
    check_dtype(_OP, "logits", logits, FLOATS)
    if vocab_start < 0 or (vocab_start and tp_group is None):
        raise ValueError(f"{_OP}: got vocab_start {vocab_start} and tp_group {tp_group}; a shard needs its group")
    check_vector(_OP, "target", target, logits.shape[0])
    check_dtype(_OP, "target", target, INTEGERS)
    check_device(_OP, "target", target, logits)
    check_ids(_OP, "target", target, logits.shape[1] if tp_group is None else None)
    temperatures, scalar = check_temperature(_OP, temperature, logits.shape[0], logits)
    chosen = choose_backend(_OP, backend, lambda name: unsupported_reason(name, logits, logits.dtype), HEAD_BACKENDS)
    logp, measured, _, _ = torch.ops.m2kernels.logprob_fwd(
        logits, target, temperatures, scalar, vocab_start, group_name(tp_group), chosen, entropy
    )
    return LogProb(logp, measured if entropy else None)
