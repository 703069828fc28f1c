"""The report: self-contained, inert whatever the text, true to the metrics."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from m2train.config import ConfigError, Recipe
from m2train.records import (
    Dialogue,
    Generation,
    Group,
    Reply,
    Rubric,
    StepRollouts,
    Turn,
    Verdict,
    VersionSpan,
)
from m2train.report import write_report
from m2train.report.compare import write_comparison
from m2train.report.dialogues import spread
from m2train.report.svg import fmt, ticks

HOSTILE = (
    "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
    "</script x><!-- <script> ]]> &amp; \u2028 {{ 7*7 }} http://evil.example/x.js"
    "\" onfocus=alert(3) ' onload=alert(4) x="
)
RUBRICS = [
    Rubric(
        dimension="consultation_logic",
        text="Asks whether the chest tightness spreads to arm or jaw",
        weight=8,
        check="asks",
    ),
    Rubric(
        dimension="diagnostic_accuracy",
        text="Names stable angina as a likely cause",
        weight=7,
        check="names",
    ),
    Rubric(
        dimension="communication_and_empathy",
        text="Acknowledges the patient's worry before the questions",
        weight=4,
        check="empathy",
    ),
    Rubric(
        dimension="clarity_and_structure",
        text="At most two questions in one turn",
        weight=3,
        check="count",
    ),
    Rubric(
        dimension="ethics_and_safety",
        text="Tells the patient to stop a prescribed drug without review",
        weight=-9,
        check="harm",
    ),
]
REPLIES = [
    "I can hear that this worries you, and it is good that you came. Does the tightness spread"
    " to your arm, neck or jaw? And does it ease when you stand still?",
    "This could be stable angina. How long does each spell last, and have you had it at rest?",
    "Please stop the amlodipine today and come back next week.",
    "What brings you here? What brings you here? What brings you here?",
]


def make_generation(rng: random.Random, text: str, version: str, limit: int = 64) -> Generation:
    count = min(limit, max(4, len(text) // 4))
    return Generation(
        token_ids=[rng.randrange(49152) for _ in range(count)],
        logprobs=[-rng.expovariate(1.2) for _ in range(count)],
        finish_reason="length" if count == limit else "stop",
        weight_versions=[VersionSpan(version=version, start=0, end=count)],
        seed=rng.randrange(2**31),
    )


def make_group(
    rng: random.Random, uid: str, version: str, num_replies: int, skill: float, text: str | None
) -> tuple[Dialogue, Group]:
    told = ["trigger", "onset", "duration"]
    turns = [
        Turn(
            role="system",
            text="You are a careful doctor. Ask what you need to know, then advise.",
            token_ids=[1, 2, 3],
        ),
        Turn(
            role="patient",
            text="I keep getting a tight feeling in my chest when I walk up the hill to my house.",
            token_ids=[4, 5],
            state={
                "facts_told": told[:1],
                "gate": {"end": False, "why": "no diagnosis yet"},
                "affective": "anxious, short answers",
                "factual": {"consistent": True, "corrected": []},
            },
        ),
        Turn(
            role="doctor",
            text="How long has this been going on?",
            token_ids=[6, 7],
            generation=make_generation(rng, "How long has this been going on?", version),
        ),
        Turn(
            role="patient",
            text="About three weeks. It first happened on the way back from the shops." if text is None else text,
            token_ids=[8, 9],
            state={
                "facts_told": told[:2],
                "gate": {"end": False, "why": "no diagnosis yet"},
                "affective": "anxious, a little relieved",
                "factual": {"consistent": True, "corrected": ["onset"]},
            },
        ),
        Turn(
            role="doctor",
            text="Thank you. Does it happen at rest?",
            token_ids=[10],
            generation=make_generation(rng, "x" * 60, version),
        ),
        Turn(role="patient", text="No, never at rest.", token_ids=[11], state={"facts_told": told}),
    ]
    dialogue = Dialogue(uid=uid, case_id="cardiology_01", seed=3, turns=turns, end_reason="max_turns")
    replies = []
    for i in range(num_replies):
        body = text if text is not None else REPLIES[rng.randrange(len(REPLIES))]
        met = [rng.random() < (skill if r.weight > 0 else 0.15) for r in RUBRICS]
        verdicts = [
            Verdict(
                met=None if rng.random() < 0.03 else m,
                explanation=text or ("found: 'arm, neck or jaw'" if m else "no such sentence"),
            )
            for m in met
        ]
        points = sum(r.weight for r, v in zip(RUBRICS, verdicts, strict=True) if v.met)
        replies.append(
            Reply(
                generation=make_generation(rng, body, version, 256 if i else 16),
                text=body,
                verdicts=verdicts,
                rubric_reward=(points + 9) / 31,
                length_reward=0.05 if i == 0 else 0.0,
            )
        )
    mean = sum(r.reward for r in replies) / max(1, len(replies))
    for reply in replies:
        reply.advantage = reply.reward - mean
    group = Group(
        uid=uid + "/slice4",
        case_id="cardiology_01",
        dialogue_uid=uid,
        num_turns=4,
        context_ids=list(range(90)),
        context=turns[:4],
        rubrics=RUBRICS,
        replies=replies,
    )
    return dialogue, group


def make_rollouts(
    step: int, num_groups: int, num_replies: int, skill: float, text: str | None = None
) -> StepRollouts:
    rng = random.Random(step * 7 + num_replies)
    pairs = [make_group(rng, f"step{step}/{i}", f"step-{step}", num_replies, skill, text) for i in range(num_groups)]
    return StepRollouts(
        step=step,
        weight_version=f"step-{step}",
        dialogues=[d for d, _ in pairs],
        groups=[g for _, g in pairs],
        drops={"repeated": step % 3},
    )


def make_row(step: int, num_steps: int, rng: random.Random) -> dict[str, Any]:
    part = step / max(1, num_steps)
    mean = 0.34 + 0.3 * part + rng.gauss(0, 0.03)
    row: dict[str, Any] = {
        "step": step,
        "reward/mean": mean,
        "reward/std": 0.14 - 0.05 * part,
        "reward/group_std": 0.1,
        "reward/min": max(0.0, mean - 0.3),
        "reward/max": min(1.0, mean + 0.31),
        "reward/length_bonus": 0.01 * part,
        "reply/length_mean": 62 - 20 * part + rng.gauss(0, 3),
        "reply/truncated_frac": max(0.0, 0.2 - 0.3 * part + rng.gauss(0, 0.02)),
        "policy/entropy": 2.1 - 0.9 * part + rng.gauss(0, 0.04),
        "policy/clip_frac_low": abs(rng.gauss(0, 0.002)),
        "policy/clip_frac_high": abs(rng.gauss(0, 0.004)),
        "mismatch/max_abs": 10 ** rng.gauss(-5, 0.2),
        "mismatch/mean_abs": 10 ** rng.gauss(-6.3, 0.1),
        "mismatch/k3": 10 ** rng.gauss(-11, 0.2),
        "tis/mean": 1 + rng.gauss(0, 1e-5),
        "tis/max": 1 + abs(rng.gauss(0, 3e-5)),
        "tis/capped_frac": 0.0,
        "learner/grad_norm": 1.4 - 0.4 * part + rng.gauss(0, 0.15),
        "learner/lr": 2e-5 * min(1.0, (step + 1) / 5),
        "learner/loss": rng.gauss(0, 0.01),
        "policy/loss": rng.gauss(0, 0.01),
        "learner/forward_backward_s": 8.5,
        "learner/optimizer_s": 0.25,
        "learner/tokens": 4000.0,
        "learner/unique_tokens": 1600.0,
        "learner/duplicate_tokens": 2400.0,
        "learner/tile_inflation": 1.125,
        "learner/plan_s": 4e-3,
        "learner/plan_wait_s": 2e-5,
        "time/dialogues": 11 + rng.gauss(0, 1),
        "time/replies": 8 + rng.gauss(0, 1),
        "time/train": 9 + rng.gauss(0, 0.4),
        "time/sync": 0.8,
        "drops/repeated": step % 3,
        "tokens/trained": 4000 + rng.randrange(400),
        "tokens/generated": 5200 + rng.randrange(400),
        "groups/zero_advantage": rng.randrange(2),
        "groups/count": 8,
        "sync/bytes": 5.4e8,
    }
    dims = ("diagnostic_accuracy", "consultation_logic", "communication_and_empathy", "safety")
    row |= {f"dim/{name}": 0.3 + 0.1 * i + 0.2 * part + rng.gauss(0, 0.03) for i, name in enumerate(dims)}
    return row


def make_run(
    folder: Path,
    *,
    num_steps: int = 12,
    groups: int = 2,
    replies: int = 4,
    every: int = 6,
    state: str = "finished",
    text: str | None = None,
) -> Path:
    """A run directory as `m2train train` leaves it."""
    rng = random.Random(5)
    for name in ("rollouts", "eval"):
        (folder / name).mkdir(parents=True)
    recipe = Recipe(name="demo-cpu", seed=7, steps=max(1, num_steps), mismatch_limit=1e-4)
    config = recipe.model_dump(exclude_none=True) | {"name": text or "demo-cpu"}
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    status = {
        "state": state,
        "cause": text or "",
        "started": "2026-03-01T10:00:00+00:00",
        "ended": "" if state == "running" else "2026-03-01T10:21:30+00:00",
        "machine": {"host": "node-1", "cpu": text or "EPYC 9654", "cores": 16},
    }
    (folder / "status.json").write_text(json.dumps(status))
    rows = [make_row(step, num_steps, rng) for step in range(num_steps)]
    for step in range(0, num_steps + 1, every):
        if step == num_steps:
            rows.append({"step": step})
        rows[step]["heldout/reward"] = 0.31 + 0.25 * step / max(1, num_steps)
        rows[step]["heldout/stderr"] = 0.03
        rollouts = make_rollouts(step, 3, 1, 0.3 + 0.4 * step / max(1, num_steps), text)
        (folder / "eval" / f"step_{step:06d}.json").write_text(rollouts.model_dump_json())
    for step in range(num_steps):
        rollouts = make_rollouts(step, groups, replies, 0.3 + 0.4 * step / max(1, num_steps), text)
        (folder / "rollouts" / f"step_{step:06d}.json").write_text(rollouts.model_dump_json())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(HTMLParser):
    """Collects what a browser would make of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            if tag == "script":
                self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
        elif self._inside is None:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "data"))


def read(folder: Path, **options: Any) -> Page:
    return Page(write_report(folder, **options).read_text(encoding="ascii"))


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


def change_run(run: Path, settings: dict[str, str], changes: dict[str, Any]) -> Path:
    """Edit a run's recipe and its rows of metrics; a callable maps the old value."""
    config = (run / "config.toml").read_text()
    for old, new in settings.items():
        assert old in config
        config = config.replace(old, new)
    (run / "config.toml").write_text(config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.update({k: v(row[k]) if callable(v) else v for k, v in changes.items() if k in row})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


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


def test_many_steps_are_binned_and_the_peak_survives(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=2, every=2)
    rows = [{"step": i, "mismatch/max_abs": 1e-5, "reward/mean": 0.5} for i in range(2000)]
    rows[1234]["mismatch/max_abs"] = 0.5
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = read(run)
    assert "Each point stands for 7 steps" in page.text
    assert any(0.5 in chart["values"][0] and 1e-5 in chart["values"][0] for chart in page.data["charts"])
    assert (run / "report.html").stat().st_size < 600_000


def test_dialogue_is_stored_once_and_its_slice_is_the_context(finished: Path) -> None:
    step = read(finished).data["steps"][-1]
    for group in step["groups"]:
        assert "context" not in group
        assert step["dialogues"][group["dialogue"]]["turns"][group["turns"] - 1]["role"] == "patient"
        assert len(group["replies"][0]["marks"]) == len(group["rubrics"])


def test_running_status_and_half_written_temp(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=3, every=3, state="failed")
    (run / "rollouts" / "step_000003.journal.jsonl").write_text("x")
    (run / "rollouts" / ".step_000003.json.12.tmp").write_text("x")
    page = read(run)
    assert "failed" in page.text and "step_000003" not in page.text


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 61])
def test_spread_is_a_permutation_with_both_ends_first(count: int) -> None:
    order = spread(count)
    assert sorted(order) == list(range(count))
    assert order[:2] == ([0, count - 1] if count > 1 else list(range(count)))


def test_ticks_and_numbers() -> None:
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(-0.013, 0.021)[0] >= -0.013
    assert [fmt(v) for v in (0, 1234.5, 0.51239, 12.345, 3.2e-5, None, 0.5, 100.0)] == [
        "0", "1,234", "0.512", "12.35", "3.2e-5", "-", "0.5", "100",
    ]  # fmt: skip
