"""Tree-packed training is the same training: micro-batches of shared prefixes, and runs against one row a reply."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forests import forests
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("megatron.core")
sys.path.insert(0, str(Path(__file__).parent / "dist"))

from learner_models import make_recipe, make_tree_batch, run_ranks, write_model  # noqa: E402

from m2train.config import ConfigError  # noqa: E402
from m2train.learner import packing  # noqa: E402
from m2train.learner.batch import Sample, TrainBatch  # noqa: E402
from m2train.learner.grouping import Limit, SharedPrefixes  # noqa: E402
from m2train.learner.packing import Costs, build_micro_batch, plan_forest, plan_step  # noqa: E402

COSTS = Costs(1 / 400, 0.1)
CPU = torch.device("cpu")


def batch_of(sequences: list[list[int]], seed: int = 0) -> TrainBatch:
    """Samples of these tokens, each with the last few as its reply."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for i, tokens in enumerate(sequences):
        reply = int(torch.randint(1, len(tokens), (1,), generator=g))
        samples.append(
            Sample(
                token_ids=torch.tensor(tokens),
                loss_start=len(tokens) - reply,
                rollout_logp=torch.rand(reply, generator=g),
                advantage=float(i),
                seq_id=i,
                old_logp=torch.rand(reply, generator=g),
            )
        )
    return TrainBatch(samples=samples, denom=1.0, temperature=1.0)


@settings(max_examples=80, deadline=None)
@given(forests(max_new=20), st.integers(1, 3), st.integers(1, 2), st.sampled_from([None, 25]), st.integers(16, 160))
def test_micro_batches_are_complete_and_within_the_caps(
    case: Any, dp: int, tp: int, max_rows: int | None, cap: int
) -> None:
    sequences = [s for s in case[0] if len(s) > 1]
    assume(sequences)
    batch = batch_of(sequences)
    assume(max(map(len, sequences)) < cap and max(s.reply_length for s in batch.samples) <= (max_rows or cap))
    recipe = make_recipe()
    changes = {"dp": dp, "tp": tp, "micro_batch_tokens": cap, "micro_batch_loss_rows": max_rows}
    recipe = recipe.model_copy(update={"learner": recipe.learner.model_copy(update=changes)})
    plans = [plan_step(batch, recipe, COSTS, rank, tp) for rank in range(dp)]
    members = plans[0].members
    assert all(plan.members == members and plan.tokens == plans[0].tokens for plan in plans)
    assert len(members) == dp and len({len(rank) for rank in members}) == 1
    assert sorted(i for rank in members for one in rank for i in one) == list(range(len(sequences)))
    for rank, plan in enumerate(plans):
        for one, tokens, forest in zip(members[rank], plan.tokens[rank], plan.forests, strict=True):
            micro = build_micro_batch(batch, one, forest, CPU)
            assert micro.tokens.shape[1] <= cap and micro.tokens.shape[1] % tp == 0
            assert len(micro.rows) <= (max_rows or cap * len(sequences))
            assert 0 <= micro.tokens.shape[1] - tokens < tp or not one
            assert_micro_batch(batch, one, micro)


def assert_micro_batch(batch: TrainBatch, members: list[int], micro: Any) -> None:
    """Rows, targets and what is looked up by them, member after member."""
    at = 0
    for k, i in enumerate(members):
        sample = batch.samples[i]
        part = slice(at, at + sample.reply_length)
        path = micro.forest.rows(k).long()
        assert torch.equal(micro.tokens[0, path], sample.token_ids)
        assert torch.equal(micro.rows[part], path[sample.loss_start - 1 : -1])
        assert torch.equal(micro.target[part], sample.token_ids[sample.loss_start :])
        assert (micro.seq[part] == k).all() and micro.advantage[k] == sample.advantage
        assert torch.equal(micro.rollout_logp[part], sample.rollout_logp)
        assert torch.equal(micro.old_logp[part], sample.old_logp)
        at += sample.reply_length
    assert len(micro.rows) == len(micro.target) == len(micro.seq) == len(micro.rollout_logp) == at


def test_a_fork_row_has_several_targets() -> None:
    batch = batch_of([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 3, 4]])
    for sample in batch.samples:
        object.__setattr__(sample, "loss_start", 2)
        object.__setattr__(sample, "old_logp", torch.zeros(2))
        object.__setattr__(sample, "rollout_logp", torch.zeros(2))
    micro = build_micro_batch(batch, [0, 1, 2], plan_forest(batch.samples, shared=True), CPU)
    assert micro.tokens.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert micro.rows.tolist() == [1, 2, 1, 4, 1, 2] and micro.target.tolist() == [3, 4, 5, 6, 3, 4]
    assert micro.seq.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_group_stays_whole_where_it_fits_and_shares_its_context_where_not() -> None:
    context = list(range(100, 150))
    sequences = [context + [i] * 10 for i in range(8)]
    prefixes = SharedPrefixes([torch.tensor(s) for s in sequences], [10] * 8)
    assert [unit.samples for unit in prefixes.units(Limit(130, 1000))] == [list(range(8))]
    split = prefixes.units(Limit(90, 1000))
    assert sorted(len(unit.samples) for unit in split) == [4, 4] and {unit.tokens for unit in split} == {90}
    assert [len(unit.samples) for unit in prefixes.units(Limit(130, 30))] == [3, 3, 2]
    assert len(prefixes.units(Limit(0, 0))) == 8
    assert prefixes.size([0, 3]) == (70, 50 * 51 // 2 + 2 * (500 + 55))


def first_fit(forest: Any, rows: list[int], limit: Limit) -> list[tuple[list[int], int, int]]:
    """Units by recursion over the segments: (samples, unique tokens, scored tokens)."""
    seg = forest.segments
    children: dict[int, list[int]] = {}
    for s, parent in enumerate(seg.parent.tolist()):
        children.setdefault(parent, []).append(s)

    def cut(s: int) -> list[list[Any]]:
        """[samples, tokens below the path, rows] of each unit of a subtree; the path is the caller's."""
        own = int(seg.end[s] - seg.start[s])
        path = int(seg.depth[s]) + own
        ending = [i for i, leaf in enumerate(seg.leaf.tolist()) if leaf == s]
        parts = [part for child in children.get(s, []) for part in cut(child)]
        samples = ending + [i for part in parts for i in part[0]]
        whole = [samples, int(seg.depth[s]) + int(seg.subtree_end[s] - seg.start[s]), sum(rows[i] for i in samples)]
        if whole[1] <= limit.tokens and whole[2] <= limit.rows:
            return [whole]
        units: list[list[Any]] = []
        for part in sorted([*parts, *([[i], path, rows[i]] for i in ending)], key=lambda p: -p[1]):
            for unit in units:
                if unit[1] + part[1] - path <= limit.tokens and unit[2] + part[2] <= limit.rows:
                    unit[:] = [unit[0] + part[0], unit[1] + part[1] - path, unit[2] + part[2]]
                    break
            else:
                units.append(list(part))
        return units

    return sorted((sorted(unit[0]), unit[1], unit[2]) for root in children.get(-1, []) for unit in cut(root))


@settings(max_examples=300, deadline=None)
@given(forests(max_sequences=24, max_new=12), st.integers(0, 60) | st.just(float("inf")), st.integers(0, 60))
def test_units_are_those_of_plain_first_fit(case: Any, tokens: float, scored: float) -> None:
    sequences = [torch.tensor(s) for s in case[0] if s]
    rows = [1 + i % 7 for i in range(len(sequences))]
    for limit in (Limit(tokens, scored), Limit(tokens * 0.7, float("inf"))):
        prefixes = SharedPrefixes(sequences, rows)
        got = [(unit.samples, unit.tokens, unit.rows) for unit in prefixes.units(limit)]
        assert got == first_fit(prefixes.plan, rows, limit)
        for samples, unique, total in got:
            assert prefixes.size(samples)[0] == unique and sum(rows[i] for i in samples) == total


def test_ranks_split_a_group_rather_than_idle() -> None:
    context = list(range(100, 150))
    batch = batch_of([context + [i] * 40 for i in range(8)])
    recipe = make_recipe(dp=2, micro_batch_tokens=1024)
    plan = plan_step(batch, recipe, COSTS)
    assert [len(one) for rank in plan.members for one in rank] == [4, 4]
    assert plan.tokens == [[210], [210]] and plan.input_tokens == 8 * 90


def test_the_number_of_micro_batches_that_was_asked_for_is_not_met_by_empty_ones() -> None:
    batch = batch_of([list(range(100, 150)) + [i] * 40 for i in range(8)])
    plan = plan_step(batch, make_recipe(micro_batches=4, micro_batch_tokens=1024), COSTS)
    assert [len(one) for one in plan.members[0]] == [2, 2, 2, 2]


def test_a_long_pipeline_would_rather_repeat_a_prompt_than_wait_for_one_large_micro_batch() -> None:
    group = [list(range(100, 200)) + [i] * 50 for i in range(4)]
    batch = batch_of([*group, [7] * 30])
    recipe = make_recipe(micro_batches=2, micro_batch_tokens=1024)

    def tokens(pp: int) -> list[int]:
        learner = recipe.learner.model_copy(update={"pp": pp})
        return plan_step(batch, recipe.model_copy(update={"learner": learner}), Costs(0.0, 0.0)).tokens[0]

    assert tokens(1) == [300, 30]  # 330 in all
    assert tokens(4) == [230, 200]  # 430, but the largest counts four times: 1120 and not 1230


def test_paths_that_repeat_are_planned_in_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts leave room for two replies a micro-batch: far more of them than the tokens alone would fill."""
    groups, cap = 24, 82
    prompts = [[g] * 70 for g in range(groups)]
    batch = batch_of([prompt + [1000 + i] * 5 for prompt in prompts for i in range(8)])
    learner = make_recipe().learner.model_copy(update={"micro_batch_tokens": cap, "dp": 2})
    tries = []
    best = packing._best_bins
    monkeypatch.setattr(packing, "_best_bins", lambda *a: tries.append(a[1]) or best(*a))
    plan = plan_step(batch, make_recipe().model_copy(update={"learner": learner}), COSTS)
    assert [len(one) for rank in plan.members for one in rank] == [2] * (groups * 4)
    assert tries[0] < groups * 2 and len(tries) <= 10, tries


def test_a_reply_over_the_row_cap_is_named() -> None:
    batch = batch_of([list(range(40))])
    recipe = make_recipe()
    learner = recipe.learner.model_copy(update={"micro_batch_loss_rows": batch.samples[0].reply_length - 1})
    with pytest.raises(ConfigError, match="a reply has .* tokens; learner.micro_batch_loss_rows"):
        plan_step(batch, recipe.model_copy(update={"learner": learner}), COSTS)
    with pytest.raises(ConfigError, match="do not fit in learner.micro_batch_loss_rows = 8"):
        make_recipe(micro_batch_loss_rows=8)


# ------------------------------------------------------------------------------------------------- training runs

MODELS = ("llama", "qwen3")
CASES = ("tree", "none", "split", "varlen")
FEW = 2


def train(folder: Path, sizes: tuple[int, int, int], jobs: list[str]) -> dict[str, dict[str, Any]]:
    """Results by model and case of `MODEL:CASE:STEPS` jobs, all run by the same processes."""
    for model in {job.partition(":")[0] for job in jobs}:
        write_model(folder / model, model, layers=2)
    run_ranks("tree_worker.py", folder, sizes, *jobs, limit_s=500.0)
    found: dict[str, dict[str, Any]] = torch.load(folder / "tree_tp{}pp{}dp{}.pt".format(*sizes), weights_only=False)
    for job in jobs:
        model, case, steps = job.split(":")
        assert len(found[model][case]["metrics"]) == len(found[model][case]["logp"]) == int(steps)
    return found


def assert_same_training(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Gradients of the first step within 1e-6, and 4e-6 of each tensor's largest; losses 1e-5 and norms 1e-4,
    relative; log-probs 1e-5. `want` may have gone on for longer."""
    steps = len(got["metrics"])
    assert 0 < steps <= len(want["metrics"])
    for name, grad in want["grads"].items():
        gap = float((got["grads"][name] - grad).abs().max())
        assert gap < min(1e-6, 4e-6 * float(grad.abs().max())), (name, gap)
    for mine, theirs in zip(got["metrics"], want["metrics"][:steps], strict=True):
        assert mine["policy/loss"] == pytest.approx(theirs["policy/loss"], rel=1e-5, abs=1e-6)
        assert mine["learner/grad_norm"] == pytest.approx(theirs["learner/grad_norm"], rel=1e-4)
    for mine, theirs in zip(got["logp"], want["logp"][:steps], strict=True):
        assert max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True)) < 1e-5


def assert_packings_agree(found: dict[str, dict[str, Any]], sizes: tuple[int, int, int]) -> None:
    """Every packing of every model against one reply a micro-batch, for as many steps as it was run."""
    forest = plan_forest(make_tree_batch().samples, shared=True)
    forest = plan_forest(make_tree_batch().samples, shared=True, pad=-forest.num_rows % sizes[0])
    for cases in found.values():
        for case in cases.keys() - {"none"}:
            assert_same_training(cases[case], cases["none"])
        tree, split, apart = (
            cases[case]["metrics"][0] if case in cases else None for case in ("tree", "split", "none")
        )
        assert tree["learner/unique_tokens"] < 0.6 * apart["learner/unique_tokens"]
        assert apart["learner/duplicate_tokens"] == 0
        assert tree["learner/tokens"] == apart["learner/tokens"] == apart["learner/unique_tokens"]
        assert tree["learner/unique_tokens"] + tree["learner/duplicate_tokens"] == tree["learner/tokens"]
        assert tree["learner/micro_batches"] == 1 < apart["learner/micro_batches"]
        if sizes[2] == 1:  # on two ranks there are two forests
            assert tree["learner/tile_inflation"] == pytest.approx(forest.tile_inflation)
        assert 0 <= tree["learner/plan_wait_s"] < 1 and tree["learner/plan_s"] > 0
        assert abs(apart["policy/loss"]) > 1e-3 and apart["policy/clip_frac_high"] > 0.01, "a trivial case"
        if split is not None:
            assert (
                1 < split["learner/micro_batches"] and split["learner/unique_tokens"] < apart["learner/unique_tokens"]
            )


@pytest.mark.timeout(520)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 1)], ids=["tp1pp1", "tp2pp2"])
def test_twenty_steps_are_the_same_packed_and_apart(tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    jobs = [f"{model}:{case}:20" for model in MODELS for case in ("tree", "none")]
    found = train(tmp_path, sizes, [*jobs, *(f"qwen3:{case}:{FEW}" for case in ("split", "varlen"))])
    for cases in found.values():  # the weights go somewhere: equality of runs that stand still would prove little
        first, last = cases["tree"]["logp"][0], cases["tree"]["logp"][-1]
        assert max(float((a - b).abs().max()) for a, b in zip(first, last, strict=True)) > 0.1
    assert_packings_agree(found, sizes)


@pytest.mark.slow
@pytest.mark.timeout(520)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 1), (1, 1, 2)], ids=["tp1pp1", "tp2pp2", "dp2"])
def test_every_packing_of_every_model(tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    steps = 20 if sizes[2] == 1 else 5
    assert_packings_agree(train(tmp_path, sizes, [f"{m}:{c}:{steps}" for m in MODELS for c in CASES]), sizes)


def test_the_batch_shares_what_it_says() -> None:
    batch = make_tree_batch()
    forest = plan_forest(batch.samples, shared=True)
    assert forest.num_rows < 0.6 * forest.num_input_tokens
    micro = build_micro_batch(batch, list(range(len(batch.samples))), forest, CPU)
    forks = {}
    for row, target in zip(micro.rows.tolist(), micro.target.tolist(), strict=True):
        forks.setdefault(row, set()).add(target)
    assert max(len(targets) for targets in forks.values()) >= 2
    assert len(micro.rows) > len(set(zip(micro.rows.tolist(), micro.target.tolist(), strict=True)))
