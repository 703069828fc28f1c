"""`learner.packing = "auto"`: each batch is packed the way that is predicted to take less time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
sys.path.insert(0, str(Path(__file__).parent / "dist"))

from learner_models import make_batch, make_recipe, make_tree_batch  # noqa: E402

from m2train.config import Recipe  # noqa: E402
from m2train.learner.batch import TrainBatch  # noqa: E402
from m2train.learner.packing import Costs, StepPlan, plan_step  # noqa: E402

COSTS = Costs(1 / 400, 0.1)


def planned(batch: TrainBatch, recipe: Recipe, **learner: Any) -> StepPlan:
    changed = recipe.learner.model_copy(update={"packing": "auto", **learner})
    return plan_step(batch, recipe.model_copy(update={"learner": changed}), COSTS)


def test_what_is_shared_decides() -> None:
    shared, apart = planned(make_tree_batch(), make_recipe()), planned(make_batch(), make_recipe())
    assert shared.packing == "tree" and sum(map(sum, shared.tokens)) < shared.input_tokens
    assert apart.packing == "varlen" and sum(map(sum, apart.tokens)) == apart.input_tokens
    assert shared.choice is not None and shared.choice.gain > 0.05
    assert apart.choice is not None and apart.choice.gain <= 0.05 and "varlen" in apart.choice.reason


def test_it_is_the_plan_of_what_was_chosen() -> None:
    for batch, packing in ((make_tree_batch(), "tree"), (make_batch(), "varlen")):
        chosen, asked = planned(batch, make_recipe()), planned(batch, make_recipe(), packing=packing)
        assert (chosen.members, chosen.tokens) == (asked.members, asked.tokens) and asked.choice is None
        for a, b in zip(chosen.forests, asked.forests, strict=True):
            assert torch.equal(a.subtree_end, b.subtree_end)


def test_what_micro_batches_repeat_counts() -> None:
    """A cap that parts most replies from each other leaves little to share."""
    batch = make_tree_batch()
    longest = max(s.token_ids.numel() for s in batch.samples)
    roomy, tight = (planned(batch, make_recipe(), micro_batch_tokens=cap).choice for cap in (4096, longest))
    assert roomy is not None and tight is not None and tight.gain < roomy.gain - 0.1


def test_a_forest_where_varlen_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches are given: a forest fits, its sequences apart do not, and a slow kernel is no reason to fail."""
    from m2train.learner import packing

    slow = packing.mk.KernelCosts(
        tree_forward=9.0, tree_backward=9.0, varlen_forward=0.1, varlen_backward=0.1, source="given"
    )
    monkeypatch.setattr(packing, "ASSUMED", {"cpu": slow, "cuda": slow})
    monkeypatch.setattr(sys.modules[__name__], "COSTS", Costs(10.0, 0.0))
    batch = make_tree_batch()
    assert planned(batch, make_recipe(), micro_batch_tokens=4096, micro_batches=1).packing == "varlen"
    forest = sum(map(sum, planned(batch, make_recipe(), packing="tree").tokens))
    tight = planned(batch, make_recipe(), micro_batch_tokens=forest, micro_batches=1)
    assert tight.packing == "tree" and tight.choice is not None and "as varlen" in tight.choice.reason
