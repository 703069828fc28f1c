"""Numbers of one optimizer step, put together on rank 0 from all micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

import m2kernels as mk
from m2train.config import AlgoConfig, Recipe
from m2train.learner.batch import TrainBatch

if TYPE_CHECKING:
    from m2train.learner.packing import StepPlan
    from m2train.learner.trainer import Scored

# Those of the loss op that are not worked out here from all tokens at once.
_POLICY = (
    "clip_frac_low",
    "clip_frac_high",
    "dual_clip_frac",
    "ratio_max",
    "approx_kl",
    "kl_k3",
    "ess",
    "num_bad_seq",
)
_REFERENCE = ("ref_kl",)


def step_metrics(
    batch: TrainBatch,
    logp: Sequence[torch.Tensor],
    scored: Sequence[Scored],
    plan: StepPlan,
    recipe: Recipe,
) -> dict[str, float]:
    """Loss, policy-loss metrics, entropy, trust in the rollouts, packing."""
    samples = batch.samples
    tokens = sum(s.reply_length for s in samples)
    rollout = [s.rollout_logp for s in samples]
    # Under the weights that sampled the rollouts: with several updates a step those are the old log-probs.
    behaviour = [s.old_logp if s.old_logp is not None else new for s, new in zip(samples, logp, strict=True)]
    named = _POLICY if recipe.algo.kl == "none" else _POLICY + _REFERENCE
    combined = mk.combine_metrics([one.metrics for one in scored if one.metrics])
    return {
        "policy/loss": sum(one.loss for one in scored),
        "policy/entropy": sum(one.entropy for one in scored) / tokens,
        "policy/logp_mean": float(torch.cat(list(logp)).mean()),
        "learner/loss_tokens": float(tokens),
        "learner/samples": float(len(samples)),
        **{f"policy/{name}": float(combined[name]) for name in named},
        **mismatch(behaviour, rollout),
        **importance(behaviour, rollout, recipe.algo),
        **packing(plan, scored, recipe),
    }


def mismatch(learner: Sequence[torch.Tensor], rollout: Sequence[torch.Tensor]) -> dict[str, float]:
    """How far the learner's log-probs are from the engine's for the same tokens and weights.

    k3 = mean(r - 1 - log r) with r = learner / rollout estimates KL(rollout || learner) without a negative value.
    """
    gap = (torch.cat(list(learner)) - torch.cat(list(rollout))).double()
    return {
        "mismatch/max_abs": float(gap.abs().max()),
        "mismatch/mean_abs": float(gap.abs().mean()),
        "mismatch/k3": float((torch.expm1(gap) - gap).mean()),
    }


def importance(
    learner: Sequence[torch.Tensor], rollout: Sequence[torch.Tensor], algo: AlgoConfig
) -> dict[str, float]:
    """Truncated importance weights learner / rollout, per token or per sequence as the recipe has them."""
    gaps = [(new - old).double() for new, old in zip(learner, rollout, strict=True)]
    logs = torch.stack([g.sum() for g in gaps]) if algo.tis_level == "sequence" else torch.cat(gaps)
    full = logs.exp()
    weight = full if not algo.tis_cap else full.clamp(max=algo.tis_cap)
    capped = 0.0 if not algo.tis_cap else float((full > algo.tis_cap).double().mean())
    return {
        "tis/mean": float(weight.mean()),
        "tis/min": float(weight.min()),
        "tis/max": float(weight.max()),
        "tis/capped_frac": capped,
    }


def packing(plan: StepPlan, scored: Sequence[Scored], recipe: Recipe) -> dict[str, float]:
    """Tokens computed and those that sharing spared; whether as a forest, and what that was predicted to save; pairs
    in the tiles of attention per visible pair; and tokens per room in the micro-batches, and per room of the fullest
    (ranks wait for each other)."""
    sizes = [size for rank in plan.tokens for size in rank]
    return {
        "learner/micro_batches": float(len(plan.members[0])),
        "learner/tokens": float(plan.input_tokens),
        "learner/unique_tokens": float(sum(sizes)),
        "learner/duplicate_tokens": float(plan.input_tokens - sum(sizes)),
        "learner/tile_inflation": sum(one.area for one in scored) / sum(one.pairs for one in scored),
        "learner/packing_efficiency": sum(sizes) / (len(sizes) * recipe.learner.micro_batch_tokens),
        "learner/balance": sum(sizes) / (len(sizes) * max(sizes)),
        "learner/packed_as_tree": float(plan.packing == "tree"),
        **({} if plan.choice is None else {"learner/predicted_tree_gain": plan.choice.gain}),
    }
