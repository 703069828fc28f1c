"""Per-token gradients of the policy loss, formed without autograd where a kernel can.

The fused head needs d loss / d logp of a chunk while its logits are at hand.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from m2kernels._backend import constant_when_compiled
from m2kernels._head_kernels import Upstream
from m2kernels._policy_loss_torch import look_up
from m2kernels.policy_loss import LossSpec, PolicyLoss, policy_loss, spec_arguments
from m2kernels.policy_loss import unsupported_reason as loss_reason

_HALF_DENOM = 16.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTerms:
    """What the loss needs besides logp and entropy; M tokens in packed order.

    Attributes:
        old_logp: f32[M] or None.
        advantage: f32[num_seqs], or [M] with per_token.
        seq: int[M], ascending.
        rollout_logp: f32[M] or None.
        ref_logp: f32[M] or None.
        spec: which loss.
        per_token: see advantage.
        denom: number that the sum of terms is divided by.
        divisor: 0-d tensor that it is divided by as well, never read on the host; or None.
    """

    old_logp: torch.Tensor | None
    advantage: torch.Tensor
    seq: torch.Tensor
    rollout_logp: torch.Tensor | None
    ref_logp: torch.Tensor | None
    spec: LossSpec
    per_token: bool
    denom: float
    divisor: torch.Tensor | None = None

    def couples_tokens(self) -> bool:
        """Does a token's gradient depend on the log-probs of its sequence's other tokens?"""
        weighed = self.spec.tis_cap is not None and self.spec.tis_level == "sequence"
        return self.spec.kind == "gspo" or (weighed and self.old_logp is None)

    def by_token(self) -> "PolicyTerms":
        """The same gradients from terms that can be cut anywhere: sequence weights in the advantage.

        For a loss that does not couple tokens. A weight is positive, so it may multiply the
        advantage inside min and clip as well as outside.
        """
        spec = self.spec
        if spec.tis_cap is None or spec.tis_level == "token" or self.couples_tokens():
            return self
        assert self.old_logp is not None
        advantage = self.advantage
        if not self.per_token:
            advantage = look_up(advantage, self.seq, torch.ones_like(self.seq, dtype=torch.bool))
        # The kernel's own weights: with ratio 1 and advantage 1, cispo's gradient is minus the weight.
        ones = replace(
            self,
            advantage=torch.ones_like(self.old_logp),
            ref_logp=None,
            spec=LossSpec(kind="cispo", tis_cap=spec.tis_cap, tis_level="sequence"),
            per_token=True,
            denom=1.0,
            divisor=None,
        )
        weight = ones.gradients(self.old_logp, torch.zeros_like(self.old_logp)).logp.neg()
        plain = replace(spec, tis_cap=None, tis_level="token")
        return replace(self, advantage=advantage * weight, spec=plain, per_token=True, rollout_logp=None)

    def hardly_divided(self) -> tuple["PolicyTerms", float | torch.Tensor]:
        """Terms whose gradients float16 holds, and the factor that makes them those of these terms.

        A token's gradient is about its advantage: a sixteenth of that neither underflows for p of 1e-5 nor
        overflows for a ratio of 1e5.
        """
        denom = self.denom if self.divisor is None else self.divisor
        return replace(self, denom=_HALF_DENOM, divisor=None), _HALF_DENOM / denom

    def take(self, part: slice) -> "PolicyTerms":
        """The terms of some tokens; whole sequences, if they couple."""

        def cut(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[part]

        return replace(
            self,
            old_logp=cut(self.old_logp),
            advantage=self.advantage[part] if self.per_token else self.advantage,
            seq=self.seq[part],
            rollout_logp=cut(self.rollout_logp),
            ref_logp=cut(self.ref_logp),
        )

    def loss(self, logp: torch.Tensor, entropy: torch.Tensor) -> PolicyLoss:
        """The loss and its metrics, from one deterministic reduction where a kernel does it."""
        return policy_loss(
            logp,
            self.old_logp,
            self.advantage,
            self.seq,
            denom=self.denom if self.divisor is None else self.divisor,
            spec=self.spec,
            per_token=self.per_token,
            entropy=entropy,
            rollout_logp=self.rollout_logp,
            ref_logp=self.ref_logp,
        )

    def gradients(self, logp: torch.Tensor, entropy: torch.Tensor) -> Upstream:
        """Of the loss in logp, and in the entropy where there is a bonus."""
        ops = torch.ops.m2kernels
        for backend, op in ((logp.device.type, "policy_loss_fwd"), ("triton", "policy_loss_triton_fwd")):
            if loss_reason(backend, logp) is None:
                return self._kernel_gradients(getattr(ops, op), logp, entropy)
        bonus = self.spec.entropy_coef != 0
        inputs = [x.detach().requires_grad_() for x in (logp, entropy)][: 2 if bonus else 1]
        with torch.enable_grad():
            loss = self.loss(inputs[0], inputs[1] if bonus else entropy).loss
        grads = torch.autograd.grad(loss, inputs)
        return Upstream(grads[0], grads[1] if bonus else None)

    def _kernel_gradients(self, op: Callable[..., Any], logp: torch.Tensor, entropy: torch.Tensor) -> Upstream:
        """A registered op forms gradients in its forward."""
        tensors = (logp, self.old_logp, self.advantage, self.seq, None, entropy, self.rollout_logp, self.ref_logp)
        dense = [None if x is None else x.contiguous() for x in tensors]
        found = op(*dense, *spec_arguments(self.spec), self.per_token, self.denom)
        grads = found[2:] if self.divisor is None else [g / self.divisor for g in found[2:]]
        return Upstream(grads[0], grads[1] if self.spec.entropy_coef != 0 else None)


@constant_when_compiled
def graph_reason(device: str) -> str | None:
    """Why :meth:`PolicyTerms.gradients` needs autograd on such a device, which is off inside a compiled op."""
    reasons = [f"{name}: {why}" for name in (device, "triton") if (why := loss_reason(name))]
    return "; ".join(reasons) if len(reasons) == 2 else None


def spec_to_args(spec: LossSpec) -> tuple[str, str, str, list[float]]:
    """A spec as arguments of an op: kind, kl, tis_level and numbers, where NaN stands for None."""
    dual = math.nan if spec.dual_clip is None else spec.dual_clip
    cap = math.nan if spec.tis_cap is None else spec.tis_cap
    numbers = [spec.clip_low, spec.clip_high, dual, spec.kl_coef, spec.entropy_coef, cap]
    return spec.kind, spec.kl, spec.tis_level, [float(x) for x in numbers]


def spec_from_args(kind: str, kl: str, tis_level: str, numbers: list[float]) -> LossSpec:
    """The inverse of :func:`spec_to_args`."""
    low, high, dual, kl_coef, entropy_coef, cap = numbers
    return LossSpec(
        kind=kind,
        clip_low=low,
        clip_high=high,
        dual_clip=None if math.isnan(dual) else dual,
        kl=kl,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        tis_cap=None if math.isnan(cap) else cap,
        tis_level=tis_level,
    )
