"""Policy loss of GRPO, GSPO and CISPO over packed tokens, with its metrics, in one pass.

Maths, for token t of sequence s with advantage A (Baichuan-M2, eq. 2, when denom is
groups * G * l_max):

    x = logp - old_logp, r = exp(x)          grpo, cispo
    r = exp(mean of x over the sequence)     gspo
    term = w min(r A, clip(r, 1 - lo, 1 + hi) A)              grpo, gspo; A < 0: not below c A
    term = w stop_grad(clip(r, 1 - lo, 1 + hi)) A logp        cispo
    term += -kl_coef k(logp, ref_logp) + entropy_coef entropy
    k1 = y, k2 = y^2 / 2, k3 = exp(-y) + y - 1, y = logp - ref_logp
    loss = -sum(terms) / denom

w = stop_grad(min(exp(old_logp - rollout_logp), tis_cap)) corrects for the rollout engine's own
log-probs, per token or from the sequence's sum. gspo has one term a sequence: the mean over its
live tokens of what stands above, which for one advantage and no w is the paper's.

Traffic: 4 to 28 B read and 4 B written a token; a GPU is launch-bound (two launches, one more in
backward). Trick: gradients are formed in the forward, where everything they need is in
registers, so backward only scales them; sums are in double and in a fixed order.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from m2kernels._backend import choose_backend
from m2kernels._check import INTEGERS, check_device, check_dtype, check_vector
from m2kernels._native import CPU_ERROR, machine_reason
from m2kernels._policy_loss_torch import policy_loss_torch
from m2kernels._triton import triton_reason
from m2kernels.metrics import FINAL_METRICS, RAW_METRICS, metrics_from_stats

KINDS = ("grpo", "gspo", "cispo")
KLS = ("none", "k1", "k2", "k3")
TIS_LEVELS = ("token", "sequence")
_OP = "policy_loss"
_FWD_SCHEMA = (
    "(Tensor logp, Tensor? old_logp, Tensor advantage, Tensor seq, Tensor? mask, Tensor? entropy, "
    "Tensor? rollout_logp, Tensor? ref_logp, int kind, int kl, float clip_low, float clip_high, "
    "float dual_clip, float kl_coef, float entropy_coef, float tis_cap, bool tis_sequence, "
    "bool per_token, float denom) -> (Tensor, Tensor, Tensor, Tensor)"
)
_BWD_SCHEMA = "(Tensor grad, Tensor grad_logp, Tensor grad_entropy) -> (Tensor, Tensor)"


@dataclass(frozen=True, slots=True)
class LossSpec:
    """Which policy loss. Frozen: it may be shared between threads and used as a key.

    Attributes:
        kind: grpo | gspo | cispo.
        clip_low: the ratio is clipped below at 1 - clip_low; in [0, 1].
        clip_high: and above at 1 + clip_high; at least 0.
        dual_clip: for A < 0 the term is kept from falling below dual_clip * A; over 1. None: off.
        kl: estimator of the divergence from the reference: none | k1 | k2 | k3.
        kl_coef: its weight.
        entropy_coef: weight of the entropy bonus.
        tis_cap: cap of the truncated importance weight. None: the weight is 1; its metrics are
            still measured, without a cap, where rollout_logp is given.
        tis_level: one weight per "token", or per "sequence".
    """

    kind: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    kl: str = "none"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    tis_cap: float | None = None
    tis_level: str = "token"

    def __post_init__(self) -> None:
        """Raise ValueError for an option that has no meaning, alone or beside another."""
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("kl", self.kl, KLS),
            ("tis_level", self.tis_level, TIS_LEVELS),
        ):
            if value not in allowed:
                raise ValueError(f"LossSpec: got {name} {value!r}; expected one of {allowed}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"LossSpec: got clip_low {self.clip_low}; expected 0 to 1")
        if not self.clip_high >= 0:
            raise ValueError(f"LossSpec: got clip_high {self.clip_high}; expected at least 0")
        for name in ("kl_coef", "entropy_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"LossSpec: got {name} {getattr(self, name)}; expected a number")
        if self.dual_clip is not None:
            if not (self.dual_clip > 1 and math.isfinite(self.dual_clip)):
                raise ValueError(f"LossSpec: got dual_clip {self.dual_clip}; expected over 1")
            if self.kind == "cispo":
                raise ValueError("LossSpec: dual_clip has no meaning for cispo; leave it None")
        if self.kl == "none" and self.kl_coef != 0:
            raise ValueError(f"LossSpec: kl_coef is {self.kl_coef} but kl is 'none'; name a kl")
        if self.tis_cap is not None and not (self.tis_cap > 0 and math.isfinite(self.tis_cap)):
            raise ValueError(f"LossSpec: got tis_cap {self.tis_cap}; expected over 0, or None")


class PolicyLoss(NamedTuple):
    """What :func:`policy_loss` returns.

    Attributes:
        loss: 0-d, differentiable in logp and entropy.
        metrics: named 0-d float32 tensors on the op's device; see :mod:`m2kernels.metrics`.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def unsupported_reason(backend: str, logp: torch.Tensor | None = None) -> str | None:
    """Why `backend` (cuda | cpu | triton | torch) cannot run here, or on this logp; None if it can."""
    if backend == "torch":
        return None
    if logp is not None and logp.dtype != torch.float32:
        return f"logp is {logp.dtype}; the kernels take float32"
    if backend == "triton":
        return triton_reason(None if logp is None else logp.device.type)
    if logp is not None and logp.device.type != backend:
        return f"logp is on {logp.device.type}"
    return machine_reason(backend)


def _policy_loss_fake(logp: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    entropy, entropy_coef = args[4], args[12]
    stats = logp.new_empty(len(RAW_METRICS) + len(FINAL_METRICS))
    num_entropy = logp.shape[0] if entropy is not None and entropy_coef != 0 else 0
    return logp.new_empty(()), stats, torch.empty_like(logp), logp.new_empty(num_entropy)


def _policy_loss_bwd_fake(
    grad: torch.Tensor, grad_logp: torch.Tensor, grad_entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(grad_logp), torch.empty_like(grad_entropy)


def _upstream_factor(grad_loss: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """What backward multiplies by: NaN where the loss is. Ids out of range say so by it on a GPU, without a wait."""
    return torch.add(grad_loss, loss, alpha=0)


def _backward_of(op: str) -> Callable[..., tuple[Any, ...]]:
    """Backward of the forward op, by the op named `op`."""

    def backward(ctx: Any, grad_loss: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
        loss, grad_logp, grad_entropy = ctx.saved_tensors
        to_logp, to_entropy = getattr(torch.ops.m2kernels, op)(
            _upstream_factor(grad_loss, loss), grad_logp, grad_entropy
        )
        grads: list[Any] = [None] * 19
        grads[0] = to_logp
        if grad_entropy.numel():
            grads[5] = to_entropy
        return tuple(grads)

    return backward


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    loss, stats, grad_logp, grad_entropy = output
    ctx.mark_non_differentiable(stats, grad_logp, grad_entropy)
    ctx.save_for_backward(loss, grad_logp, grad_entropy)


def _no_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError("policy_loss has no second derivative; use backend='torch' for one")


def _policy_loss_triton_fwd(*args: Any) -> tuple[torch.Tensor, ...]:
    from m2kernels._policy_loss_triton import policy_loss_triton_fwd

    return policy_loss_triton_fwd(*args)


def _policy_loss_triton_bwd(*args: Any) -> tuple[torch.Tensor, ...]:
    from m2kernels._policy_loss_triton import policy_loss_triton_bwd

    return policy_loss_triton_bwd(*args)


def _register(fwd: str, bwd: str) -> None:
    """What an op needs besides its kernels: shapes for tracing, and its gradient."""
    torch.library.register_fake(fwd, _policy_loss_fake)
    torch.library.register_fake(bwd, _policy_loss_bwd_fake)
    backward = _backward_of(bwd.removeprefix("m2kernels::"))
    torch.library.register_autograd(fwd, backward, setup_context=_setup_context)
    torch.library.register_autograd(bwd, _no_second_derivative)


if CPU_ERROR is None:
    _register("m2kernels::policy_loss_fwd", "m2kernels::policy_loss_bwd")
torch.library.custom_op(
    "m2kernels::policy_loss_triton_fwd", _policy_loss_triton_fwd, mutates_args=(), schema=_FWD_SCHEMA
)
torch.library.custom_op(
    "m2kernels::policy_loss_triton_bwd", _policy_loss_triton_bwd, mutates_args=(), schema=_BWD_SCHEMA
)
_register("m2kernels::policy_loss_triton_fwd", "m2kernels::policy_loss_triton_bwd")


def _check_inputs(
    logp: torch.Tensor,
    advantage: torch.Tensor,
    seq: torch.Tensor,
    mask: torch.Tensor | None,
    per_token: bool,
    optional: dict[str, torch.Tensor | None],
    op: str = _OP,
) -> None:
    """Raise ValueError for a wrong shape, dtype or device."""
    check_vector(op, "logp", logp)
    check_dtype(op, "logp", logp, (torch.float32, torch.float64))
    num_tokens = logp.shape[0]
    floats = {"advantage": advantage, **{k: v for k, v in optional.items() if v is not None}}
    for name, tensor in floats.items():
        short = name == "advantage" and not per_token
        check_vector(op, name, tensor, None if short else num_tokens)
        check_dtype(op, name, tensor, (logp.dtype,))
        check_device(op, name, tensor, logp)
    check_vector(op, "seq", seq, num_tokens)
    check_dtype(op, "seq", seq, INTEGERS)
    check_device(op, "seq", seq, logp)
    if mask is not None:
        check_vector(op, "mask", mask, num_tokens)
        check_dtype(op, "mask", mask, (torch.bool,))
        check_device(op, "mask", mask, logp)


def _check_spec(spec: LossSpec, optional: dict[str, torch.Tensor | None], op: str = _OP) -> None:
    """Raise ValueError when the spec needs a tensor that is not there."""
    for name, needed, setting in (
        ("entropy", spec.entropy_coef != 0, f"entropy_coef={spec.entropy_coef}"),
        ("ref_logp", spec.kl_coef != 0, f"kl_coef={spec.kl_coef}"),
        ("rollout_logp", spec.tis_cap is not None, f"tis_cap={spec.tis_cap}"),
    ):
        if needed and optional[name] is None:
            raise ValueError(f"{op}: the spec has {setting} but {name} is None; pass {name}")


def _number(denom: float | torch.Tensor, op: str = _OP) -> float:
    """A denominator that is a number, checked; a tensor divides later, so that nothing syncs."""
    if isinstance(denom, torch.Tensor):
        if denom.numel() != 1:
            raise ValueError(f"{op}: denom has shape {list(denom.shape)}; expected one number")
        return 1.0
    if not 0 < denom < math.inf:  # not math.isfinite: torch.compile makes guards of comparisons
        raise ValueError(f"{op}: got denom {denom}; expected a number over 0, such as groups * G * l_max")
    return float(denom)


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    seq: torch.Tensor,
    *,
    denom: float | torch.Tensor,
    spec: LossSpec | None = None,
    per_token: bool = False,
    mask: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    rollout_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Policy loss and its metrics over M packed tokens (Baichuan-M2, eq. 2).

    Padded tensors [B, T] with a bool response mask [B, T] are packed by indexing: logp[mask], and
    seq = mask.nonzero()[:, 0].

    Args:
        logp: float32 [M], log-probs under the policy; differentiable once (twice with backend
            torch). float64 is taken by backend torch; other float tensors have the same dtype.
        old_logp: [M], those of the policy that is improved upon. None: on-policy, the ratio is 1
            and has a gradient.
        advantage: [num_seqs], looked up by seq; with per_token [M].
        seq: int32 or int64 [M], ascending over all tokens, masked ones included: the sequence of
            each token. Ids out of order, or out of range where live, make the loss NaN (metric
            num_bad_seq); eager on CPU they raise.
        denom: what the sum is divided by, over all ranks and micro-batches; over 0. A 0-d tensor is not
            read on the host. In others' terms: token-mean is the number of live tokens; a sum over
            fixed lengths (Dr. GRPO) is sequences * l_max; a mean over sequences of token means is the
            number of sequences, with each advantage divided by its sequence's live tokens (a kl and
            an entropy term are not: they stay weighted per token).
        spec: which loss; None is LossSpec().
        per_token: the advantage is given per token.
        mask: bool [M]; False: the token adds nothing, whatever it holds. None: all are live.
        entropy: [M], differentiable; needed when spec.entropy_coef is not 0.
        rollout_logp: [M], log-probs that the rollout engine reported; needed for spec.tis_cap.
        ref_logp: [M], the reference policy's; needed when spec.kl_coef is not 0.
        backend: auto | cuda | cpu | triton | torch.

    Returns:
        PolicyLoss(loss, metrics).

    Raises:
        ValueError: a wrong shape, dtype, device or option, a missing tensor, bad ids (CPU), or a
            backend that cannot run.
    """
    spec = LossSpec() if spec is None else spec
    optional = {"old_logp": old_logp, "entropy": entropy, "rollout_logp": rollout_logp}
    optional["ref_logp"] = ref_logp
    _check_inputs(logp, advantage, seq, mask, per_token, optional)
    _check_spec(spec, optional)
    number = _number(denom)
    chosen = choose_backend(_OP, backend, lambda name: unsupported_reason(name, logp))
    fixed = {k: None if v is None else v.detach() for k, v in optional.items() if k != "entropy"}
    implementation = policy_loss_torch
    if chosen != "torch":
        ops = torch.ops.m2kernels
        op = ops.policy_loss_triton_fwd if chosen == "triton" else ops.policy_loss_fwd
        implementation = functools.partial(_policy_loss_op, op)
    loss, metrics = implementation(logp, advantage.detach(), seq, number, spec, per_token, mask, entropy, **fixed)
    if logp.device.type == "cpu" and not torch.compiler.is_compiling():
        _raise_bad_seq(metrics["num_bad_seq"])
    if isinstance(denom, torch.Tensor):
        loss = loss / denom.detach().reshape(()).to(loss.dtype)
    return PolicyLoss(loss, metrics)


def spec_arguments(spec: LossSpec) -> tuple[int | float | bool, ...]:
    """A spec as the registered op takes it."""
    return (
        KINDS.index(spec.kind),
        KLS.index(spec.kl),
        float(spec.clip_low),
        float(spec.clip_high),
        math.inf if spec.dual_clip is None else float(spec.dual_clip),
        float(spec.kl_coef),
        float(spec.entropy_coef),
        math.inf if spec.tis_cap is None else float(spec.tis_cap),
        spec.tis_level == "sequence",
    )


def _policy_loss_op(
    op: Callable[..., tuple[torch.Tensor, ...]],
    logp: torch.Tensor,
    advantage: torch.Tensor,
    seq: torch.Tensor,
    denom: float,
    spec: LossSpec,
    per_token: bool,
    mask: torch.Tensor | None,
    entropy: torch.Tensor | None,
    *,
    old_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Call a registered op: Triton's, or the native one, CPU or CUDA by the tensors' device."""

    def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.contiguous()

    loss, stats, _, _ = op(
        logp.contiguous(),
        dense(old_logp),
        advantage.contiguous(),
        seq.contiguous(),
        dense(mask),
        dense(entropy),
        dense(rollout_logp),
        dense(ref_logp),
        *spec_arguments(spec),
        per_token,
        denom,
    )
    # The op's backward reads its own loss; the caller's may be changed in place (`loss /= n`).
    return loss.clone(), metrics_from_stats(stats)


def _raise_bad_seq(num_bad: torch.Tensor, op: str = _OP) -> None:
    if num_bad.item() > 0:
        raise ValueError(
            f"{op}: seq has {int(num_bad)} ids that are out of order, or that have no advantage; "
            "expected ascending ids below the number of advantages; sort the tokens by sequence"
        )
