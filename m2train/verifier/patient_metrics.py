"""How well a simulated patient keeps to its script: the three metrics of section 2.1.3 of the M2 report.

Privacy and fact scores are shares of patient turns, read from the states that the factual unit left; the
personification score is per dialogue, half personality, half sociocultural background. Programs stand in for the
report's judge model, so the numbers compare simulators of this package and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from m2train.records import Turn
from m2train.verifier import voice
from m2train.verifier.cases import CaseScript
from m2train.verifier.matching import told
from m2train.verifier.patient import Draft, FactualUnit
from m2train.verifier.utterance import normalise, sentences


def _exchanges(turns: Sequence[Turn]) -> Iterable[tuple[str, str]]:
    """(doctor's message, patient's answer) pairs."""
    spoken = [turn for turn in turns if turn.role != "system"]
    for before, turn in zip(spoken, spoken[1:], strict=False):
        if before.role == "doctor" and turn.role == "patient":
            yield before.text, turn.text


def privacy_score(case: CaseScript, turns: Sequence[Turn]) -> float | None:
    """Share of the patient's answers that disclose no private fact unasked; None without answers."""
    unit = FactualUnit(case)
    kept: list[bool] = []
    known: set[str] = set()
    for doctor, patient in _exchanges(turns):
        asked = {fact.id for fact in told(case, doctor)}
        said = {fact for part in sentences(patient) for fact in unit.facts_in(part)}
        leaked = {i for i in said - asked - known if case.fact(i).sensitivity == "private"}
        leaked |= {i for i in said if case.fact(i).disclose == "never"}
        kept.append(not leaked)
        known |= said
    return sum(kept) / len(kept) if kept else None


def fact_score(case: CaseScript, turns: Sequence[Turn]) -> float | None:
    """Share of the patient's answers that contradict no fact and make nothing up; None without answers."""
    unit = FactualUnit(case)
    everything = {fact.id for fact in case.facts}
    kept = []
    for doctor, patient in _exchanges(turns):
        check = unit.check(Draft(tuple(sentences(patient)), ()), everything, doctor)
        kept.append(check.verdict == "ok")
    return sum(kept) / len(kept) if kept else None


def personification_score(case: CaseScript, turns: Sequence[Turn]) -> float | None:
    """0.5 x personality consistency + 0.5 x sociocultural consistency of a dialogue; None without answers.

    A trait that the dialogue gave no occasion to show counts as kept.
    """
    pairs = [(normalise(doctor), patient) for doctor, patient in _exchanges(turns)]
    if not pairs:
        return None
    said = [patient for _, patient in pairs]
    treatment_asked = any(q in text for text in said for q in voice.TREATMENT_QUESTIONS)
    outgoing = not treatment_asked if not case.persona.extrovert else treatment_asked or len(pairs) < 3
    answered = [any(phrase in patient for phrase in (*voice.THANKS, *voice.HURT)) for _, patient in pairs]
    feeling = not any(answered) if not case.persona.feeling else any(answered) or len(pairs) < 3
    costly = [patient for doctor, patient in pairs if voice.COSTLY.search(doctor)]
    thrifty = case.persona.income != "low" or not costly or any(c in p for p in costly for c in voice.COST)
    treated = [(doctor, patient) for doctor, patient in pairs if voice.TREATMENT.search(doctor)]
    advised = [patient for doctor, patient in treated if not voice.COSTLY.search(doctor)]
    learned = case.persona.education != "university" or not advised
    learned = learned or any(e in p for p in advised for e in voice.EVIDENCE)
    return 0.5 * (outgoing + feeling) / 2 + 0.5 * (thrifty + learned) / 2
