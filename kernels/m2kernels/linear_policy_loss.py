"""Policy loss straight from hidden states and the LM head: logits once, for the loss and for its gradients.

The maths is that of :mod:`m2kernels.linear_logprob` followed by :mod:`m2kernels.policy_loss`. As
d loss / d logp of a token depends on that token alone (the denominator is the caller's), a chunk's
logits become its gradient while they are at hand: three GEMMs (logits, dX, dW) where recomputing
takes four, and dX, dW are formed from rows with a non-zero gradient alone. On a CPU a chunk that is the
only one waits for the factor of backward, which the GEMMs then multiply by: a pass over dW less, and no
GEMM in vain where no backward comes. Losses that couple a
sequence's tokens (gspo; sequence weights of an on-policy loss) take chunks of whole sequences; where
one sequence is longer than a chunk, all rows are done twice instead.

On a GPU the host reads one number a chunk (how many rows have a gradient; gspo: the sequences' lengths
as well), behind work that is queued already, so a call cannot be captured in a CUDA graph.

With `main_grad` and `grad_scale` dW goes into the trainer's buffer in the forward and no copy of it
exists. That is once for each forward that will have a backward: the forward that activation
checkpointing runs again, before or after the backward of one that was already counted, adds nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from m2kernels._head import HEAD_SCHEMA, HeadProblem, head_reason
from m2kernels._head_check import make_problem
from m2kernels._head_grads import WeightTarget
from m2kernels._head_policy import LinearPolicyLoss, loss_and_grads
from m2kernels._main_grad import Counted, check_factor, check_main_grad, count
from m2kernels._policy_grads import PolicyTerms, graph_reason, spec_from_args, spec_to_args
from m2kernels._policy_loss_torch import count_bad_seq
from m2kernels.metrics import FINAL_METRICS, RAW_METRICS, metrics_from_stats
from m2kernels.policy_loss import LossSpec, _check_inputs, _check_spec, _number, _raise_bad_seq, _upstream_factor

_OP = "linear_policy_loss"
_NUM_ARGS = len(HeadProblem.__slots__)


def unsupported_reason(
    backend: str, hidden: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Why `backend` (triton | cpu | torch) cannot run here, or with GEMMs of `dtype` on this hidden."""
    return head_reason(backend, hidden, dtype)


@dataclass(slots=True)
class _Call:
    """What goes into the autograd function besides its differentiable tensors, and comes out."""

    problem: HeadProblem
    terms: PolicyTerms
    main_grad: torch.Tensor | None
    grad_scale: float | None
    enabled: bool
    metrics: dict[str, torch.Tensor] | None = None


class _LinearPolicyLoss(torch.autograd.Function):
    """Hands its gradients over in backward, times what it brings; writes main_grad once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: _Call
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, logp, entropy); the metrics go into `call`."""
        hidden_, weight_, bias_ = (call.enabled and need for need in ctx.needs_input_grad[:3])
        needs = (hidden_, weight_, bias_)
        ctx.main_grad, ctx.grad_scale = None, call.grad_scale
        counted: Counted | None = None
        target = WeightTarget()
        if call.main_grad is not None and needs[1]:
            if call.grad_scale is None:
                ctx.main_grad = call.main_grad
                target = WeightTarget(wide=True)
            else:
                counted = count(call.main_grad, call.problem.target)
                if counted is None:
                    needs = (needs[0], False, needs[2])
                else:
                    target = WeightTarget(call.main_grad, call.grad_scale)
        ctx.counted = counted
        out, ctx.sums = loss_and_grads(call.problem, call.terms, needs, target)
        ctx.has_sums, ctx.added = ctx.sums is not None, target.into is not None
        if ctx.sums is not None and ctx.sums.waiting is not None:
            ctx.save_for_backward(hidden, weight)  # so that whoever overwrites them before backward is told
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        call.metrics, ctx.loss = out.metrics, out.loss.detach()
        ctx.mark_non_differentiable(out.logp, out.entropy)
        return out.loss, out.logp, out.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
        """Finish what the forward began."""
        sums, ctx.sums = ctx.sums, None
        if sums is None and ctx.has_sums:
            raise RuntimeError(
                f"{_OP}: a second backward; the first has handed the gradients over, call the op again"
            )
        _ = ctx.saved_tensors
        if ctx.grad_scale is not None:
            check_factor(_OP, grad_loss, ctx.grad_scale)
        grads: list[torch.Tensor | None] = [None, None, None]
        if sums is not None:
            factor = _upstream_factor(grad_loss, ctx.loss)
            grads = list(sums.finish(factor if factor.is_cuda else float(factor), ctx.main_grad))
        if ctx.added:
            grads[1] = None
        return *(g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)), None


# ---- The same under torch.compile: one opaque op, whose gradients are outputs.
_SPEC_SCHEMA = "str kind, str kl, str tis_level, float[] numbers"


def _grad_dtype(x: torch.Tensor) -> torch.dtype:
    """Of the gradient of `x` before the factor of backward: float16 waits for a loss scale."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


@torch.library.custom_op(
    "m2kernels::linear_policy_loss_fwd",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),  # it waits for counts on the host
    schema=f"({HEAD_SCHEMA}, Tensor? old_logp, Tensor advantage, Tensor seq, Tensor? rollout_logp, "
    f"Tensor? ref_logp, {_SPEC_SCHEMA}, bool per_token, float denom, Tensor? divisor, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _fwd(*args: Any) -> tuple[torch.Tensor, ...]:
    problem, rest = HeadProblem(*args[:_NUM_ARGS]), args[_NUM_ARGS:]
    old_logp, advantage, seq, rollout_logp, ref_logp, *spec, per_token, denom, divisor, needs = rest
    terms = PolicyTerms(
        old_logp=old_logp, advantage=advantage, seq=seq, rollout_logp=rollout_logp, ref_logp=ref_logp,
        spec=spec_from_args(*spec), per_token=per_token, denom=denom, divisor=divisor,
    )  # fmt: skip
    out, sums = loss_and_grads(problem, terms, tuple(needs), WeightTarget())
    grads = (None, None, None) if sums is None else sums.finish()
    given = [g if g is None else g.to(_grad_dtype(x)) for g, x in zip(grads, args[:3], strict=True)]
    stats = torch.stack(tuple(out.metrics[key] for key in RAW_METRICS + FINAL_METRICS))
    return (
        out.loss,
        out.logp.clone(),
        out.entropy.clone(),
        stats,
        *(out.logp.new_empty(0) if g is None else g for g in given),
    )


@_fwd.register_fake
def _fwd_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    hidden, target, needs = args[0], args[3], args[-1]
    row = hidden.new_empty(target.shape[0], dtype=torch.float32)
    stats = row.new_empty(len(RAW_METRICS) + len(FINAL_METRICS))
    grads = (
        torch.empty_like(x, dtype=_grad_dtype(x), memory_format=torch.contiguous_format)
        if need and x is not None
        else row.new_empty(0)
        for x, need in zip(args[:3], needs, strict=True)
    )
    return row.new_empty(()), row, torch.empty_like(row), stats, *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[0], *output[4:])
    ctx.needs = inputs[-1]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, grad_loss: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
    loss, *grads = ctx.saved_tensors
    factor = _upstream_factor(grad_loss, loss)
    scaled = [
        (g * factor).to(dtype) if need else None  # the factor as it is: a loss scale may exceed what g's dtype holds
        for g, dtype, need in zip(grads, ctx.dtypes, ctx.needs, strict=True)
    ]
    return *scaled, *(None for _ in range(ctx.num_inputs - 3))


_fwd.register_autograd(_backward, setup_context=_setup_context)


def _compiled(problem: HeadProblem, terms: PolicyTerms, needs: list[bool]) -> LinearPolicyLoss:
    reason = graph_reason(problem.hidden.device.type)
    if reason is not None:
        raise ValueError(
            f"{_OP}: torch.compile needs a kernel of the policy loss ({reason}); leave the call uncompiled"
        )
    loss, logp, entropy, stats, *_ = torch.ops.m2kernels.linear_policy_loss_fwd(
        *problem.args(), terms.old_logp, terms.advantage, terms.seq, terms.rollout_logp, terms.ref_logp,
        *spec_to_args(terms.spec), terms.per_token, terms.denom, terms.divisor, needs,
    )  # fmt: skip
    return LinearPolicyLoss(loss.clone(), logp, entropy, metrics_from_stats(stats))  # as in policy_loss


def _check_seq(seq: torch.Tensor, num: int | None) -> None:
    """As :func:`m2kernels.policy_loss` does after its pass: here main_grad has been added to by then."""
    if seq.device.type == "cpu" and not torch.compiler.is_compiling():
        _raise_bad_seq(count_bad_seq(seq, torch.ones_like(seq, dtype=torch.bool), num), _OP)


def _make_terms(
    like: torch.Tensor,
    advantage: torch.Tensor,
    seq: torch.Tensor,
    denom: float | torch.Tensor,
    spec: LossSpec,
    per_token: bool,
    given: dict[str, torch.Tensor | None],
) -> PolicyTerms:
    """The arguments of the loss, checked for log-probs like `like`; raises ValueError."""
    _check_inputs(like, advantage, seq, None, per_token, given, _OP)
    _check_spec(spec, {**given, "entropy": like}, _OP)
    _check_seq(seq, None if per_token else advantage.shape[0])
    old_logp, rollout_logp, ref_logp = (None if x is None else x.detach() for x in given.values())
    return PolicyTerms(
        old_logp=old_logp,
        rollout_logp=rollout_logp,
        ref_logp=ref_logp,
        advantage=advantage.detach(),
        seq=seq,
        spec=spec,
        per_token=per_token,
        denom=_number(denom, _OP),
        divisor=denom.detach().reshape(()).float() if isinstance(denom, torch.Tensor) else None,
    )


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    seq: torch.Tensor,
    *,
    denom: float | torch.Tensor,
    spec: LossSpec | None = None,
    per_token: bool = False,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    rollout_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    main_grad: torch.Tensor | None = None,
    grad_scale: float | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> LinearPolicyLoss:
    """Policy loss of M tokens, given the hidden states that predict them; gradients are formed here.

    Arguments that are not listed are those of :func:`m2kernels.linear_logprob`.

    Args:
        hidden: [N, D]; its gradient is this rank's part, as there.
        old_logp: f32[M], or None: on-policy, the ratio is 1 and has a gradient.
        advantage: f32[num_seqs], looked up by seq; with per_token f32[M].
        seq: int[M], ascending: the sequence of each token. Masked tokens are those that `rows`,
            `target` and all of these leave out.
        denom: what the sum is divided by; over 0. A 0-d tensor is not read on the host.
        spec: which loss; None is LossSpec().
        per_token: the advantage is given per token.
        rollout_logp: f32[M]; needed for spec.tis_cap.
        ref_logp: f32[M]; needed when spec.kl_coef is not 0.
        main_grad: float32 [V or V/tp, D] that dW is added to, exactly once; the weight itself then
            gets no gradient. Eager only.
        grad_scale: the factor that backward will bring (Megatron: loss scale / micro-batches). dW
            times it is added in the forward, and no copy of dW is made; a backward that brings
            another factor raises ValueError (on a GPU, where nothing waits for the comparison, the
            device's assertion fails). None: dW is kept, and added in backward.

    Returns:
        LinearPolicyLoss(loss, logp, entropy, metrics). One backward, with any upstream gradient
        (unless grad_scale names it); a second one raises RuntimeError.

    Raises:
        ValueError: a wrong shape, dtype, device or option, bad ids (CPU), a backend that cannot run.
    """
    spec = LossSpec() if spec is None else spec
    problem = make_problem(
        _OP, hidden, weight, target, rows=rows, bias=bias, temperature=temperature, softcap=softcap,
        vocab_size=vocab_size, tp_group=tp_group, vocab_start=vocab_start, backend=backend,
        chunk_bytes=chunk_bytes,
    )  # fmt: skip
    like = torch.empty(target.shape[0], dtype=torch.float32, device=hidden.device)
    given = {"old_logp": old_logp, "rollout_logp": rollout_logp, "ref_logp": ref_logp}
    terms = _make_terms(like, advantage, seq, denom, spec, per_token, given)
    check_main_grad(_OP, main_grad, grad_scale, weight)
    if problem.dtype == torch.float16 and grad_scale is not None and terms.divisor is not None:
        raise ValueError(f"{_OP}: got denom as a tensor with grad_scale in float16; pass denom as a number")
    if torch.compiler.is_compiling():
        grad = torch.is_grad_enabled()
        needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        return _compiled(problem, terms, needs)
    call = _Call(problem, terms, main_grad, grad_scale, torch.is_grad_enabled())
    loss, logp, entropy = _LinearPolicyLoss.apply(hidden, weight, bias, call)
    assert call.metrics is not None
    return LinearPolicyLoss(loss, logp, entropy, call.metrics)
