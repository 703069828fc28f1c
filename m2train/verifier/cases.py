"""Patient scripts: what the simulated patients know, and who they are.

A script is one TOML file under `data/cases`: medical part (complaint, history, facts) and psychological part
(persona), as in section 2.1.1 of the M2 report. The split into training and held-out cases and the order in which
training draws them are pure functions of the case ids and a seed, so a resumed run sees the same cases.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from m2train.verifier.utterance import normalise

DATA = Path(__file__).parent / "data" / "cases"

Topic = Literal[
    "onset", "duration", "frequency", "location", "radiation", "character", "severity", "progression",
    "trigger", "relief", "timing", "associated", "past_history", "medications", "allergies",
    "family_history", "smoking", "alcohol", "drugs", "occupation", "diet", "travel", "exposure", "sleep",
    "mood", "weight", "function", "menstrual", "sexual", "pregnancy", "surgery", "previous_tests",
    "bowel", "urine", "worries",
]  # fmt: skip


class _Script(BaseModel):
    """Base: unknown keys are errors and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Strata(_Script):
    """What cases are stratified by."""

    age: int = Field(ge=0, le=120)
    gender: Literal["male", "female"]
    prevalence: Literal["common", "uncommon", "rare"]
    comorbidities: tuple[str, ...] = ()


class Persona(_Script):
    """Personality and sociocultural background."""

    mbti: str
    income: Literal["low", "middle", "high"]
    education: Literal["primary", "secondary", "university"]

    @field_validator("mbti")
    @classmethod
    def _four_letters(cls, mbti: str) -> str:
        if len(mbti) != 4 or any(c not in pair for c, pair in zip(mbti, ("EI", "SN", "TF", "JP"), strict=True)):
            raise ValueError(f"got {mbti!r}; expected four letters such as ISFJ")
        return mbti

    @property
    def extrovert(self) -> bool:
        """E asks about treatment unasked; I accepts."""
        return self.mbti[0] == "E"

    @property
    def feeling(self) -> bool:
        """F is sensitive to how the doctor speaks; T is not."""
        return self.mbti[2] == "F"


class Complaint(_Script):
    """The chief complaint; `text` opens the consultation."""

    text: str
    symptom: str
    symptom_terms: tuple[str, ...] = Field(min_length=1)


class History(_Script):
    """Clinician's summary; the patient never recites it."""

    present: str
    past: str


class Fact(_Script):
    """One thing the patient can tell, in the patient's own words."""

    id: str
    topic: Topic
    about: tuple[str, ...] = Field(min_length=1)
    text: str
    sensitivity: Literal["clinical", "private"]
    disclose: Literal["volunteered", "on_ask", "never"]
    essential: bool


class CaseScript(_Script):
    """One patient."""

    id: str
    specialty: str
    diagnosis: str
    diagnosis_synonyms: tuple[str, ...]
    urgency: Literal["emergency", "urgent", "routine"]
    strata: Strata
    persona: Persona
    complaint: Complaint
    history: History
    facts: tuple[Fact, ...] = Field(min_length=1)

    @field_validator("facts")
    @classmethod
    def _unique_ids(cls, facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
        ids = [fact.id for fact in facts]
        if len(set(ids)) < len(ids):
            raise ValueError(f"fact ids repeat: {sorted(i for i in set(ids) if ids.count(i) > 1)}")
        return facts

    def fact(self, fact_id: str) -> Fact:
        """The fact with this id."""
        return next(fact for fact in self.facts if fact.id == fact_id)


class Split(NamedTuple):
    """Training and held-out cases, each ordered by id."""

    train: tuple[CaseScript, ...]
    held_out: tuple[CaseScript, ...]


@lru_cache(maxsize=4)
def load_cases(folder: Path = DATA) -> tuple[CaseScript, ...]:
    """All scripts of a folder, ordered by id.

    Raises:
        ValueError: no scripts there, a script that does not fit the schema, or an id that is not its file's name.
    """
    cases = []
    for path in sorted(folder.glob("*.toml")):
        try:
            case = CaseScript.model_validate(tomllib.loads(path.read_text()))
        except ValueError as err:
            raise ValueError(f"{path}: {err}") from err
        if case.id != path.stem:
            raise ValueError(f"{path}: id is {case.id!r}; expected the file's name, {path.stem!r}")
        cases.append(case)
    if not cases:
        raise ValueError(f"no patient scripts (*.toml) in {folder}")
    return tuple(cases)


def split_cases(cases: Sequence[CaseScript], seed: int = 0) -> Split:
    """Halve the cases, stratified by specialty; the held-out half gets the odd one.

    Specialties are walked in turn and their shuffled cases dealt alternately, so each half has every specialty
    that holds two cases or more.
    """
    rng = random.Random(f"split/{seed}")
    halves: tuple[list[CaseScript], list[CaseScript]] = ([], [])
    count = 0
    for specialty in sorted({case.specialty for case in cases}):
        group = sorted((case for case in cases if case.specialty == specialty), key=lambda case: case.id)
        rng.shuffle(group)
        for case in group:
            halves[count % 2].append(case)
            count += 1
    held_out, train = (tuple(sorted(half, key=lambda case: case.id)) for half in halves)
    return Split(train, held_out)


@lru_cache(maxsize=1024)
def diagnosis_pattern(case: CaseScript) -> re.Pattern[str]:
    """Finds any name of the case's disease in normalised text."""
    names = (re.escape(normalise(name)) for name in (case.diagnosis, *case.diagnosis_synonyms))
    return re.compile(rf"\b(?:{'|'.join(names)})\b")


class CaseSampler:
    """The order in which training meets its cases: shuffled epochs, no case twice within one."""

    def __init__(self, cases: Sequence[CaseScript], seed: int) -> None:
        """Sample from `cases`; `seed` fixes every epoch's order."""
        if not cases:
            raise ValueError("no cases to sample from")
        self._cases = tuple(sorted(cases, key=lambda case: case.id))
        self._seed = seed
        self._orders: dict[int, list[CaseScript]] = {}

    def draw(self, step: int, n: int) -> list[CaseScript]:
        """The n cases of a step; a pure function of (cases, seed, step, n)."""
        size = len(self._cases)
        return [self._epoch(i // size)[i % size] for i in range(step * n, (step + 1) * n)]

    def _epoch(self, epoch: int) -> list[CaseScript]:
        """Strata shuffled inside, then spread evenly, so that every stretch holds a mix of specialties."""
        if epoch not in self._orders:
            rng = random.Random(f"epoch/{self._seed}/{epoch}")
            keyed: list[tuple[float, str, CaseScript]] = []
            for specialty in sorted({case.specialty for case in self._cases}):
                group = [case for case in self._cases if case.specialty == specialty]
                rng.shuffle(group)
                offset = rng.random()
                keyed += [((i + offset) / len(group), case.id, case) for i, case in enumerate(group)]
            self._orders[epoch] = [case for _, _, case in sorted(keyed, key=lambda item: item[:2])]
        return self._orders[epoch]
