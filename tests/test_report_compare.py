"""The comparison of runs: settings, outcome, cost, agreement."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import HOSTILE, Page, change_run, make_run

from m2train.config import ConfigError
from m2train.report.compare import write_comparison


def test_comparison_of_runs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "tree", num_steps=4)
    changes = {
        "learner/forward_backward_s": 21.25,
        "learner/unique_tokens": 4000.0,
        "policy/loss": lambda x: x + 3e-6,
        "learner/grad_norm": lambda x: x * (1 + 2e-5),
    }
    other = change_run(make_run(tmp_path / "apart", num_steps=4), {'packing = "auto"': 'packing = "none"'}, changes)
    shorter = (other / "metrics.jsonl").read_text().splitlines()[:3]
    (other / "metrics.jsonl").write_text("\n".join(shorter))
    page = Page(write_comparison([one, other], tmp_path / "c.html").read_text(encoding="ascii"))
    text = " ".join(page.text.split())
    assert "learner.packing auto none" in text and "learner.lr" not in text
    assert "Time of the learner, median s per step 8.75 21.5 (\u00d72.46)" in text
    assert "of them computed 1,600 4,000 (\u00d72.5)" in text
    assert "Over the 3 steps that all runs have." in text
    assert "Loss, largest difference - 3.00e-06 (first step 3.00e-06)" in text
    assert "Gradient norm, largest relative difference - 2.00e-05" in text
    (times,) = (c for c in page.data["charts"] if c["values"][0] == [8.75] * 4)
    assert times["steps"] == [0, 1, 2, 3] and times["values"][1] == [21.5] * 3 + [None]


def test_outcome_and_whose_rollouts(tmp_path: Path) -> None:
    """What each run came to; of runs that sampled for themselves, that the agreement is not the learner's."""
    one, other = make_run(tmp_path / "one", num_steps=4, every=4), make_run(tmp_path / "other", num_steps=2)
    own = "These runs sampled rollouts of their own"
    text = " ".join(Page(write_comparison([one, other], tmp_path / "c.html").read_text()).text.split())
    assert "0.310 \u2192 0.560 (+0.250)" in text and "Steps 4 2" in text and own in text
    for path in (other / "rollouts").iterdir():  # as after --train-from
        path.unlink()
    assert own not in " ".join(Page(write_comparison([one, other], tmp_path / "c.html").read_text()).text.split())


def test_comparison_is_inert_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a" / "run", num_steps=2, text=HOSTILE)
    empty = tmp_path / "b" / "run"
    empty.mkdir(parents=True)
    page = Page(write_comparison([one, empty], tmp_path / "c.html").read_text())
    assert len(page.scripts) == 2 and not [tag for tag, _ in page.tags if tag == "img"]
    assert "No step was trained in all of these runs." in page.text and "b/run: config.toml: missing" in page.text
    for folders, message in (
        ([one], "expected 2 to 10"),
        ([one, one], "named twice"),
        ([one, tmp_path / "none"], "no run directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_comparison(folders, tmp_path / "c.html")
