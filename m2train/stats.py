"""A step's row of metrics from its rollouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, pstdev

from m2train.records import Group, StepRollouts


def rollout_row(rollouts: StepRollouts, *, trained: bool) -> dict[str, float]:
    """Rewards, lengths, rubric dimensions and every drop, by name.

    Args:
        rollouts: of the step.
        trained: a learner trains on them.
    """
    groups = rollouts.groups
    replies = [reply for group in groups for reply in group.replies]
    row: dict[str, float] = {f"drops/{reason}": float(count) for reason, count in rollouts.drops.items()}
    generated = [t.generation for d in rollouts.dialogues for t in d.turns if t.generation is not None]
    row["tokens/generated"] = float(
        sum(len(g.token_ids) for g in generated) + sum(len(r.generation.token_ids) for r in replies)
    )
    row["groups/count"] = float(len(groups))
    row["dialogues/turns_mean"] = (
        fmean(sum(t.role == "doctor" for t in d.turns) for d in rollouts.dialogues) if rollouts.dialogues else 0.0
    )
    if not replies:
        return row
    rewards = [reply.reward for reply in replies]
    lengths = [len(reply.generation.token_ids) for reply in replies]
    spread = [pstdev([reply.reward for reply in group.replies]) for group in groups]
    row |= {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "reward/group_std": fmean(spread),
        "reward/min": min(rewards),
        "reward/max": max(rewards),
        "reward/rubric": fmean(reply.rubric_reward for reply in replies),
        "reward/length_bonus": fmean(reply.length_reward for reply in replies),
        "groups/zero_advantage": float(sum(s == 0.0 for s in spread)),
        "reply/length_mean": fmean(lengths),
        "reply/truncated_frac": fmean(reply.generation.finish_reason == "length" for reply in replies),
        **({"tokens/trained": float(sum(lengths))} if trained else {}),
        "grader/unknown": float(sum(v.met is None for reply in replies for v in reply.verdicts)),
    }
    return row | dimension_rows(groups)


def dimension_rows(groups: Sequence[Group]) -> dict[str, float]:
    """`dim/<name>`: share of a rubric dimension's points that the replies earned (an avoided fault earns)."""
    earned: dict[str, float] = defaultdict(float)
    offered: dict[str, float] = defaultdict(float)
    for group in groups:
        for reply in group.replies:
            for rubric, verdict in zip(group.rubrics, reply.verdicts, strict=True):
                if verdict.met is None:
                    continue
                offered[rubric.dimension] += abs(rubric.weight)
                if verdict.met == (rubric.weight > 0):
                    earned[rubric.dimension] += abs(rubric.weight)
    return {f"dim/{name}": earned[name] / total for name, total in offered.items() if total}
