"""The loop's own decisions, its parts replaced: what is evaluated when."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m2train import loop
from m2train.config import parse
from m2train.records import StepRollouts
from m2train.rundir import RunDir


@pytest.mark.parametrize(("every", "wanted"), [(0, [0, 2, 5]), (3, [0, 2, 3, 5])])
def test_the_evaluation_at_the_end_of_a_shorter_run_stays_in_the_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every: int, wanted: list[int]
) -> None:
    """Resuming with more steps drops the rows after the checkpoint, that evaluation's among them."""
    rows: dict[int, dict[str, float]] = {}

    async def evaluate(run: Any, step: int) -> dict[str, float]:
        run.dir.evaluation(step).touch()
        return {"heldout/reward": 0.5}

    async def roll_out(run: Any, step: int) -> StepRollouts:
        return StepRollouts(step=step, weight_version="", dialogues=[], groups=[])

    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(loop, "roll_out", roll_out)
    directory = RunDir(tmp_path)
    for first, steps in ((0, 2), (2, 5)):
        run: Any = SimpleNamespace(
            first_step=first,
            recipe=parse({"steps": steps, "eval": {"every": every}}),
            dir=directory,
            learner=None,
            record=rows.__setitem__,
            check_trust=lambda row: None,
            checkpoint=lambda step: None,
        )
        rows = {step: row for step, row in rows.items() if step < first}
        run.record = rows.__setitem__
        asyncio.run(loop.train(run))
    assert [step for step, row in rows.items() if "heldout/reward" in row] == wanted
