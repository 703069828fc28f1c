"""The embedded verifier: simulated patients, rubrics, grades.

CPU only, no language model, deterministic under a seed.
Each part stands behind a protocol, so that a part backed by a language model can take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from m2train.config import ConfigError, VerifierConfig
from m2train.records import Rubric, Turn, Verdict
from m2train.verifier import grading
from m2train.verifier.cases import CaseSampler, CaseScript, Fact, Persona, Split, load_cases, split_cases
from m2train.verifier.embedding import unsupported_reason
from m2train.verifier.patient import PatientMessage, SimulatedPatient
from m2train.verifier.rubrics import generate_rubrics

__all__ = [
    "CaseSampler",
    "CaseScript",
    "EmbeddedVerifier",
    "Fact",
    "Grader",
    "Patient",
    "PatientMessage",
    "Persona",
    "RubricGenerator",
    "SimulatedPatient",
    "Split",
    "build_verifier",
    "generate_rubrics",
    "load_cases",
    "split_cases",
]


class Patient(Protocol):
    """Plays one patient through one dialogue."""

    def opening(self) -> PatientMessage:
        """The first message."""
        ...

    def reply(self, doctor_text: str) -> PatientMessage | None:
        """The next message; None ends the dialogue."""
        ...


class RubricGenerator(Protocol):
    """Writes the criteria for the reply that follows a slice."""

    def __call__(self, case: CaseScript, turns: Sequence[Turn]) -> list[Rubric]:
        """Criteria with weights."""
        ...


class Grader(Protocol):
    """Decides one criterion."""

    def __call__(self, rubric: Rubric, reply_text: str, case: CaseScript, turns: Sequence[Turn]) -> Verdict:
        """Met, not met, or None: cannot tell."""
        ...


@dataclass(frozen=True, slots=True)
class EmbeddedVerifier:
    """Patient, rubrics and grader as the loop uses them."""

    scoring: grading.Scoring = "minmax"
    patient: Callable[[CaseScript, int], Patient] = SimulatedPatient
    generator: RubricGenerator = generate_rubrics
    grader: Grader = grading.grade

    def make_patient(self, case: CaseScript, seed: int) -> Patient:
        """A patient who has not spoken yet."""
        return self.patient(case, seed)

    def rubrics(self, case: CaseScript, turns: Sequence[Turn]) -> list[Rubric]:
        """Criteria for the reply that follows these turns."""
        return self.generator(case, turns)

    def grade(
        self, rubrics: Sequence[Rubric], reply_text: str, case: CaseScript, turns: Sequence[Turn]
    ) -> list[Verdict]:
        """One verdict per criterion."""
        return [self.grader(rubric, reply_text, case, turns) for rubric in rubrics]

    def score(
        self, rubrics: Sequence[Rubric], verdicts: Sequence[Verdict], scoring: grading.Scoring | None = None
    ) -> float:
        """The rubric reward in [0, 1], by the recipe's scoring unless another is asked for."""
        return grading.score(rubrics, verdicts, scoring or self.scoring)


def build_verifier(config: VerifierConfig) -> EmbeddedVerifier:
    """The verifier of a recipe.

    Raises:
        ConfigError: it cannot run here; the message says what to install.
    """
    reason = unsupported_reason()
    if reason:
        raise ConfigError(reason)
    return EmbeddedVerifier(scoring=config.scoring)
