"""Packs dialogues, replies and grades into the JSON that app.js shows: a sample if too many.

The sample is chosen for what a reader asks first: evaluations and the first and last steps, then
steps spread evenly between them; within a step groups in file order, so that an evaluation shows
the same cases each time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from m2train.records import Dialogue, Generation, Group, Reply, StepRollouts, Turn
from m2train.report.read import Run, read_step, setting

MAX_FILES = 60
"""Step files read for one report; a long run has thousands."""
_GRADED_BY = {"train": "verifier", "eval": "eval"}
"""The section of the recipe whose `scoring` made a file's rewards."""


@dataclass(slots=True)
class Sample:
    """What the browser shows, and what it leaves out."""

    steps: list[dict[str, Any]]
    groups_shown: int
    groups_read: int
    files_read: int
    files_all: int
    eval_rewards: dict[int, float]
    """Mean over cases of the mean reward, of the evaluations that were read, by step."""

    def sentence(self) -> str:
        """How much of the run is shown."""
        if not self.files_all:
            return "This run has no rollout files."
        if self.groups_shown == self.groups_read and self.files_read == self.files_all:
            return f"All {self.groups_shown:,} groups of {self.files_all:,} step files are shown."
        return (
            f"A sample: {self.groups_shown:,} of the {self.groups_read:,} groups in "
            f"{self.files_read:,} of {self.files_all:,} step files. The rest is in the folders "
            "rollouts/ and eval/ of the run."
        )


def pack_rollouts(run: Run, max_bytes: int) -> Sample:
    """Pack as many groups as fit in `max_bytes` of JSON; unreadable files join run.problems."""
    files = _choose_files(run)
    packed: list[tuple[dict[str, Any], list[tuple[dict[str, Any], int]]]] = []
    rewards: dict[int, float] = {}
    for kind, path in files:
        record = read_step(path, run.problems)
        if record is None:
            continue
        if kind == "eval":
            cases: dict[str, list[float]] = {}
            for group in record.groups:
                cases.setdefault(group.case_id, []).extend(reply.reward for reply in group.replies)
            if any(cases.values()):
                rewards[record.step] = fmean(fmean(scores) for scores in cases.values() if scores)
        packed.append(_pack_step(kind, record, setting(run.config, _GRADED_BY[kind], "scoring")))
    shown = _fit(packed, max_bytes)
    steps = [step for step, _ in packed]
    steps.sort(key=lambda step: (step["kind"] != "eval", step["step"]))
    return Sample(
        steps=steps,
        groups_shown=shown,
        groups_read=sum(len(groups) for _, groups in packed),
        files_read=len(packed),
        files_all=len(run.rollout_files) + len(run.eval_files),
        eval_rewards=rewards,
    )


def spread(count: int) -> list[int]:
    """0..count-1 with both ends first, then midpoints: any prefix covers the whole range."""
    order = list(dict.fromkeys([0, count - 1])) if count else []
    parts = 2
    while len(order) < count:
        points = [round(i * (count - 1) / parts) for i in range(1, parts)]
        order = list(dict.fromkeys(order + points))
        parts *= 2
    return order


def _choose_files(run: Run) -> list[tuple[str, Path]]:
    """Evaluations and training steps in turn, each in the order of `spread`."""
    evals = [("eval", list(run.eval_files.values())[i]) for i in spread(len(run.eval_files))]
    steps = [("train", list(run.rollout_files.values())[i]) for i in spread(len(run.rollout_files))]
    mixed = []
    for i in range(max(len(evals), len(steps))):
        mixed += evals[i : i + 1] + steps[i : i + 1]
    return mixed[:MAX_FILES]


def _fit(packed: list[tuple[dict[str, Any], list[tuple[dict[str, Any], int]]]], max_bytes: int) -> int:
    """Round-robin over the files: the k-th group of each, until the budget is spent."""
    shown, used = 0, 0
    for k in range(max((len(groups) for _, groups in packed), default=0)):
        for step, groups in packed:
            if k < len(groups) and used + groups[k][1] <= max_bytes:
                step["groups"].append(groups[k][0])
                used += groups[k][1]
                shown += 1
    for step, _ in packed:
        needed = {group["dialogue"] for group in step["groups"]}
        step["dialogues"] = {uid: d for uid, d in step["dialogues"].items() if uid in needed}
    return shown


def _pack_step(
    kind: str, record: StepRollouts, scoring: Any
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], int]]]:
    dialogues = {dialogue.uid: dialogue for dialogue in record.dialogues}
    step: dict[str, Any] = {
        "kind": kind,
        "step": record.step,
        "version": record.weight_version,
        "scoring": scoring,
        "total": len(record.groups),
        "groups": [],
        "dialogues": {uid: _pack_dialogue(dialogue) for uid, dialogue in dialogues.items()},
        "drops": record.drops,
    }
    sizes = {uid: len(json.dumps(d, default=str)) for uid, d in step["dialogues"].items()}
    groups = []
    for group in record.groups:
        item = _pack_group(group, dialogues.get(group.dialogue_uid))
        # a dialogue shared by several groups is charged to each: the estimate errs on the safe side
        groups.append((item, len(json.dumps(item, default=str)) + sizes.get(group.dialogue_uid, 0)))
    return step, groups


def _pack_dialogue(dialogue: Dialogue) -> dict[str, Any]:
    return {
        "end": dialogue.end_reason,
        "seed": dialogue.seed,
        "turns": [_pack_turn(turn) for turn in dialogue.turns],
    }


def _pack_turn(turn: Turn) -> dict[str, Any]:
    item: dict[str, Any] = {"role": turn.role, "text": turn.text}
    if turn.state:
        item["state"] = turn.state
    if turn.generation is not None:
        item["gen"] = _pack_generation(turn.generation)
    return item


def _pack_group(group: Group, dialogue: Dialogue | None) -> dict[str, Any]:
    item: dict[str, Any] = {
        "uid": group.uid,
        "case": group.case_id,
        "dialogue": group.dialogue_uid,
        "turns": group.num_turns,
        "prompt": len(group.context_ids),
        "rubrics": [[r.dimension, r.text, r.weight, r.check] for r in group.rubrics],
        "replies": [_pack_reply(reply) for reply in group.replies],
    }
    slice_ = dialogue.turns[: group.num_turns] if dialogue is not None else []
    if [(t.role, t.text) for t in slice_] != [(t.role, t.text) for t in group.context]:
        item["context"] = [_pack_turn(turn) for turn in group.context]
    return item


def _pack_reply(reply: Reply) -> dict[str, Any]:
    return {
        "text": reply.text,
        "gen": _pack_generation(reply.generation),
        "marks": [
            ["unknown" if v.met is None else "met" if v.met else "unmet", v.explanation] for v in reply.verdicts
        ],
        "rubric": _short(reply.rubric_reward),
        "length": _short(reply.length_reward),
        "reward": _short(reply.reward),
        "adv": _short(reply.advantage),
    }


def _pack_generation(generation: Generation) -> dict[str, Any]:
    return {
        "ids": generation.token_ids,
        "lp": [_short(value, 3) for value in generation.logprobs],
        "end": generation.finish_reason,
        "seed": generation.seed,
        "spans": [[span.version, span.start, span.end] for span in generation.weight_versions],
    }


def _short(value: float, digits: int = 5) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
