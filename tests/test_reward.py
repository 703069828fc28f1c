"""Rewards and advantages against hand-computed values (M2 report, eq. 2 and 3)."""

from __future__ import annotations

import math

import pytest

from m2train.config import AlgoConfig
from m2train.records import Generation, Group, Reply, Rubric, Verdict
from m2train.reward import length_bonus, rescore, set_advantages
from m2train.verifier import EmbeddedVerifier


def reply(reward: float, length: int = 4) -> Reply:
    generation = Generation(
        token_ids=[1] * length, logprobs=[-1.0] * length, finish_reason="stop", weight_versions=[], seed=0
    )
    return Reply(generation=generation, text="", verdicts=[], rubric_reward=reward)


def group(*replies: Reply) -> Group:
    return Group(
        uid="g",
        case_id="c",
        dialogue_uid="d",
        num_turns=2,
        context_ids=[1],
        context=[],
        rubrics=[],
        replies=list(replies),
    )


def test_length_bonus_follows_eq_3() -> None:
    algo = AlgoConfig(length_bonus=True, length_cap=10.0)
    rewards, lengths = [0.4, 0.7, 0.8, 0.9, 1.0], [3200, 3200, 4000, 6000, 16]
    # the 0.2-quantile of five values lies at position 0.8: 0.4 + 0.8 * 0.3 = 0.64 > 0.5
    assert length_bonus(rewards, lengths, algo) == pytest.approx(
        [0.0, 4 / math.sqrt(3200), 4 / math.sqrt(4000), 4 / math.sqrt(6000), 1.0]
    )


def test_length_bonus_gates_and_cap() -> None:
    on = AlgoConfig(length_bonus=True)
    assert length_bonus([0.1, 0.2, 0.9], [9, 9, 9], on) == [0.0, 0.0, 0.0], "the group is not good enough"
    assert length_bonus([0.9, 0.9], [16, 16], on) == [0.1, 0.1], "capped"
    assert length_bonus([0.9], [16], AlgoConfig()) == [0.0], "off by default"
    assert length_bonus([], [], on) == []


def test_advantages_are_centred_within_each_group_and_not_scaled() -> None:
    groups = [group(reply(0.0), reply(1.0)), group(reply(0.5), reply(0.5)), group(reply(0.3))]
    set_advantages(groups, AlgoConfig())
    assert [[r.advantage for r in g.replies] for g in groups] == [[-0.5, 0.5], [0.0, 0.0], [0.0]]


def test_the_length_bonus_enters_the_advantage() -> None:
    groups = [group(reply(0.8, 16), reply(0.8, 4_000_000))]
    set_advantages(groups, AlgoConfig(length_bonus=True))
    short, long = groups[0].replies
    assert short.reward == pytest.approx(0.9)
    assert long.reward == pytest.approx(0.802)
    assert short.advantage == pytest.approx(0.049)


def test_saved_verdicts_are_scored_as_this_run_says() -> None:
    """`--train-from` a run of another `verifier.scoring`."""
    saved = group(reply(0.123))
    saved.rubrics = [
        Rubric(dimension="d", text="good", weight=6, check="asks"),
        Rubric(dimension="d", text="bad", weight=-2, check="stock"),
    ]
    saved.replies[0].verdicts = [Verdict(met=True, explanation=""), Verdict(met=True, explanation="")]
    for scoring, expected in (("healthbench", 4 / 6), ("minmax", 6 / 8)):
        rescore([saved], EmbeddedVerifier(scoring=scoring))  # type: ignore[arg-type]
        assert saved.replies[0].rubric_reward == pytest.approx(expected)
    bare = group(reply(0.5))
    rescore([bare], EmbeddedVerifier())
    assert bare.replies[0].rubric_reward == 0.5
