"""Policy loss over packed replies: GRPO with asymmetric clipping and importance weights, gradients included."""

from __future__ import annotations

from typing import Any

import torch

import m2kernels as mk
from m2kernels.reference import policy_loss_ref
from m2train.bench import peers, shapes
from m2train.bench.case import Case, Fn, Setup, Skip, case, compiled

SPEC = mk.LossSpec(tis_cap=2.0)


def _loss(backend: str, denom: float) -> Fn:
    def run(logp: Any, old: Any, rollout: Any, advantage: Any, seq: Any) -> torch.Tensor:
        loss, _ = mk.policy_loss(
            logp, old, advantage, seq, denom=denom, spec=SPEC, rollout_logp=rollout, backend=backend
        )
        return loss

    return run


def _oracle(denom: float, small: bool) -> Fn:
    """The oracle goes token by token; large batches take plain torch in float64, which tests tie to it."""
    if not small:
        return _loss("torch", denom)

    def run(logp: Any, old: Any, rollout: Any, advantage: Any, seq: Any) -> torch.Tensor:
        return policy_loss_ref(logp, old, advantage, seq, denom=denom, spec=SPEC, rollout_logp=rollout)

    return run


@case("policy_loss", shapes=shapes.rl_batches(), smoke=("32k",), nightly=("2k",), workload=shapes.as_batch)
def policy_loss(s: Setup) -> Case:
    """Clipped policy loss with metrics, on log-probs."""
    tokens, count = sum(s.lengths), len(s.lengths)
    denom = float(count * max(s.lengths))
    logp = -3 * s.rand(tokens)
    old, rollout = logp + 0.25 * s.randn(tokens), logp + 0.05 * s.randn(tokens)
    inputs = (logp, old, rollout, s.randn(count), s.segments(s.lengths))
    native = "cuda" if s.device.type == "cuda" else "cpu"
    why = mk.doctor()["policy_loss"][native]
    return Case(
        oracle=_oracle(denom, tokens <= 4096),
        inputs=inputs,
        grad=torch.ones((), device=s.device),
        wrt=(0,),
        impls={
            "m2": Skip(why) if why else _loss(native, denom),
            "torch": _loss("torch", denom),
            "compile": compiled(_loss("torch", denom)),
            "verl": peers.peer("verl", s.device, "verl.trainer.ppo.core_algos", lambda m: _verl(m, s, denom)),
        },
        # logp, old, rollout (4 B each) and seq (8 B) read, a gradient written; backward reads and writes it again.
        bytes={"fwd": 24.0 * tokens, "both": 32.0 * tokens},
        flops={"fwd": 40.0 * tokens, "both": 41.0 * tokens},
    )


def _verl(module: Any, s: Setup, denom: float) -> Fn:
    """verl takes padded rows [sequences, longest]; the padding is made outside of the clock, the mean is undone."""
    longest = max(s.lengths)
    rows = torch.tensor(s.lengths, device=s.device)
    mask = torch.arange(longest, device=s.device)[None] < rows[:, None]

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)

    def run(logp: Any, old: Any, rollout: Any, advantage: Any, seq: Any) -> torch.Tensor:
        weight = torch.exp(old - rollout).clamp(max=SPEC.tis_cap)
        loss = module.compute_policy_loss(
            old_log_prob=pad(old),
            log_prob=pad(logp),
            advantages=pad(advantage[seq] * weight),
            response_mask=mask.float(),
            cliprange_low=SPEC.clip_low,
            cliprange_high=SPEC.clip_high,
            clip_ratio_c=1e9,
        )[0]
        return loss * (logp.numel() / denom)

    return run
