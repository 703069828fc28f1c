"""The simulated patient: three modules in series, as in section 2.1.2 of the M2 report.

    doctor's message -> TerminationGate -> AffectiveUnit (draft in the persona's voice) -> FactualUnit -> reply

The gate ends the dialogue on a diagnosis, a plan or a goodbye. The affective unit plays the persona and may say too
much, as role-players do; the factual unit compares each sentence with the script and with what may be told now, and
rewrites. All three leave their decision in the turn's state. Randomness comes from (seed, case, turn) alone, so the
state of any turn restores the patient exactly.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from m2train.verifier import voice
from m2train.verifier.cases import CaseScript, diagnosis_pattern
from m2train.verifier.lexicon import CONCEPTS
from m2train.verifier.matching import Reading, read
from m2train.verifier.utterance import affirmed, is_question, normalise, sentences, stem, words

FactVerdict = Literal["ok", "leak", "contradiction", "fabrication"]


class PatientMessage(NamedTuple):
    """What the patient says, and the state after it."""

    text: str
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Whether the dialogue ends, and on which trigger."""

    end: bool
    trigger: Literal["diagnosis", "advice", "goodbye"] | None = None
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """The affective unit's reply, sentence by sentence, and why it says so."""

    sentences: tuple[str, ...]
    moves: tuple[str, ...]
    """Persona moves made: thanks, hurt, cost, evidence, treatment_question, chatty, vague, ..."""


@dataclass(frozen=True, slots=True)
class FactCheck:
    """The factual unit's decision."""

    verdict: FactVerdict
    action: Literal["pass", "rewrite"]
    sentences: tuple[str, ...]
    removed: tuple[str, ...] = ()


@dataclass(slots=True)
class _State:
    turn: int = 0
    told: list[str] = field(default_factory=list)
    rapport: int = 0
    doctor: list[str] = field(default_factory=list)
    ended: bool = False


class TerminationGate:
    """Ends the dialogue on predefined triggers; a message that still asks the patient something never ends it."""

    def decide(self, case: CaseScript, doctor_text: str) -> GateDecision:
        """Look for a diagnosis of this case, a plan, or a goodbye."""
        parts = sentences(doctor_text)
        asks = any(is_question(part) for part in parts)
        for part in parts:
            if voice.GOODBYE.search(part):
                return GateDecision(True, "goodbye", part)
            if asks:
                continue
            if voice.ASSERTS.search(part) and affirmed(diagnosis_pattern(case), part):
                return GateDecision(True, "diagnosis", part)
            if affirmed(voice.PLAN, part):
                return GateDecision(True, "advice", part)
        return GateDecision(False)


class AffectiveUnit:
    """Writes the draft: what was asked, in the persona's manner.

    E asks about treatment unprompted, I does not; F answers kindness and its absence, T ignores both; a low income
    resists costly plans; university education asks for evidence. Other letters are not published and do nothing.
    """

    def draft(self, case: CaseScript, doctor_text: str, reading: Reading, state: _State, rng: random.Random) -> Draft:
        """At most three sentences."""
        said: list[str] = []
        moves: list[str] = []
        self._react(case, doctor_text, state, rng, said, moves)
        answered = self._answer(case, reading, state, rng, said, moves)
        self._own_question(case, doctor_text, rng, said, moves)
        chatty = [f for f in case.facts if f.disclose == "on_ask" and f.id not in state.told]
        if answered and case.persona.extrovert and chatty and len(said) < 3 and rng.random() < 0.25:
            said.append(rng.choice(chatty).text)
            moves.append("chatty")
        return Draft(tuple(said[:3]), tuple(moves))

    def _react(
        self, case: CaseScript, doctor_text: str, state: _State, rng: random.Random, said: list[str], moves: list[str]
    ) -> None:
        if not case.persona.feeling:
            return
        if voice.EMPATHY.search(normalise(doctor_text)):
            if rng.random() < 0.5:
                said.append(rng.choice(voice.THANKS))
                moves.append("thanks")
        elif state.rapport <= -2 and rng.random() < 0.7:
            said.append(rng.choice(voice.HURT))
            moves.append("hurt")

    def _answer(
        self, case: CaseScript, reading: Reading, state: _State, rng: random.Random, said: list[str], moves: list[str]
    ) -> bool:
        symptom = _the(case.complaint.symptom)
        tell = [m.fact for m in reading.matches if m.fact.disclose != "never"][:2]
        lead = rng.choice(voice.LEADS[case.persona.mbti[0]])
        for fact in tell:
            again = fact.id in state.told
            said.append(voice.join(rng.choice(voice.REPEAT) if again else lead, fact.text))
            moves.append("repeats" if again else "tells")
            lead = ""
        if tell:
            return True
        if reading.matches:
            said.append(rng.choice(voice.WITHHELD))
            moves.append("withholds")
        elif state.doctor and normalise(state.doctor[-1]) in map(normalise, state.doctor[:-1]):
            said.append(rng.choice(voice.AGAIN))
            moves.append("notices_repeat")
        elif reading.broad:
            said.append(rng.choice(voice.BROAD).format(symptom=symptom))
            moves.append("broad")
        elif reading.questions:
            said.append(rng.choice(voice.UNKNOWN))
            moves.append("unknown")
        else:
            said.append(rng.choice(voice.VAGUE).format(symptom=symptom))
            moves.append("vague")
        return False

    def _own_question(
        self, case: CaseScript, doctor_text: str, rng: random.Random, said: list[str], moves: list[str]
    ) -> None:
        text, persona = normalise(doctor_text), case.persona
        if persona.income == "low" and voice.COSTLY.search(text):
            said.append(rng.choice(voice.COST))
            moves.append("cost")
        elif persona.education == "university" and voice.TREATMENT.search(text):
            said.append(rng.choice(voice.EVIDENCE))
            moves.append("evidence")
        elif persona.extrovert and rng.random() < 0.35:
            said.append(rng.choice(voice.TREATMENT_QUESTIONS))
            moves.append("treatment_question")


_CLINICAL = frozenset(
    """fever sweat nausea breath faint dizzy palpitation swelling blood rash itch numb weak vision headache cough
    phlegm wheeze lump jaundice confused diabetes thyroid cancer stroke allergy operation injury pregnant
suicide""".split()
)
"""Findings that a patient must not make up."""
_NEGATIVE = frozenset("no not never nothing nobody none neither nor without cannot n't".split())


class FactualUnit:
    """Checks a draft sentence by sentence: is it in the script, may it be told now, does it agree with the script?"""

    def __init__(self, case: CaseScript) -> None:
        """Index the script."""
        self._case = case
        self._content = {fact.id: _content(fact.text) for fact in case.facts}
        known = [case.complaint.text, case.complaint.symptom, *case.complaint.symptom_terms]
        known += [case.history.present, case.history.past]
        known += [part for fact in case.facts for part in (fact.text, *fact.about)]
        self._known = _concepts(" ".join(known))

    def facts_in(self, sentence: str) -> list[str]:
        """Ids of the script's facts that a sentence states, in substance."""
        said = _content(sentence)
        return [i for i, content in self._content.items() if content and len(content & said) >= 0.75 * len(content)]

    def check(self, draft: Draft, allowed: set[str], doctor_text: str) -> FactCheck:
        """Remove what may not be told or is not in the script; put contradictions right."""
        kept: list[str] = []
        removed: list[str] = []
        verdict: FactVerdict = "ok"
        for sentence in draft.sentences:
            found = self.judge(sentence, allowed, doctor_text)
            if found == "ok":
                kept.append(sentence)
                continue
            verdict = found if verdict == "ok" else verdict
            removed.append(sentence)
            if found == "contradiction":
                kept += [self._case.fact(i).text for i in self.facts_in(sentence) if i in allowed]
        return FactCheck(verdict, "rewrite" if removed else "pass", tuple(kept), tuple(removed))

    def judge(self, sentence: str, allowed: set[str], doctor_text: str) -> FactVerdict:
        """The verdict on one sentence."""
        stated = self.facts_in(sentence)
        if any(i not in allowed for i in stated) and not any(i in allowed for i in stated):
            return "leak"
        for i in stated:
            if _negated(sentence) != _negated(self._case.fact(i).text):
                return "contradiction"
        if not stated and not sentence.rstrip().endswith("?"):
            foreign = (_concepts(sentence) & _CLINICAL) - self._known - _concepts(doctor_text)
            if foreign:
                return "fabrication"
        return "ok"


class SimulatedPatient:
    """One patient in one dialogue."""

    def __init__(self, case: CaseScript, seed: int) -> None:
        """A patient who has not spoken yet."""
        self.case = case
        self.seed = seed
        self.gate = TerminationGate()
        self.affective = AffectiveUnit()
        self.factual = FactualUnit(case)
        self.last_gate = GateDecision(False)
        """The gate's latest decision: why the dialogue ended, when `reply` returned None."""
        self._state = _State()

    @classmethod
    def restore(cls, case: CaseScript, seed: int, state: dict[str, Any]) -> SimulatedPatient:
        """The patient as it was after the turn that carries this state."""
        patient = cls(case, seed)
        memory = state["memory"]
        patient._state = _State(
            turn=memory["turn"],
            told=list(memory["told"]),
            rapport=memory["rapport"],
            doctor=list(memory["doctor"]),
            ended=memory["ended"],
        )
        return patient

    def opening(self) -> PatientMessage:
        """The chief complaint; it carries the volunteered facts."""
        volunteered = [fact.id for fact in self.case.facts if fact.disclose == "volunteered"]
        self._state = _State(told=list(volunteered))
        return PatientMessage(self.case.complaint.text, self._export(told_now=volunteered))

    def reply(self, doctor_text: str) -> PatientMessage | None:
        """Answer the doctor; None when the gate ends the dialogue (`last_gate` says why)."""
        self.last_gate = self.gate.decide(self.case, doctor_text)
        state = self._state
        if self.last_gate.end:
            state.ended = True
            return None
        state.turn += 1
        state.doctor.append(doctor_text)
        kind = bool(voice.EMPATHY.search(normalise(doctor_text)))
        state.rapport += 1 if kind else -1
        rng = random.Random(f"{self.case.id}/{self.seed}/{state.turn}")
        reading = read(self.case, doctor_text)
        draft = self.affective.draft(self.case, doctor_text, reading, state, rng)
        asked = [m.fact.id for m in reading.matches if m.fact.disclose != "never"]
        check = self.factual.check(draft, {*asked, *state.told}, doctor_text)
        text = " ".join(check.sentences) or rng.choice(voice.SAFE)
        told_now = [i for i in asked if any(i in self.factual.facts_in(s) for s in check.sentences)]
        state.told += [i for i in told_now if i not in state.told]
        return PatientMessage(text, self._export(told_now, asked, draft, check))

    def _export(
        self,
        told_now: list[str],
        asked: list[str] | None = None,
        draft: Draft | None = None,
        check: FactCheck | None = None,
    ) -> dict[str, Any]:
        """JSON-ready: what restores the patient, and what the three modules decided."""
        state: dict[str, Any] = {
            "memory": asdict(self._state),
            "told": list(self._state.told),
            "told_now": told_now,
            "asked": asked or [],
            "gate": asdict(self.last_gate),
        }
        if draft is not None:
            state["affective"] = {"draft": " ".join(draft.sentences), "moves": list(draft.moves)}
        if check is not None:
            state["factual"] = {"verdict": check.verdict, "action": check.action, "removed": list(check.removed)}
        return state


def _the(symptom: str) -> str:
    return symptom if symptom.split()[0] in {"not", "the", "my"} else f"the {symptom}"


_SMALL = frozenset(
    stem(w)
    for w in """a an the i me my it its is am are was were be been do did does have has had and or but so of to in on
    at for with that this he she they we you as""".split()
)


def _content(text: str) -> frozenset[str]:
    return frozenset(s for s in map(stem, words(text)) if s not in _SMALL)


def _negated(text: str) -> bool:
    return any(word in _NEGATIVE or word.endswith("n't") for word in words(text))


def _concepts(text: str) -> frozenset[str]:
    said = {stem(word) for word in words(text)}
    joined = f" {' '.join(stem(w) for w in words(text))} "
    found = set()
    for concept, phrases in CONCEPTS.items():
        for phrase in phrases.split():
            parts = [stem(p) for p in phrase.split("_")]
            if (len(parts) == 1 and parts[0] in said) or (len(parts) > 1 and f" {' '.join(parts)} " in joined):
                found.add(concept)
                break
    return frozenset(found)
