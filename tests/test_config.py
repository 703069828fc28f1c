"""Recipes: what is read, what is refused, and with which words."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from m2train.config import ConfigError, Recipe, load, parse

RECIPES = sorted(Path(__file__).parent.parent.joinpath("recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_survives_a_round_trip(path: Path) -> None:
    recipe = load(path)
    assert parse(tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("learner.tpx=2", ["learner.tpx", "learner.tp?"]),
        ("tp=2", ["learner.tp?"]),
        ("rollout.temprature=1", ["rollout.temperature?"]),
        ("steps=0", ["steps", "got 0"]),
        ("algo.kind='ppo'", ["algo.kind", "'ppo'"]),
        ("algo.updates_per_step=3", ["algo.updates_per_step = 3", "rollout.cases_per_step"]),
        ("rollout.slices_per_dialogue=9", ["rollout.slices_per_dialogue = 9", "rollout.max_turns"]),
        ("learner.dp=100", ["learner.dp", "algo.group_size"]),
        ("learner.micro_batch_tokens=64", ["learner.micro_batch_tokens = 64", "rollout.max_context_tokens"]),
        ("learner={packing='none', micro_batches=2}", ["learner.packing = 'none'", "learner.micro_batches = 2"]),
        ("learner={tp=5, micro_batch_tokens=2304}", ["learner.tp = 5 with sequence parallelism leaves 2300"]),
        ("algo.tis_cap=inf", ["algo.tis_cap", "finite"]),
        ("algo.entropy_coef=nan", ["algo.entropy_coef", "finite"]),
        ("algo.length_threshold=nan", ["algo.length_threshold", "finite"]),
        ("learner.min_lr=1.0", ["learner.min_lr = 1", "learner.lr = 1e-06"]),
        ("vllm.max-model-len=100", ["vllm.max-model-len = 100", "algo.max_new_tokens = 2304"]),
        ("name='a/b'", ["name", "a/b"]),
        ("steps", ["section.key=value"]),
        ("steps.x=1", ["steps is a value"]),
    ],
)
def test_mistakes_are_refused_by_name(override: str, names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("steps = 5\n")
    with pytest.raises(ConfigError) as err:
        load(path, [override])
    for name in names:
        assert name in str(err.value)


def test_override_takes_toml_values_and_bare_strings(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("")
    recipe = load(
        path, ["learner.lr=2e-5", "model.path=some/folder", "vllm.max_num_seqs=8", "rollout.urls=['http://a']"]
    )
    assert recipe.learner.lr == 2e-5
    assert recipe.model.path == "some/folder"
    assert recipe.vllm == {"max_num_seqs": 8}
    assert recipe.rollout.urls == ["http://a"]


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read recipe"):
        load(tmp_path / "missing.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(bad)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"learner": {"tp": 2}}, ["learner.tp = 2", "9 heads", "3 KV heads", "possible: 1, 3"]),
        ({"learner": {"pp": 4}}, ["learner.pp = 4", "30 layers"]),
        (
            {"rollout": {"tensor_parallel": 2}},
            ["rollout.tensor_parallel = 2", "9 heads", "3 KV heads", "possible: 1, 3, 9"],
        ),
        (
            {"rollout": {"max_context_tokens": 8100}, "learner": {"micro_batch_tokens": 9000}},
            ["rollout.max_context_tokens", "8192 positions"],
        ),
    ],
)
def test_layouts_that_the_model_cannot_take(settings: dict[str, dict[str, int]], names: list[str]) -> None:
    with pytest.raises(ConfigError) as err:
        parse(settings).check_model(heads=9, kv_heads=3, layers=30, max_positions=8192)
    for name in names:
        assert name in str(err.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"learner": {"tp": 3, "pp": 2}, "rollout": {"tensor_parallel": 3}},
        {"rollout": {"tensor_parallel": 9}},  # vLLM copies KV heads; the learner does not
        {"rollout": {"tensor_parallel": 2, "urls": ["http://a"]}},  # of servers that are started here
    ],
)
def test_layouts_that_fit(settings: dict[str, dict[str, int]]) -> None:
    Recipe.model_validate(settings).check_model(heads=9, kv_heads=3, layers=30, max_positions=8192)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algo": {"length_bonus": True, "max_new_tokens": 256}}, "algo.length_cap = 0.1"),
        ({"rollout": {"urls": ["http://node1:80a0"]}}, "rollout.urls"),
        ({"rollout": {"urls": ["node1:8000"]}}, "rollout.urls"),
        ({"rollout": {"urls": ["http://node1:8000", "http://node1:8000/"]}}, "named twice"),
    ],
)
def test_settings_that_would_do_nothing_or_harm(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(settings)
    parse({"algo": {"length_bonus": True, "max_new_tokens": 256, "length_cap": 0.5}})
