"""Greedy dialogues with unseen cases, every doctor turn graded like a training reply."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, get_args

from m2train.files import write_atomic
from m2train.records import Dialogue, Group, Reply, StepRollouts
from m2train.rollout.dialogue import context_ids, run_dialogue
from m2train.rundir import load_rollouts
from m2train.stats import dimension_rows
from m2train.verifier import CaseSampler, CaseScript
from m2train.verifier.grading import Scoring

if TYPE_CHECKING:
    from m2train.run import Run


def spread(cases: Sequence[CaseScript], num: int) -> list[CaseScript]:
    """The first `num` cases of a fixed order in which the specialties alternate."""
    return CaseSampler(cases, seed=0).draw(0, num) if num else []


async def evaluate(run: Run, step: int) -> dict[str, float]:
    """Grade the weights before `step` on `eval.cases` held-out cases, the same at every step and in every run.

    Each case is one greedy dialogue of `eval.turns` doctor turns; the score of a case is the mean over its turns. The
    result is kept in `eval/`, so a resumed run does not repeat it.

    Returns:
        `heldout/reward` (by `eval.scoring`), its standard error over cases, the score under each scoring, and the
        rubric dimensions; empty without engines or cases.
    """
    cases = spread(run.heldout, run.recipe.eval.cases)
    path = run.dir.evaluation(step)
    if not cases or (run.engines is None and not path.exists()):
        return {}
    if path.exists():
        path.with_suffix(".journal.jsonl").unlink(missing_ok=True)
        return _row(run, run.trusted(load_rollouts(path), path).groups)
    with run.phase("sync"):
        await run.publish(step)
    with run.phase("eval"), run.sampler(path.with_suffix(".journal.jsonl"), greedy=True) as sampler:
        dialogues = await run.gather(
            "evaluation",
            [
                run_dialogue(
                    sampler,
                    run.chat,
                    run.verifier,
                    case,
                    f"eval/{case.id}",
                    run.recipe,
                    rounds=run.recipe.eval.turns,
                )
                for case in cases
            ],
        )
        graded = await run.gather("grades", [_graded_turns(run, dialogue) for dialogue in dialogues])
    groups = [group for part in graded for group in part]
    rollouts = StepRollouts(step=step, weight_version=run.version, dialogues=dialogues, groups=groups)
    write_atomic(path, rollouts.model_dump_json())
    path.with_suffix(".journal.jsonl").unlink()
    return _row(run, groups)


async def _graded_turns(run: Run, dialogue: Dialogue) -> list[Group]:
    case = run.case(dialogue.case_id)
    groups = []
    for index, turn in enumerate(dialogue.turns):
        if turn.role != "doctor" or turn.generation is None:
            continue
        context = dialogue.turns[:index]
        rubrics = await run.verifier.rubrics(case, context)
        verdicts = await run.verifier.grade(rubrics, turn.text, case, context)
        reply = Reply(
            generation=turn.generation,
            text=turn.text,
            verdicts=verdicts,
            rubric_reward=run.verifier.score(rubrics, verdicts, run.recipe.eval.scoring),
        )
        groups.append(
            Group(
                uid=f"{dialogue.uid}/slice{index}",
                case_id=case.id,
                dialogue_uid=dialogue.uid,
                num_turns=index,
                context_ids=context_ids(context),
                context=context,
                rubrics=rubrics,
                replies=[reply],
            )
        )
    return groups


def _row(run: Run, groups: list[Group]) -> dict[str, float]:
    by_case: dict[str, list[Group]] = {}
    for group in groups:
        by_case.setdefault(group.case_id, []).append(group)
    if not by_case:
        return {"heldout/cases": 0.0}
    scores = [fmean(group.replies[0].rubric_reward for group in case) for case in by_case.values()]
    error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    row = {"heldout/reward": fmean(scores), "heldout/stderr": error, "heldout/cases": float(len(scores))}
    for scoring in get_args(Scoring):
        row[f"heldout/{scoring}"] = fmean(
            fmean(run.verifier.score(group.rubrics, group.replies[0].verdicts, scoring) for group in case)
            for case in by_case.values()
        )
    row["heldout/length_mean"] = fmean(len(group.replies[0].generation.token_ids) for group in groups)
    return row | {f"heldout/{name}": value for name, value in dimension_rows(groups).items()}
