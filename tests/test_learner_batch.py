"""Samples, the batch file, packing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from m2train.config import ConfigError, Recipe, parse
from m2train.learner.batch import Sample, TrainBatch, batches_from_groups, load_batch, save_batch
from m2train.learner.packing import Costs, MicroBatch, build_micro_batch, plan_forest, plan_micro_batches
from m2train.records import Generation, Group, Reply, VersionSpan


def sample(context: int, reply: int, seq_id: int = 0, *, old: bool = False, advantage: float = 0.3) -> Sample:
    logp = -torch.rand(reply)
    return Sample(
        token_ids=torch.arange(context + reply) + 100 * seq_id,
        loss_start=context,
        rollout_logp=logp,
        advantage=advantage,
        seq_id=seq_id,
        old_logp=logp + 0.1 if old else None,
    )


def recipe(**learner: Any) -> Recipe:
    return parse(
        {
            "learner": {"micro_batch_tokens": 400} | learner,
            "algo": {"max_new_tokens": 50},
            "rollout": {"max_context_tokens": 100},
        }
    )


@pytest.mark.parametrize("old", [False, True])
def test_file_round_trip(tmp_path: Path, old: bool) -> None:
    batch = TrainBatch(
        samples=[sample(3, 5, 0, old=old), sample(1, 1, 7, old=old, advantage=-1 / 3)], denom=512.0, temperature=0.7
    )
    save_batch(tmp_path / "b.safetensors", batch)
    got = load_batch(tmp_path / "b.safetensors")
    assert (got.denom, got.temperature) == (512.0, 0.7)
    for mine, theirs in zip(got.samples, batch.samples, strict=True):
        assert torch.equal(mine.token_ids, theirs.token_ids) and torch.equal(mine.rollout_logp, theirs.rollout_logp)
        assert (mine.loss_start, mine.advantage, mine.seq_id) == (theirs.loss_start, theirs.advantage, theirs.seq_id)
        assert (mine.old_logp is None) == (not old)
        if old:
            assert torch.equal(mine.old_logp, theirs.old_logp)


def test_half_given_old_logp_is_refused(tmp_path: Path) -> None:
    batch = TrainBatch(samples=[sample(3, 5, old=True), sample(3, 5)], denom=1.0, temperature=1.0)
    with pytest.raises(ValueError, match="all or none"):
        save_batch(tmp_path / "b.safetensors", batch)


@pytest.mark.parametrize(("context", "reply", "values"), [(0, 5, 5), (5, 0, 0), (5, 5, 4)])
def test_malformed_samples(context: int, reply: int, values: int) -> None:
    with pytest.raises(ValueError, match="sample 9"):
        Sample(
            token_ids=torch.arange(context + reply),
            loss_start=context,
            rollout_logp=torch.zeros(values),
            advantage=0.0,
            seq_id=9,
        )


def members_of(lengths: list[int], settings: Recipe, multiple: int = 1) -> list[list[list[int]]]:
    """The packing of samples of these lengths, of which no two begin alike."""
    samples = [
        Sample(
            token_ids=torch.full((n,), i),
            loss_start=n - 1,
            rollout_logp=torch.zeros(1),
            advantage=0.0,
            seq_id=i,
        )
        for i, n in enumerate(lengths)
    ]
    return plan_micro_batches(samples, settings, Costs(1 / 400, 0.1), multiple)[0]


def micro_of(batch: TrainBatch, members: list[int], pad: int) -> MicroBatch:
    forest = plan_forest([batch.samples[i] for i in members], shared=False, pad=pad)
    return build_micro_batch(batch, members, forest, torch.device("cpu"))


@pytest.mark.parametrize("packing", ["tree", "varlen"])
@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("micro", [None, 6])
def test_plan_is_complete_capped_and_even(dp: int, micro: int | None, packing: str) -> None:
    lengths = [20 + (37 * i) % 120 for i in range(25)]
    plan = members_of(lengths, recipe(dp=dp, micro_batches=micro, packing=packing))
    assert len(plan) == dp and len({len(rank) for rank in plan}) == 1
    if micro is not None:
        assert len(plan[0]) == micro
    members = [i for rank in plan for one in rank for i in one]
    assert sorted(members) == list(range(25))
    assert max(sum(lengths[i] for i in one) for rank in plan for one in rank) <= 400


def test_as_few_micro_batches_as_fit() -> None:
    lengths = [100] * 9
    assert len(members_of(lengths, recipe())[0]) == math.ceil(900 / 400)


def test_dummies_where_samples_run_out() -> None:
    plan = members_of([30, 30, 30], recipe(packing="none", dp=2))
    assert [len(rank) for rank in plan] == [2, 2]
    assert sum(not one for rank in plan for one in rank) == 1
    plan = members_of([30], recipe(dp=2))
    assert sorted(len(one) for rank in plan for one in rank) == [0, 1]


@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ([401], {}, "a sample has 401 tokens"),
        ([390, 390, 390], {"micro_batches": 2}, "raise learner.micro_batches"),
    ],
)
def test_plans_that_cannot_be(lengths: list[int], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        members_of(lengths, recipe(**settings))


def test_rows_padded_for_sequence_parallelism_stay_under_the_cap() -> None:
    assert members_of([200, 199], recipe(tp=4), multiple=4) == [[[0, 1]]]  # 399 rows become 400
    assert members_of([400], recipe(tp=4), multiple=4) == [[[0]]]
    with pytest.raises(ConfigError, match="a sample has 399 tokens.* has room for 396"):
        members_of([399], recipe(tp=4, micro_batch_tokens=399), multiple=4)


def test_micro_batch_targets() -> None:
    batch = TrainBatch(samples=[sample(3, 2, 0), sample(1, 4, 1), sample(2, 1, 2)], denom=1.0, temperature=1.0)
    micro = micro_of(batch, [2, 0], 0)
    assert micro.forest.lengths == (3, 5) and micro.tokens.shape == (1, 8)
    assert micro.tokens[0, micro.rows + 1].equal(micro.target)
    assert micro.target.tolist() == [202, 3, 4] and micro.seq.tolist() == [0, 1, 1]
    micro = micro_of(batch, [0], 3)
    assert micro.forest.lengths == (5, 3), "the pad is a sequence of its own"


def test_dummy_micro_batch() -> None:
    batch = TrainBatch(samples=[sample(3, 2)], denom=1.0, temperature=1.0)
    micro = micro_of(batch, [], 2)
    assert (
        micro.forest.lengths == (2,) and micro.rows.numel() == micro.target.numel() == micro.rollout_logp.numel() == 0
    )


def group(uid: str, replies: int) -> Group:
    def reply(i: int) -> Reply:
        span = VersionSpan(version="v", start=0, end=2)
        gen = Generation(
            token_ids=[i, i + 1], logprobs=[-1.0, -2.0], finish_reason="stop", weight_versions=[span], seed=0
        )
        return Reply(generation=gen, text="", verdicts=[], rubric_reward=0.0, advantage=float(i))

    return Group(
        uid=uid, case_id="c", dialogue_uid="d", num_turns=2, context_ids=[5, 6, 7], context=[], rubrics=[],
        replies=[reply(i) for i in range(replies)],
    )  # fmt: skip


def test_batches_from_groups() -> None:
    settings = parse(
        {"algo": {"updates_per_step": 2, "group_size": 4, "max_new_tokens": 50}, "rollout": {"temperature": 0.9}}
    )
    batches = batches_from_groups([group(str(i), 4) for i in range(3)], settings)
    assert [len(b.samples) for b in batches] == [8, 4]
    assert [b.denom for b in batches] == [2 * 4 * 50.0, 1 * 4 * 50.0], "groups x G x l_max, groups that are there"
    assert batches[0].samples[1].token_ids.tolist() == [5, 6, 7, 1, 2] and batches[0].samples[1].advantage == 1.0
    assert [s.seq_id for b in batches for s in b.samples] == list(range(12))
    assert len(batches_from_groups([group("0", 4)], settings)) == 1
    assert batches_from_groups([], settings) == []
