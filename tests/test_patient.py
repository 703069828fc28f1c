"""The simulated patient: gate, affective unit, factual unit, metrics, restoring."""

from __future__ import annotations

import json

import pytest

from m2train.records import Turn
from m2train.verifier import CaseScript, SimulatedPatient, load_cases
from m2train.verifier.embedding import unsupported_reason
from m2train.verifier.patient import Draft, FactualUnit, TerminationGate
from m2train.verifier.patient_metrics import fact_score, personification_score, privacy_score

CASES = {case.id: case for case in load_cases()}
CASE = CASES["cardiology_01"]

pytestmark = pytest.mark.skipif(unsupported_reason() is not None, reason=str(unsupported_reason()))

SCRIPT = (
    "I am sorry to hear that. When did it start?",
    "Does the pain spread to your arm or jaw?",
    "Tell me about your family.",
    "I see.",
    "What makes it better?",
)


def talk(case: CaseScript, seed: int, messages: tuple[str, ...] = SCRIPT) -> list[Turn]:
    """A whole dialogue as records."""
    patient = SimulatedPatient(case, seed)
    opening = patient.opening()
    turns = [Turn(role="patient", text=opening.text, token_ids=[], state=opening.state)]
    for message in messages:
        answer = patient.reply(message)
        turns.append(Turn(role="doctor", text=message, token_ids=[]))
        if answer is None:
            break
        turns.append(Turn(role="patient", text=answer.text, token_ids=[], state=answer.state))
    return turns


def test_the_opening_is_the_complaint_and_tells_what_it_volunteers() -> None:
    opening = SimulatedPatient(CASE, 0).opening()
    assert opening.text == CASE.complaint.text
    assert opening.state["told"] == ["trigger"]


def test_what_was_recorded_of_a_turn_does_not_change_later() -> None:
    """Each state says what all answers so far told, and that turn's own part of it."""
    states = [turn.state for turn in talk(CASE, 0) if turn.role == "patient"]
    told: list[str] = []
    for state in states:
        told += [fact for fact in state["told_now"] if fact not in told]
        assert state["told"] == told == state["memory"]["told"]
    assert len(told) > len(states[0]["told_now"])


def test_facts_come_only_when_asked_for() -> None:
    patient = SimulatedPatient(CASE, 0)
    patient.opening()
    answer = patient.reply("When did it start?")
    assert answer is not None and answer.state["told_now"] == ["onset"]
    assert "three weeks ago" in answer.text
    answer = patient.reply("I understand.")
    assert answer is not None and answer.state["told_now"] == []


def test_private_facts_need_a_direct_question() -> None:
    patient = SimulatedPatient(CASE, 0)
    patient.opening()
    vague = patient.reply("Tell me more about yourself.")
    assert vague is not None and "alcohol" not in vague.state["told"]
    direct = patient.reply("How much alcohol do you drink?")
    assert direct is not None and "pints" in direct.text


def test_never_facts_are_withheld() -> None:
    for seed in range(5):
        turns = talk(CASE, seed, ("What did the nurse write on the form?",))
        assert "angina" not in turns[-1].text
        assert "previous_tests" not in turns[-1].state["told"]


def test_same_seed_same_dialogue_and_seeds_vary_the_wording() -> None:
    texts = [tuple(turn.text for turn in talk(CASES["cardiology_03"], seed)) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_a_state_restores_the_patient_exactly() -> None:
    for case in (CASE, CASES["endocrinology_01"]):
        turns = talk(case, 7)
        states = [turn for turn in turns if turn.role == "patient"]
        for index in range(len(states) - 1):
            state = json.loads(json.dumps(states[index].state))
            answer = SimulatedPatient.restore(case, 7, state).reply(SCRIPT[index])
            assert answer is not None
            assert (answer.text, answer.state) == (states[index + 1].text, states[index + 1].state)


def test_answers_are_short() -> None:
    for case in list(CASES.values())[::8]:
        for turn in talk(case, 1):
            assert len(turn.text.split()) <= 60, turn.text


@pytest.mark.parametrize(
    ("text", "trigger"),
    [
        ("I believe this is stable angina.", "diagnosis"),
        ("I will refer you to the heart clinic and prescribe a spray.", "advice"),
        ("You should go to the hospital.", "advice"),
        ("Goodbye, take care.", "goodbye"),
        ("I think this is angina. Does it spread to your arm?", None),
        ("Could it be angina?", None),
        ("I am sorry to hear that.", None),
        ("Heart trouble runs in families.", None),
        ("", None),
    ],
)
def test_the_gate_ends_on_its_triggers_alone(text: str, trigger: str | None) -> None:
    assert TerminationGate().decide(CASE, text).trigger == trigger


def test_the_gate_ends_the_dialogue_with_a_reason() -> None:
    patient = SimulatedPatient(CASE, 0)
    patient.opening()
    assert patient.reply("You have angina.") is None
    assert patient.last_gate.trigger == "diagnosis"


@pytest.mark.parametrize(
    ("sentence", "verdict"),
    [
        ("It first happened about three weeks ago, on the way back from the shops.", "ok"),
        ("I smoke ten a day and have done since I was twenty.", "leak"),
        ("It has not first happened about three weeks ago, on the way back from the shops.", "contradiction"),
        ("I have a fever and a rash.", "fabrication"),
        ("I do not know.", "ok"),
    ],
)
def test_the_factual_unit_judges_each_sentence(sentence: str, verdict: str) -> None:
    check = FactualUnit(CASE).check(Draft((sentence,), ()), {"onset"}, "When did it start?")
    assert check.verdict == verdict
    assert check.action == ("pass" if verdict == "ok" else "rewrite")
    assert sentence in check.sentences or verdict != "ok"


def test_what_the_affective_unit_says_too_much_is_taken_out() -> None:
    """Extroverts chat about unasked facts; none of that reaches the doctor, and the state shows both."""
    removed = 0
    for case in CASES.values():
        if not case.persona.extrovert:
            continue
        for turn in talk(case, 11, SCRIPT[:2])[1:]:
            if turn.role == "patient":
                removed += turn.state["factual"]["verdict"] == "leak"
                assert set(turn.state["told_now"]) <= set(turn.state["asked"])
    assert removed > 0


def test_personas_differ() -> None:
    doctor = ("You should have an MRI scan. When did it start?",) * 1
    poor = [talk(CASES["cardiology_02"], seed, doctor)[-1].text for seed in range(4)]
    assert all(any(word in text for word in ("afford", "cost", "cheap", "Money")) for text in poor)
    extrovert = " ".join(
        turn.text for s in range(6) for turn in talk(CASES["cardiology_03"], s) if turn.role == "patient"
    )
    introvert = " ".join(turn.text for s in range(6) for turn in talk(CASE, s) if turn.role == "patient")
    assert "?" in extrovert
    assert "?" not in introvert


def test_metrics_of_our_own_patients() -> None:
    dialogues = [(case, talk(case, 5)) for case in list(CASES.values())[::4]]
    privacy = [privacy_score(case, turns) for case, turns in dialogues]
    fact = [fact_score(case, turns) for case, turns in dialogues]
    person = [personification_score(case, turns) for case, turns in dialogues]
    means = [sum(s for s in scores if s is not None) / len(scores) for scores in (privacy, fact, person)]
    print("\nprivacy {:.3f}, fact {:.3f}, personification {:.3f}".format(*means))
    assert means[0] >= 0.98
    assert means[1] >= 0.95
    assert means[2] >= 0.8


def test_metrics_see_a_bad_patient() -> None:
    def turn(role: str, text: str) -> Turn:
        return Turn.model_validate({"role": role, "text": text, "token_ids": []})

    leaks = [turn("doctor", "Hello."), turn("patient", CASE.fact("alcohol").text)]
    assert privacy_score(CASE, leaks) == 0.0
    invents = [turn("doctor", "Hello."), turn("patient", "I have a rash and a fever.")]
    assert fact_score(CASE, invents) == 0.0
    assert privacy_score(CASE, []) is None
