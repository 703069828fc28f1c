"""The report's dialogues: what is sampled, stored and said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import make_run, read

from m2train.report.dialogues import spread


def test_a_large_run_is_sampled_and_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=8, every=4, groups=4)
    page = read(run, max_rollout_bytes=60_000)
    shown = sum(len(step["groups"]) for step in page.data["steps"])
    assert 0 < shown < 41
    assert f"A sample: {shown} of the 41 groups in 11 of 11 step files" in page.text
    assert len(json.dumps(page.data["steps"])) < 75_000
    by_kind = {(s["kind"], s["step"]) for s in page.data["steps"] if s["groups"]}
    assert {("eval", 0), ("eval", 8), ("train", 0), ("train", 7)} <= by_kind
    assert "All 41 groups" in read(run).text


def test_dialogue_is_stored_once_and_its_slice_is_the_context(tmp_path: Path) -> None:
    step = read(make_run(tmp_path / "run", num_steps=2, every=1)).data["steps"][-1]
    for group in step["groups"]:
        assert "context" not in group
        assert step["dialogues"][group["dialogue"]]["turns"][group["turns"] - 1]["role"] == "patient"
        assert len(group["replies"][0]["marks"]) == len(group["rubrics"])


def test_each_reply_comes_with_the_rule_that_scored_it(tmp_path: Path) -> None:
    """Evaluations have a scoring of their own; the browser prints the rule beside the reward."""
    seen = set()
    for step in read(make_run(tmp_path / "run", num_steps=3, every=1)).data["steps"]:
        seen.add((step["kind"], step["scoring"]))
        for group in step["groups"]:
            weights = [weight for _, _, weight, _ in group["rubrics"]]
            for reply in group["replies"]:
                known = [(w, mark) for w, (mark, _) in zip(weights, reply["marks"], strict=True) if mark != "unknown"]
                points = sum(w for w, mark in known if mark == "met")
                top, bottom = sum(w for w, _ in known if w > 0), sum(w for w, _ in known if w < 0)
                minmax, health = (points - bottom) / (top - bottom), min(1.0, max(0.0, points / top))
                assert reply["rubric"] == pytest.approx(health if step["kind"] == "eval" else minmax, abs=1e-4)
    assert seen == {("eval", "healthbench"), ("train", "minmax")}


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 61])
def test_spread_is_a_permutation_with_both_ends_first(count: int) -> None:
    order = spread(count)
    assert sorted(order) == list(range(count))
    assert order[:2] == ([0, count - 1] if count > 1 else list(range(count)))
