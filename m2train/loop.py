"""Stage 3 of the M2 report: multi-turn reinforcement learning by fragments, with the improved GRPO.

    cases -> dialogues (policy x patient) -> slices of history, filtered -> rubrics -> G replies a slice -> grades
          -> rewards -> group advantage -> Megatron-core -> new weights to the engines

This file is the algorithm; how each line is done lives behind it. A step is a function of the run's seed, the step's
number and the weights, so a killed run replays what it had and goes on as if never stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from m2train.concurrency import gather_or_cancel
from m2train.evals.heldout import evaluate
from m2train.files import write_atomic
from m2train.learner.batch import batches_from_groups
from m2train.learner.client import LearnerClient
from m2train.records import Group, Reply, StepRollouts
from m2train.reward import rescore, set_advantages
from m2train.rollout.dialogue import context_ids, run_dialogue
from m2train.rollout.fragments import Slice, select_slices
from m2train.rollout.sampler import Sampler
from m2train.run import Run
from m2train.rundir import load_rollouts
from m2train.stats import rollout_row


async def train(run: Run) -> None:
    """Run all steps from the last checkpoint on.

    Raises:
        RunError: an engine, the learner or the trust in the rollouts gave out; the message is the cause.
    """
    for step in range(run.first_step, run.recipe.steps):
        row: dict[str, float] = {}
        due = step == 0 or (run.recipe.eval.every and step % run.recipe.eval.every == 0)
        if due or run.dir.evaluation(step).exists():  # of the last step, before the run was given more
            row |= await evaluate(run, step)
        rollouts = await roll_out(run, step)
        row |= rollout_row(rollouts, trained=run.learner is not None)
        if run.learner is not None:
            row |= await improve(run, run.learner, step, rollouts.groups)
        run.record(step, row)
        run.check_trust(row)
        run.checkpoint(step + 1)
    run.record(run.recipe.steps, await evaluate(run, run.recipe.steps))


async def roll_out(run: Run, step: int) -> StepRollouts:
    """Sample and grade one step's replies with the current weights; or read them, if that was done before."""
    saved = run.saved_rollouts(step)
    if saved is not None:
        rollouts = run.trusted(load_rollouts(saved), saved)
        rescore(rollouts.groups, run.verifier)
        set_advantages(rollouts.groups, run.recipe.algo)
        run.dir.journal(step).unlink(missing_ok=True)
        return rollouts
    with run.phase("sync"):
        await run.publish(step)
    recipe, path = run.recipe, run.dir.rollouts(step)
    with run.sampler(run.dir.journal(step)) as sampler:
        cases = run.cases.draw(step, recipe.rollout.cases_per_step)
        with run.phase("dialogues"):
            dialogues = await run.gather(
                "dialogues",
                [
                    run_dialogue(
                        sampler,
                        run.chat,
                        run.verifier,
                        case,
                        f"step{step}/{index}-{case.id}",
                        recipe,
                        rounds=recipe.rollout.max_turns - 1,
                    )
                    for index, case in enumerate(cases)
                ],
            )
        slices, drops = select_slices(dialogues, recipe)
        with run.phase("replies"):
            groups = await run.gather("replies", [reply_group(run, sampler, part) for part in slices])
    set_advantages(groups, recipe.algo)
    rollouts = StepRollouts(
        step=step, weight_version=run.version, dialogues=dialogues, groups=groups, drops=dict(drops)
    )
    write_atomic(path, rollouts.model_dump_json())
    run.dir.journal(step).unlink()
    return rollouts


async def reply_group(run: Run, sampler: Sampler, part: Slice) -> Group:
    """Rubrics for one slice, G replies to it, a grade for each."""
    case = run.case(part.dialogue.case_id)
    prompt = context_ids(part.turns)
    rubrics = await run.verifier.rubrics(case, part.turns)

    async def reply(index: int) -> Reply:
        generation = await sampler.sample(f"{part.uid}/reply{index}", prompt, affinity=part.dialogue.uid)
        text = run.chat.text(run.chat.visible(generation.token_ids))
        verdicts = await run.verifier.grade(rubrics, text, case, part.turns)
        reward = run.verifier.score(rubrics, verdicts)
        return Reply(generation=generation, text=text, verdicts=verdicts, rubric_reward=reward)

    replies = await gather_or_cancel([reply(i) for i in range(run.recipe.algo.group_size)])
    return Group(
        uid=part.uid,
        case_id=case.id,
        dialogue_uid=part.dialogue.uid,
        num_turns=part.num_turns,
        context_ids=prompt,
        context=part.turns,
        rubrics=rubrics,
        replies=replies,
    )


async def improve(run: Run, learner: LearnerClient, step: int, groups: Sequence[Group]) -> dict[str, float]:
    """One policy update (or `algo.updates_per_step` of them) on the graded groups."""
    batches = batches_from_groups(groups, run.recipe)
    with run.phase("train"):
        result = await asyncio.to_thread(learner.train, step, batches)
    return result.metrics
