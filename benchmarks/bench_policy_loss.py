"""Policy loss over packed replies: GRPO with asymmetric clipping and importance weights, gradients included.

Other trainers' maths runs in two layouts, which the name says: `-padded` on rows [sequences, longest], as they hold
them, of which much is padding where lengths are ragged; `-packed` on one row without any, as if they packed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import m2kernels as mk
from m2kernels.reference import policy_loss_ref
from m2train.bench import peers, shapes
from m2train.bench.case import Case, Fn, Setup, Skip, case, compiled

SPEC = mk.LossSpec(tis_cap=2.0)
LOW, HIGH = 1 - SPEC.clip_low, 1 + SPEC.clip_high


def _shapes() -> dict[str, dict[str, Any]]:
    """Steps of RL, and one of many short replies: 32768 tokens of 4096 sequences."""
    lengths = list(shapes.ragged(4096, 8, 64))
    spare, at = 32768 - sum(lengths), 0
    while spare:
        step = 1 if spare > 0 else -1
        if lengths[at] + step >= 1:
            lengths[at] += step
            spare -= step
        at = (at + 1) % len(lengths)
    short = {"group": 8, "prompts": shapes.ragged(512, 512, 4096, seed=1), "lengths": tuple(lengths)}
    return shapes.rl_batches() | {"32k-4096": short}


def _loss(backend: str, denom: float) -> Fn:
    def run(logp: Any, old: Any, rollout: Any, advantage: Any, seq: Any, *_: Any) -> torch.Tensor:
        loss, _ = mk.policy_loss(
            logp, old, advantage, seq, denom=denom, spec=SPEC, rollout_logp=rollout, backend=backend
        )
        return loss

    return run


def _oracle(denom: float, small: bool) -> Fn:
    """The oracle goes token by token; large batches take plain torch in float64, which tests tie to it."""
    if not small:
        return _loss("torch", denom)

    def run(logp: Any, old: Any, rollout: Any, advantage: Any, seq: Any, *_: Any) -> torch.Tensor:
        return policy_loss_ref(logp, old, advantage, seq, denom=denom, spec=SPEC, rollout_logp=rollout)

    return run


# ---- The same loss as other trainers write it, on rows [sequences, longest], or [1, M].


class Rows(NamedTuple):
    """The batch as such a trainer has it before its loss; made outside of the clock, importance weights too."""

    logp: torch.Tensor
    old: torch.Tensor
    weight: torch.Tensor
    advantage: torch.Tensor  # [sequences, 1]; of each token where all are in one row
    mask: torch.Tensor  # float, 1 where there is a token
    at: torch.Tensor  # int64 [M], flat place of each token


class _AsRows(torch.autograd.Function):
    """Stands for the log-probs in that layout; backward picks each token's gradient (under 1 % of the time)."""

    @staticmethod
    def forward(ctx: Any, logp: torch.Tensor, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(at)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (at,) = ctx.saved_tensors
        return grad.reshape(-1).index_select(0, at), None, None


def packed(logp: Any, old: Any, rollout: Any, advantage: Any, seq: Any) -> Rows:
    """Packed tensors as one row."""
    weight = (old - rollout).exp().clamp(max=SPEC.tis_cap)
    at = torch.arange(len(logp), device=logp.device)
    rows = (x[None].clone() for x in (logp, old, weight, advantage[seq], torch.ones_like(logp)))
    return Rows(*rows, at)


def padded(lengths: tuple[int, ...], logp: Any, old: Any, rollout: Any, advantage: Any) -> Rows:
    """Packed tensors -> rows with zeros behind each sequence."""
    rows = torch.tensor(lengths, device=logp.device)
    mask = torch.arange(max(lengths), device=logp.device)[None] < rows[:, None]

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)

    weight = (old - rollout).exp().clamp(max=SPEC.tis_cap)
    at = mask.reshape(-1).nonzero()[:, 0]
    return Rows(pad(logp), pad(old), pad(weight), advantage[:, None].clone(), mask.to(logp.dtype), at)


def _on_rows(loss: Any, denom: float, layout: str = "padded") -> Fn:
    """`loss` of Rows -> a sum over tokens, which is divided as ours is."""

    def run(logp: Any, old: Any, rollout: Any, advantage: Any, seq: Any, *rest: Any) -> torch.Tensor:
        size = len(Rows._fields)
        batch = Rows(*(rest[:size] if layout == "padded" else rest[size:]))
        value: torch.Tensor = loss(batch._replace(logp=_AsRows.apply(logp, batch.logp, batch.at)))
        return value / denom

    return run


def trl_formula(b: Rows) -> torch.Tensor:
    """The maths of TRL's GRPOTrainer, with its clip fractions: a method of the trainer, so restated here."""
    ratio = torch.exp(b.logp - b.old)
    clipped = torch.clamp(ratio, LOW, HIGH)
    per_token = -torch.min(ratio * b.advantage, clipped * b.advantage) * b.weight
    loss = (per_token * b.mask).sum()
    with torch.no_grad():
        low = (ratio < LOW) & (b.advantage < 0)
        high = (ratio > HIGH) & (b.advantage > 0)
        count = b.mask.sum()
        for share in (low, high, low | high):
            (share * b.mask).sum() / count
    return loss


def verl_formula(b: Rows) -> torch.Tensor:
    """The maths of verl's vanilla policy loss, with its metrics: the module wants Ray, so restated here."""
    count = b.mask.sum() + 1e-8
    gap = torch.clamp(b.logp - b.old, min=-20.0, max=20.0)
    ratio = torch.exp(gap)
    (-gap * b.mask).sum() / count
    plain, clipped = -b.advantage * ratio, -b.advantage * torch.clamp(ratio, LOW, HIGH)
    worse = torch.maximum(plain, clipped)
    (torch.gt(clipped, plain).float() * b.mask).sum() / count
    floor = -b.advantage * 1e9
    kept = torch.min(floor, worse)
    (torch.gt(worse, floor) * (b.advantage < 0).float() * b.mask).sum() / count
    per_token = torch.where(b.advantage < 0, kept, worse) * b.weight
    return (per_token * b.mask).sum()


def _verl(module: Any) -> Any:
    """verl's own function; it has a mean over tokens, which is undone."""

    def loss(b: Rows) -> torch.Tensor:
        value: torch.Tensor = module.compute_policy_loss(
            old_log_prob=b.old,
            log_prob=b.logp,
            advantages=b.advantage * b.weight,
            response_mask=b.mask,
            cliprange_low=SPEC.clip_low,
            cliprange_high=SPEC.clip_high,
            clip_ratio_c=1e9,
        )[0]
        return value * b.mask.sum()

    return loss


@case("policy_loss", shapes=_shapes(), smoke=("32k",), nightly=("2k",), workload=shapes.as_batch)
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
        inputs=(*inputs, *padded(s.lengths, *inputs[:4]), *packed(*inputs)),
        least_read=sum(x.nbytes for x in inputs),
        grad=torch.ones((), device=s.device),
        wrt=(0,),
        impls={
            "m2": Skip(why) if why else _loss(native, denom),
            "torch": _loss("torch", denom),
            "compile": compiled(_loss("torch", denom)),
            "trl-padded": _on_rows(trl_formula, denom),
            "verl-padded": _on_rows(verl_formula, denom),
            "trl-packed": _on_rows(trl_formula, denom, "packed"),
            "verl-packed": _on_rows(verl_formula, denom, "packed"),
            "verl": peers.peer(
                "verl", s.device, "verl.trainer.ppo.core_algos", lambda m: _on_rows(_verl(m), denom), bare=True
            ),
        },
        # logp, old, rollout (4 B each) and seq (8 B) read, a gradient written; backward reads and writes it again.
        bytes={"fwd": 24.0 * tokens, "both": 32.0 * tokens},
        flops={"fwd": 40.0 * tokens, "both": 41.0 * tokens},
    )
