"""A doctor's utterance is matched to facts by meaning: measured on questions written by somebody else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from m2train.verifier import load_cases
from m2train.verifier.embedding import missing, unsupported_reason
from m2train.verifier.matching import read, stored_texts, told
from m2train.verifier.utterance import is_question, sentences

DATA = Path(__file__).parent / "data"
CASES = {case.id: case for case in load_cases()}

pytestmark = pytest.mark.skipif(unsupported_reason() is not None, reason=str(unsupported_reason()))


def rates(path: Path) -> tuple[float, float]:
    """Share of questions whose fact is told, and share of rows that tell another one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    right = wrong = 0
    for row in rows:
        ids = [fact.id for fact in told(CASES[row["case"]], row["question"])]
        right += row["fact"] in ids
        wrong += any(i != row["fact"] for i in ids)
    return right / sum(row["fact"] is not None for row in rows), wrong / len(rows)


@pytest.mark.parametrize("name", ["dev", "test"])
def test_unseen_questions_get_their_fact(name: str) -> None:
    right, wrong = rates(DATA / f"questions_{name}.jsonl")
    print(f"\n{name}: right fact told {right:.3f}, a wrong one {wrong:.3f}")
    assert right >= 0.80
    assert wrong <= 0.05


@pytest.mark.parametrize(
    "text",
    [
        "I will ask about your family and whether you smoke in a moment.",
        "You should stop smoking and drink less alcohol.",
        "Tell me straight away if it spreads to your arm.",
        "If you get short of breath, call an ambulance.",
        "Smoking is the main cause of this, and it often runs in families.",
        "Have you considered taking tablets for it?",
        "Shall I prescribe some tablets?",
        "Would you like me to arrange a scan?",
    ],
)
def test_statements_and_advice_tell_nothing(text: str) -> None:
    assert told(CASES["cardiology_01"], text) == []


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("Do you smoke or drink alcohol?", {"smoking", "alcohol"}),
        ("Leaving aside the smoking, which tablets do you take?", {"medications"}),
        ("You mentioned walking uphill. Does the pain spread to your arm?", {"radiation"}),
        ("Please tell me about your family.", {"family_history"}),
        ("You do not smoke, do you?", {"smoking"}),
        ("", set()),
        ("?!", set()),
    ],
)
def test_what_one_utterance_asks(text: str, facts: set[str]) -> None:
    assert {fact.id for fact in told(CASES["cardiology_01"], text)} == facts


def test_facts_marked_never_are_recognised_but_not_told() -> None:
    case = CASES["cardiology_01"]
    question = "What did the nurse write on the form?"
    assert [match.fact.id for match in read(case, question).matches] == ["previous_tests"]
    assert told(case, question) == []


def test_general_invitations_ask_for_nothing_in_particular() -> None:
    reading = read(CASES["cardiology_01"], "Can you tell me more about it?")
    assert reading.broad and not reading.matches


def test_questions_are_told_from_statements() -> None:
    assert [is_question(s) for s in sentences("I see. Where is it? Let me know if it gets worse.")] == [
        False,
        True,
        False,
    ]


def test_the_vector_table_covers_every_text() -> None:
    assert missing(stored_texts()) == [], "run: python -m m2train.verifier.embedding"


def test_matching_is_fast_enough_for_grading() -> None:
    case = CASES["cardiology_01"]
    read(case, "Does it wake you at night?")
    start = time.process_time()
    for i in range(20):
        read(case, f"Does it wake you at {i + 1} in the night?")
    assert (time.process_time() - start) / 20 < 0.05  # 8-15 ms on one busy core; the bound allows for a slow one
