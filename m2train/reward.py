"""From verdicts to advantages: R = R_rubric + R_length, A = R - mean(R) (M2 report, eq. 2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

import m2kernels as mk
from m2train.config import AlgoConfig
from m2train.records import Group
from m2train.verifier import Verifier


def length_bonus(rubric_rewards: Sequence[float], lengths: Sequence[int], algo: AlgoConfig) -> list[float]:
    """Eq. 3: coef / sqrt(|o_i|) for each reply at or above the quantile, if that quantile is above the threshold.

    The report calls the 0.2-quantile "P80": the level that 80 % of the group reaches. The cap is ours: the formula
    alone pays 1.0 for a reply of 16 tokens.

    Args:
        rubric_rewards: R_rubric of the G replies.
        lengths: their token counts, thinking included.
    """
    if not algo.length_bonus or not rubric_rewards:
        return [0.0] * len(rubric_rewards)
    level = float(torch.quantile(torch.tensor(rubric_rewards, dtype=torch.float64), algo.length_quantile))
    if level <= algo.length_threshold:
        return [0.0] * len(rubric_rewards)
    return [
        min(algo.length_coef / math.sqrt(max(length, 1)), algo.length_cap) if reward >= level else 0.0
        for reward, length in zip(rubric_rewards, lengths, strict=True)
    ]


def rescore(groups: Sequence[Group], verifier: Verifier) -> None:
    """Score saved verdicts by the scoring of this run, which may be another than that of the run that made them.

    Replies that were saved with a reward and no verdicts, by something else than rubrics, keep it.
    """
    for group in groups:
        for reply in group.replies:
            if reply.verdicts:
                reply.rubric_reward = verifier.score(group.rubrics, reply.verdicts)


def set_advantages(groups: Sequence[Group], algo: AlgoConfig) -> None:
    """Fill in each reply's length reward and its advantage within its group."""
    for group in groups:
        rewards = [reply.rubric_reward for reply in group.replies]
        lengths = [len(reply.generation.token_ids) for reply in group.replies]
        for reply, bonus in zip(group.replies, length_bonus(rewards, lengths, algo), strict=True):
            reply.length_reward = bonus
    replies = [reply for group in groups for reply in group.replies]
    index = [i for i, group in enumerate(groups) for _ in group.replies]
    advantages = mk.group_advantage(
        torch.tensor([reply.reward for reply in replies], dtype=torch.float32),
        torch.tensor(index, dtype=torch.int64),
        baseline=algo.baseline,
        scale=algo.scale,
    )
    for reply, advantage in zip(replies, advantages.tolist(), strict=True):
        reply.advantage = advantage
