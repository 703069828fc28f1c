"""The policy loss with plain torch ops: the readable reference, any float dtype, any device.

Differentiable by autograd, twice if need be. Sums over sequences use index_add, which on a GPU is
not deterministic; the kernels are.
"""

from typing import TYPE_CHECKING

import torch

from m2kernels.metrics import finish_metrics

if TYPE_CHECKING:
    from m2kernels.policy_loss import LossSpec

MAX_LOG_RATIO = 88.7  # a ratio stays finite in fp32, so that a zero advantage gives a zero
MAX_ESS_WEIGHT = 1e15  # and so does the square of a weight in the effective sample size


def _ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _kl(kind: str, y: torch.Tensor) -> torch.Tensor:
    """k(logp, ref_logp) of y = logp - ref_logp; k3 when the spec names none (a metric only)."""
    if kind == "k1":
        return y
    if kind == "k2":
        return 0.5 * y.square()
    return torch.expm1(-y) + y


def count_bad_seq(seq: torch.Tensor, live: torch.Tensor, limit: int | None) -> torch.Tensor:
    """Ids below the one before, and ids of live tokens outside [0, limit)."""
    bad = (seq[1:] < seq[:-1]).sum()
    if limit is not None:
        bad = bad + (live & ((seq < 0) | (seq >= limit))).sum()
    return bad


def _policy_term(
    spec: "LossSpec", ratio: torch.Tensor, advantage: torch.Tensor, logp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The clipped objective per token, and where each clip changed it."""
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    over, under = ratio > high, ratio < low
    if spec.kind == "cispo":
        weight = ratio.clamp(low, high).detach()
        return weight * advantage * logp, under, over, torch.zeros_like(over)
    over = over & (advantage > 0)
    under = under & (advantage < 0)
    dual = torch.zeros_like(over)
    if spec.dual_clip is not None:
        dual = (ratio > spec.dual_clip) & (advantage < 0)
        ratio = torch.where(dual, spec.dual_clip, ratio)
    ratio = torch.where(over, high, torch.where(under, low, ratio))
    return ratio * advantage, under, over, dual


def _raw_metrics(
    live: torch.Tensor, num_bad_seq: torch.Tensor, x: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Per-token values [M] -> the sums and the maximum of RAW_METRICS, over live tokens."""

    def total(value: torch.Tensor) -> torch.Tensor:
        return torch.where(live, value.detach(), 0).double().sum()

    log_ratio, ratio = x["log_ratio"], x["ratio"].detach()
    weight = (ratio * x["tis"]).clamp(max=MAX_ESS_WEIGHT)
    floor = ratio.new_zeros(1)  # the maximum of no tokens
    return {
        "num_tokens": live.sum(),
        "raw/clip_low": total(x["under"]),
        "raw/clip_high": total(x["over"]),
        "raw/dual_clip": total(x["dual"]),
        "raw/kl_k1": total(-log_ratio),
        "raw/kl_k3": total(_ratio(log_ratio) - 1 - log_ratio),
        "raw/weight": total(weight),
        "raw/weight_squared": total(weight.double().square()),
        "raw/tis": total(x["tis"]),
        "raw/tis_capped": total(x["capped"]),
        "raw/ref_kl": total(x["ref_kl"]),
        "raw/entropy": total(x["entropy"]),
        "num_bad_seq": num_bad_seq,
        "ratio_max": torch.cat([torch.where(live, ratio, 0), floor]).amax(),
    }


def _tis_weight(spec: "LossSpec", tis_log: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-weight [M] -> the truncated weight, and where the cap lowered it."""
    weight = _ratio(tis_log)
    if spec.tis_cap is None:
        return weight, torch.zeros_like(weight, dtype=torch.bool)
    return weight.clamp(max=spec.tis_cap), weight > spec.tis_cap


def look_up(advantage: torch.Tensor, seq: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """advantage [num_seqs] -> [M]; 0 where the token is masked or its id has none."""
    limit = advantage.shape[0]
    known = live & (seq >= 0) & (seq < limit)
    padded = torch.cat([advantage, advantage.new_zeros(1)])
    return padded[torch.where(known, seq.long(), limit)]


def policy_loss_torch(
    logp: torch.Tensor,
    advantage: torch.Tensor,
    seq: torch.Tensor,
    denom: float,
    spec: "LossSpec",
    per_token: bool,
    mask: torch.Tensor | None,
    entropy: torch.Tensor | None,
    *,
    old_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Arguments of :func:`m2kernels.policy_loss`, checked -> (loss 0-d, metrics)."""
    live = torch.ones_like(seq, dtype=torch.bool) if mask is None else mask
    zero = torch.zeros_like(logp, requires_grad=False)

    def clean(x: torch.Tensor | None) -> torch.Tensor:
        return zero if x is None else torch.where(live, x, 0)

    # Numbers of the runs of equal ids: dense, so that sums need no host sync to learn their size.
    run = torch.zeros_like(seq, dtype=torch.int64)
    run[1:] = (seq[1:] != seq[:-1]).cumsum(0)

    def sequence_sum(x: torch.Tensor) -> torch.Tensor:
        return zero.index_add(0, run, x)[run]

    bad = count_bad_seq(seq, live, None if per_token else advantage.shape[0])
    advantage = clean(advantage) if per_token else look_up(advantage, seq, live)
    logp = clean(logp)
    old = logp.detach() if old_logp is None else clean(old_logp)
    token_log_ratio = logp - old
    share = live.to(logp.dtype)
    log_ratio = token_log_ratio
    if spec.kind == "gspo":
        share = share / sequence_sum(share).clamp(min=1)
        log_ratio = sequence_sum(token_log_ratio * share)
    ratio = _ratio(log_ratio)
    policy, under, over, dual = _policy_term(spec, ratio, advantage, logp)

    tis_log = (old - clean(rollout_logp)).detach() if rollout_logp is not None else zero
    tis, capped = _tis_weight(spec, sequence_sum(tis_log) if spec.tis_level == "sequence" else tis_log)
    if spec.tis_cap is not None:
        policy = policy * tis
    ref_kl = _kl(spec.kl, logp - clean(ref_logp)) if ref_logp is not None else zero
    objective = policy
    if spec.kl_coef != 0:
        objective = objective - spec.kl_coef * ref_kl
    if spec.entropy_coef != 0:
        objective = objective + spec.entropy_coef * clean(entropy)
    loss = -torch.where(live, objective * share, 0).sum() / denom
    loss = torch.where(bad > 0, float("nan"), loss)

    measured = {"under": under, "over": over, "dual": dual, "capped": capped, "tis": tis}
    measured |= {"log_ratio": token_log_ratio, "ratio": ratio, "ref_kl": ref_kl}
    measured["entropy"] = clean(entropy)
    return loss, finish_metrics(_raw_metrics(live, bad, measured))
