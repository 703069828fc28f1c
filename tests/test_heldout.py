"""The held-out score: a case counts once, however many turns it had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from m2train.evals.heldout import _row, spread
from m2train.records import Generation, Group, Reply, Rubric, Verdict
from m2train.verifier import EmbeddedVerifier, load_cases, split_cases

RUBRICS = [
    Rubric(dimension="d", text="good", weight=6, check="asks"),
    Rubric(dimension="d", text="bad", weight=-2, check="stock"),
]


def turn(case: str, good: bool) -> Group:
    verdicts = [Verdict(met=good, explanation=""), Verdict(met=False, explanation="")]
    generation: dict[str, Any] = {"token_ids": [1], "logprobs": [0.0], "finish_reason": "stop"}
    reply = Reply(
        generation=Generation(**generation, weight_versions=[], seed=0),
        text="t",
        verdicts=verdicts,
        rubric_reward=float(good),
    )
    where: dict[str, Any] = {"uid": case, "case_id": case, "dialogue_uid": case, "num_turns": 2}
    return Group(**where, context_ids=[1], context=[], rubrics=RUBRICS, replies=[reply])


def test_scores_of_all_kinds_are_means_over_cases() -> None:
    """Case a ended after one good turn; case b had three bad ones."""
    groups = [turn("a", True), turn("b", False), turn("b", False), turn("b", False)]
    row = _row(SimpleNamespace(verifier=EmbeddedVerifier()), groups)  # type: ignore[arg-type]
    assert row["heldout/reward"] == row["heldout/healthbench"] == 0.5
    assert row["heldout/minmax"] == pytest.approx((1.0 + 2 / 8) / 2)
    assert row["heldout/cases"] == 2.0 and row["heldout/stderr"] == pytest.approx(0.5)


def test_few_cases_are_of_many_specialties() -> None:
    held_out = split_cases(load_cases()).held_out
    specialties = {case.specialty for case in held_out}
    some = spread(held_out, 16)
    assert len({case.id for case in some}) == 16 and some == spread(held_out[::-1], 16)
    assert len({case.specialty for case in some}) >= min(12, len(specialties))
    assert {case.id for case in spread(held_out, len(held_out))} == {case.id for case in held_out}
    assert spread(held_out, 0) == []
