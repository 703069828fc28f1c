"""What judges a policy: simulated patients, rubrics, grades.

The loop knows the protocols alone. They are asynchronous, so that a patient, a rubric generator or a grader that asks
a language model can take the place of the embedded ones without holding up the other dialogues. The embedded verifier
needs a CPU only and is deterministic under a seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from m2train.config import ConfigError, VerifierConfig
from m2train.records import Rubric, Turn, Verdict
from m2train.verifier import grading
from m2train.verifier.cases import CaseSampler, CaseScript, Fact, Persona, Split, load_cases, split_cases
from m2train.verifier.embedding import unsupported_reason
from m2train.verifier.patient import PatientMessage, SimulatedPatient
from m2train.verifier.rubrics import generate_rubrics

T = TypeVar("T")

__all__ = [
    "CaseSampler",
    "CaseScript",
    "EmbeddedVerifier",
    "Fact",
    "Patient",
    "PatientMessage",
    "Persona",
    "SimulatedPatient",
    "Split",
    "Verifier",
    "build_verifier",
    "generate_rubrics",
    "load_cases",
    "split_cases",
]


class Patient(Protocol):
    """Plays one patient through one dialogue."""

    async def opening(self) -> PatientMessage:
        """The first message."""
        ...

    async def reply(self, doctor_text: str) -> PatientMessage | None:
        """The next message; None ends the dialogue."""
        ...


class Verifier(Protocol):
    """Patients, rubrics and grades. Calls for many dialogues and replies are in flight at once."""

    def make_patient(self, case: CaseScript, seed: int) -> Patient:
        """A patient who has not spoken yet."""
        ...

    async def rubrics(self, case: CaseScript, turns: Sequence[Turn]) -> list[Rubric]:
        """Criteria with weights for the reply that follows these turns."""
        ...

    async def grade(
        self, rubrics: Sequence[Rubric], reply_text: str, case: CaseScript, turns: Sequence[Turn]
    ) -> list[Verdict]:
        """One verdict per criterion; `met=None` where it could not be told."""
        ...

    def score(
        self, rubrics: Sequence[Rubric], verdicts: Sequence[Verdict], scoring: grading.Scoring | None = None
    ) -> float:
        """The rubric reward in [0, 1], by the recipe's scoring unless another is asked for."""
        ...


# A question is read in some 10 ms of encoder and patterns: on the event loop, hundreds of them would keep finished
# replies unread and health checks unanswered. One thread: the encoder takes one, and a seed's order stays its own.
_READER = ThreadPoolExecutor(1, "verifier")


async def _read(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_READER, work)


class _EmbeddedPatient:
    """A simulated patient, beside the event loop."""

    def __init__(self, patient: SimulatedPatient) -> None:
        self._patient = patient

    async def opening(self) -> PatientMessage:
        return await _read(self._patient.opening)

    async def reply(self, doctor_text: str) -> PatientMessage | None:
        return await _read(partial(self._patient.reply, doctor_text))


@dataclass(frozen=True, slots=True)
class EmbeddedVerifier:
    """The :class:`Verifier` without a language model."""

    scoring: grading.Scoring = "minmax"

    def make_patient(self, case: CaseScript, seed: int) -> Patient:
        """See :meth:`Verifier.make_patient`; the same seed plays the same."""
        return _EmbeddedPatient(SimulatedPatient(case, seed))

    async def rubrics(self, case: CaseScript, turns: Sequence[Turn]) -> list[Rubric]:
        """See :meth:`Verifier.rubrics`."""
        return await _read(partial(generate_rubrics, case, turns))

    async def grade(
        self, rubrics: Sequence[Rubric], reply_text: str, case: CaseScript, turns: Sequence[Turn]
    ) -> list[Verdict]:
        """See :meth:`Verifier.grade`."""
        return await _read(lambda: [grading.grade(rubric, reply_text, case, turns) for rubric in rubrics])

    def score(
        self, rubrics: Sequence[Rubric], verdicts: Sequence[Verdict], scoring: grading.Scoring | None = None
    ) -> float:
        """See :meth:`Verifier.score`."""
        return grading.score(rubrics, verdicts, scoring or self.scoring)


_KINDS = {"embedded": EmbeddedVerifier}


def build_verifier(config: VerifierConfig) -> Verifier:
    """The verifier of a recipe.

    Raises:
        ConfigError: it cannot run here; the message says what to install.
    """
    reason = unsupported_reason()
    if reason:
        raise ConfigError(reason)
    return _KINDS[config.kind](scoring=config.scoring)
