"""A verifier that takes its time, as one backed by a language model does, holds up no other dialogue or reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from m2train.config import Recipe
from m2train.loop import reply_group
from m2train.records import Generation, Rubric, Turn, Verdict
from m2train.rollout.dialogue import run_dialogue
from m2train.rollout.fragments import Slice
from m2train.verifier import CaseScript, PatientMessage, Verifier, build_verifier, grading, load_cases

MANY = 4


class Chat:
    """A token a character."""

    def _ids(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    open = patient = _ids

    def visible(self, ids: Sequence[int]) -> list[int]:
        return list(ids)

    close = visible

    def text(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Sampler:
    async def sample(self, key: str, prompt_ids: Sequence[int], *, affinity: str) -> Generation:
        ids = [ord(c) for c in "And?"]
        return Generation(token_ids=ids, logprobs=[0.0] * 4, finish_reason="stop", weight_versions=[], seed=0)


class Slow:
    """Answers nobody until `MANY` have asked."""

    def __init__(self) -> None:
        self.embedded = build_verifier(Recipe().verifier)
        self.all_here = asyncio.Barrier(MANY)

    def make_patient(self, case: CaseScript, seed: int) -> Slow:
        return self

    async def opening(self) -> PatientMessage:
        await self.all_here.wait()
        return PatientMessage("My knee hurts.", {})

    async def reply(self, doctor_text: str) -> PatientMessage | None:
        await self.all_here.wait()
        return PatientMessage("Since Monday.", {}) if doctor_text == "And?" else None

    async def rubrics(self, case: CaseScript, turns: Sequence[Turn]) -> list[Rubric]:
        return await self.embedded.rubrics(case, turns)

    async def grade(self, rubrics: Any, reply_text: str, case: CaseScript, turns: Any) -> list[Verdict]:
        await self.all_here.wait()
        return await self.embedded.grade(rubrics, reply_text, case, turns)

    def score(self, rubrics: Any, verdicts: Any, scoring: Any = None) -> float:
        return self.embedded.score(rubrics, verdicts, scoring)


def test_patients_and_graders_are_asked_side_by_side() -> None:
    async def run() -> None:
        slow, case, chat = Slow(), load_cases()[0], Chat()
        verifier: Verifier = slow
        recipe = Recipe.model_validate({"algo": {"group_size": MANY}})
        made = [
            run_dialogue(Sampler(), chat, verifier, case, f"d{i}", recipe, rounds=2)  # type: ignore[arg-type]
            for i in range(MANY)
        ]
        dialogues = await asyncio.wait_for(asyncio.gather(*made), 20)
        texts = [turn.text for turn in dialogues[0].turns if turn.role == "patient"]
        assert texts == ["My knee hurts.", "Since Monday.", "Since Monday."]
        around = SimpleNamespace(case=lambda _: case, verifier=verifier, chat=chat, recipe=recipe)
        group = await asyncio.wait_for(
            reply_group(around, Sampler(), Slice(dialogue=dialogues[0], num_turns=4)),  # type: ignore[arg-type]
            20,
        )
        assert len(group.replies) == MANY and all(len(r.verdicts) == len(group.rubrics) for r in group.replies)
        assert group.rubrics

    asyncio.run(run())


def test_reading_leaves_the_event_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of other dialogues arrive, and health checks are answered, while the embedded verifier reads."""

    def slowly(*_: Any) -> Verdict:
        time.sleep(0.1)
        return Verdict(met=True, explanation="")

    monkeypatch.setattr(grading, "grade", slowly)
    case = load_cases()[0]
    rubrics = [Rubric(dimension="d", text="t", weight=1, check="asks")] * 3

    async def turns_of_the_loop() -> int:
        grading_ = asyncio.ensure_future(build_verifier(Recipe().verifier).grade(rubrics, "Hello?", case, []))
        count = 0
        while not grading_.done():
            await asyncio.sleep(0.005)
            count += 1
        return count

    assert asyncio.run(turns_of_the_loop()) > 5
