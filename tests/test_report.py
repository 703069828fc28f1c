"""The report: self-contained, inert whatever the text, true to the metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_runs import HOSTILE, Page, make_run, read

from m2train.report import write_report
from m2train.report.svg import fmt, ticks


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("finished") / "run")


def test_one_file_without_network(finished: Path) -> None:
    page = read(finished)
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form"), tag
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "action", "srcset", "data"):
                assert value is not None and value.startswith("#"), (tag, value)
    style_and_script = "".join(
        (Path(__file__).parent.parent / "m2train" / "report" / name).read_text(encoding="ascii")
        for name in ("style.css", "app.js", "base.html", "report.html", "charts.html", "compare.html")
    )
    for word in (
        "http://",
        "https://",
        "url(",
        "@import",
        "fetch(",
        "innerHTML",
        "eval(",
        "import(",
    ):
        assert word not in style_and_script, word
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "sha256-" in policy


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=2, every=1, text=HOSTILE)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, f"dim/{HOSTILE}": 0.5, f"drops/{HOSTILE}": 2}) + "\n")
    (run / "rollouts" / "step_000001.json").write_text('{"step": "' + HOSTILE.replace('"', "") + '"}')
    page = read(run)
    assert len(page.scripts) == 2  # the data and app.js, as without the text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    # html.parser is kinder than browsers about where a script ends, so look at the bytes too
    assert not set("<>&") & set(next(text for a, text in page.scripts if a.get("id") == "data"))
    assert page.data["steps"][0]["groups"][0]["replies"][0]["text"] == HOSTILE
    assert HOSTILE in page.text  # name, cause: shown as it is, not run through jinja2


def test_numbers_are_those_of_the_metrics(finished: Path) -> None:
    page = read(finished)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    held = [row["heldout/reward"] for row in rows if "heldout/reward" in row]
    assert f"{held[0]:.3f} \u2192 {held[-1]:.3f}" in page.text
    assert fmt(max(row.get("mismatch/max_abs", 0) for row in rows)) in page.text
    assert "21 min 30 s" in page.text and "12 / 12" in page.text
    curves = {tuple(c["values"][0]): c["steps"] for c in page.data["charts"]}
    rewards = tuple(float(f"{row['reward/mean']:.6g}") for row in rows if "reward/mean" in row)
    assert curves[rewards] == list(range(12))
    assert re.search(r"repeated\s*12\s*8\s*11", page.text)  # reason, count, steps, last step


def test_each_curve_has_a_title_a_summary_and_only_known_keys(finished: Path) -> None:
    html = write_report(finished).read_text()
    for title in (
        "Held-out reward",
        "Training reward",
        "Rubric dimensions, training",
        "Entropy",
        "Time per step",
    ):
        assert f"<h3>{title}</h3>" in html
    assert "sync/bytes" in html  # a metric that no chart was made for still shows
    page = Page(html)
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert len(labels) == len(page.data["charts"]) and all("first" in str(label) for label in labels)
    bare = finished.parent / "bare"
    make_run(bare, num_steps=2, every=1)
    (bare / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n')
    assert "<h3>Entropy</h3>" not in write_report(bare).read_text()


def test_what_packing_did_is_shown(finished: Path) -> None:
    html = write_report(finished).read_text()
    for title in ("Time of the learner", "Tokens of the learner", "Tile inflation", "Planning"):
        assert f"<h3>{title}</h3>" in html
    page = Page(html)
    assert "19,200 of 48,000 tokens computed (2.50x fewer)" in page.text
    curves = [values for chart in page.data["charts"] for values in chart["values"]]
    assert all([value] * 12 in curves for value in (8.5, 1600.0, 2400.0, 1.125, 4e-3, 2e-5))


def test_empty_run_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=0, every=1, state="running")
    for path in (*run.glob("eval/*"), run / "metrics.jsonl"):
        path.unlink()
    page = read(run)
    assert "No step has finished" in page.text and "no rollout files" in page.text
    assert "running" in page.text


def test_empty_folder_and_missing_folder(tmp_path: Path) -> None:
    page = read(tmp_path)
    assert "config.toml: missing" in page.text and "status.json: missing" in page.text
    with pytest.raises(ValueError, match="no run directory"):
        write_report(tmp_path / "none")


def test_torn_files_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=4, every=2, state="running")
    path = run / "rollouts" / "step_000003.json"
    path.write_bytes(path.read_bytes()[:900])
    metrics = run / "metrics.jsonl"
    good = metrics.read_text().splitlines()
    metrics.write_text("\n".join([good[0], "garbage", good[1], good[1], good[2][:50]]))
    (run / "status.json").write_text('{"state": "run')
    (run / "config.toml").write_text("name = ")
    page = read(run)
    for part in (
        "rollouts/step_000003.json: not readable",
        "1 unreadable line",
        "1 row(s) of a repeated step",
        "status.json: not readable",
        "config.toml: not readable",
    ):
        assert part in page.text, part
    assert len(page.data["steps"]) == 6  # three readable rollouts, three evaluations


def test_nan_and_infinity_are_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=3, every=3)
    row = '{"step": 1, "reward/mean": NaN, "policy/entropy": Infinity, "warnings/nonfinite": 2}'
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[1] = row
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = read(run)
    assert "2 metric value(s) were NaN" in page.text
    assert "NaN" not in next(text for attrs, text in page.scripts if attrs.get("id") == "data")


def test_many_steps_are_binned_and_the_peak_survives(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=2, every=2)
    rows = [{"step": i, "mismatch/max_abs": 1e-5, "reward/mean": 0.5} for i in range(2000)]
    rows[1234]["mismatch/max_abs"] = 0.5
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = read(run)
    assert "Each point stands for 7 steps" in page.text
    assert any(0.5 in chart["values"][0] and 1e-5 in chart["values"][0] for chart in page.data["charts"])
    assert (run / "report.html").stat().st_size < 600_000


def test_running_status_and_half_written_temp(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=3, every=3, state="failed")
    (run / "rollouts" / "step_000003.journal.jsonl").write_text("x")
    (run / "rollouts" / ".step_000003.json.12.tmp").write_text("x")
    page = read(run)
    assert "failed" in page.text and "step_000003" not in page.text


def test_ticks_and_numbers() -> None:
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(-0.013, 0.021)[0] >= -0.013
    assert [fmt(v) for v in (0, 1234.5, 0.51239, 12.345, 3.2e-5, None, 0.5, 100.0)] == [
        "0", "1,234", "0.512", "12.35", "3.2e-5", "-", "0.5", "100",
    ]  # fmt: skip
