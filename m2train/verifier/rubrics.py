"""Rubrics for one slice of a dialogue: what the doctor's next reply should and should not do, with weights.

Templates instead of a trained generator, behind the same interface. They adapt to what has been told, to what is
still open, to the persona (F wants warmth, a short schooling wants short sentences), to urgency, and to the patient's
own questions. Points for asking count only in a reply that speaks of this patient's problem: see `grading`.
"""

from __future__ import annotations

from collections.abc import Sequence

from m2train.records import Rubric, Turn
from m2train.verifier.cases import CaseScript, Fact
from m2train.verifier.patient import FactualUnit

DIMENSIONS = (
    "diagnostic accuracy",
    "consultation logic",
    "treatment appropriateness",
    "communication and empathy",
    "medical ethics and safety",
    "clarity and structure",
)
"""Of the report's seven, all but evidence citation standards: a consultation cites nothing."""


def told_facts(case: CaseScript, turns: Sequence[Turn]) -> set[str]:
    """Ids of the facts the patient has given away in these turns."""
    patient = [turn for turn in turns if turn.role == "patient"]
    if patient and "told" in patient[-1].state:
        return set(patient[-1].state["told"])
    unit = FactualUnit(case)
    told = {fact.id for fact in case.facts if fact.disclose == "volunteered"}
    return told.union(*(unit.facts_in(part) for turn in patient for part in turn.text.split(". ")))


def open_facts(case: CaseScript, turns: Sequence[Turn]) -> list[Fact]:
    """Facts that a question would still bring to light, essential ones first."""
    told = told_facts(case, turns)
    found = [fact for fact in case.facts if fact.disclose == "on_ask" and fact.id not in told]
    return sorted(found, key=lambda fact: not fact.essential)


def generate_rubrics(case: CaseScript, turns: Sequence[Turn]) -> list[Rubric]:
    """The criteria for the reply that follows these turns.

    Raises:
        ValueError: the slice does not end on a patient turn.
    """
    if not turns or turns[-1].role != "patient":
        raise ValueError("rubrics are for a slice that ends on a patient turn")
    still_open = open_facts(case, turns)
    essential = [fact for fact in still_open if fact.essential]
    rubrics = _inquiry(case, still_open, essential) if essential else _conclusion(case, still_open)
    rubrics += _manner(case, turns)
    rubrics += _faults(case, essential)
    return rubrics


def _name(fact: Fact) -> str:
    return fact.about[0] if fact.topic == "associated" else fact.topic.replace("_", " ")


def _inquiry(case: CaseScript, still_open: list[Fact], essential: list[Fact]) -> list[Rubric]:
    names = ", ".join(dict.fromkeys(_name(fact) for fact in essential))
    ids = [fact.id for fact in still_open]
    key = [fact.id for fact in essential]
    rubrics = [
        Rubric(
            dimension="consultation logic",
            text="Asks, about this patient's own problem, for something the patient has not told yet.",
            weight=8,
            check="asks_facts",
            args={"facts": ids, "count": 1},
        ),
        Rubric(
            dimension="diagnostic accuracy",
            text=f"Asks for a key fact that is still open ({names}).",
            weight=6,
            check="asks_facts",
            args={"facts": key, "count": 1},
        ),
    ]
    if len(still_open) > 1:
        rubrics.append(
            Rubric(
                dimension="consultation logic",
                text="Asks for a second thing that is not known yet.",
                weight=4,
                check="asks_facts",
                args={"facts": ids, "count": 2},
            )
        )
    return rubrics


def _conclusion(case: CaseScript, still_open: list[Fact]) -> list[Rubric]:
    """The key facts are known: now the doctor should conclude."""
    rubrics = [
        Rubric(
            dimension="diagnostic accuracy",
            text=f"Names the likely cause: {case.diagnosis}.",
            weight=10,
            check="names_diagnosis",
        ),
        Rubric(
            dimension="treatment appropriateness",
            text="Says what happens next: a test, a treatment or a referral.",
            weight=6,
            check="next_step",
        ),
    ]
    if still_open:
        rubrics.append(
            Rubric(
                dimension="consultation logic",
                text="Asks for something the patient has not told yet.",
                weight=3,
                check="asks_facts",
                args={"facts": [fact.id for fact in still_open], "count": 1},
            )
        )
    return rubrics


def _manner(case: CaseScript, turns: Sequence[Turn]) -> list[Rubric]:
    persona = case.persona
    rubrics = [
        Rubric(
            dimension="communication and empathy",
            text=f"Speaks of the patient's own problem in specific words ({case.complaint.symptom}).",
            weight=4,
            check="specific",
        ),
        Rubric(
            dimension="communication and empathy",
            text="Shows feeling for what the patient goes through, and says for what.",
            weight=6 if persona.feeling else 4,
            check="empathy",
        ),
        Rubric(
            dimension="consultation logic",
            text="Asks the patient something.",
            weight=4,
            check="asks",
        ),
        Rubric(
            dimension="clarity and structure",
            text="Puts one or two clear questions to the patient about the problem.",
            weight=5,
            check="clear_question",
        ),
        Rubric(
            dimension="clarity and structure",
            text="Is short and complete: plain words, at most 40 of them, no list, no lecture.",
            weight=4 if persona.education == "primary" else 3,
            check="concise",
        ),
    ]
    if case.urgency == "emergency":
        rubrics.append(
            Rubric(
                dimension="medical ethics and safety",
                text="Makes clear that this may be serious and needs quick action.",
                weight=3,
                check="urgency",
            )
        )
    if "?" in turns[-1].text:
        rubrics.append(
            Rubric(
                dimension="communication and empathy",
                text="Responds to the question that the patient has just asked.",
                weight=3,
                check="answers_patient",
            )
        )
    return rubrics


def _faults(case: CaseScript, essential: list[Fact]) -> list[Rubric]:
    rubrics = [
        Rubric(
            dimension="communication and empathy",
            text="Could be said to any patient: nothing in it refers to this one's problem.",
            weight=-5,
            check="stock",
        ),
        Rubric(
            dimension="consultation logic",
            text="Repeats: an earlier reply or question of the doctor, the patient's own words, or itself.",
            weight=-8,
            check="repetition",
        ),
        Rubric(
            dimension="clarity and structure",
            text="Is no usable reply: empty, garbled, off the subject, or a string of keywords.",
            weight=-8,
            check="unusable",
        ),
        Rubric(
            dimension="medical ethics and safety",
            text="Steps out of the doctor's role: speaks as the patient or as a machine, or turns the patient away.",
            weight=-6,
            check="out_of_role",
        ),
    ]
    if essential:
        rubrics.append(
            Rubric(
                dimension="medical ethics and safety" if case.urgency == "emergency" else "treatment appropriateness",
                text="Diagnoses, advises or plays the problem down before the key facts are known.",
                weight=-6 if case.urgency == "emergency" else -5,
                check="premature",
            )
        )
    else:
        rubrics.append(
            Rubric(
                dimension="diagnostic accuracy",
                text="Names a wrong disease as the cause.",
                weight=-6,
                check="wrong_diagnosis",
            )
        )
    return rubrics
