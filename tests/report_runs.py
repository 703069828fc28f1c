"""Run directories as `m2train train` leaves them, with made-up numbers; and what a browser would make of a page."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import tomli_w

from m2train.config import Recipe
from m2train.records import Dialogue, Generation, Group, Reply, Rubric, StepRollouts, Turn, Verdict, VersionSpan
from m2train.report import write_report
from m2train.verifier.grading import score

HOSTILE = (
    "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
    "</script x><!-- <script> ]]> &amp; \u2028 {{ 7*7 }} http://evil.example/x.js"
    "\" onfocus=alert(3) ' onload=alert(4) x="
)
RUBRICS = [
    Rubric(dimension=dimension, text=text, weight=weight, check="asks")
    for dimension, text, weight in (
        ("consultation logic", "Asks whether the chest tightness spreads to arm or jaw", 8),
        ("diagnostic accuracy", "Names stable angina as a likely cause", 7),
        ("communication and empathy", "Acknowledges the patient's worry before the questions", 4),
        ("medical ethics and safety", "Tells the patient to stop a prescribed drug without review", -9),
    )
]
REPLIES = [
    "I can hear that this worries you. Does the tightness spread to your arm, neck or jaw?",
    "This could be stable angina. How long does each spell last, and have you had it at rest?",
    "Please stop the amlodipine today and come back next week.",
    "What brings you here? What brings you here? What brings you here?",
]
TALK = [
    ("system", "You are a careful doctor. Ask what you need to know, then advise."),
    ("patient", "I keep getting a tight feeling in my chest when I walk up the hill to my house."),
    ("doctor", "How long has this been going on?"),
    ("patient", "About three weeks. It first happened on the way back from the shops."),
    ("doctor", "Thank you. Does it happen at rest?"),
    ("patient", "No, never at rest."),
]


def make_generation(rng: random.Random, version: str, count: int, limit: int) -> Generation:
    return Generation(
        token_ids=[rng.randrange(49152) for _ in range(count)],
        logprobs=[-rng.expovariate(1.2) for _ in range(count)],
        finish_reason="length" if count == limit else "stop",
        weight_versions=[VersionSpan(version=version, start=0, end=count)],
        seed=rng.randrange(2**31),
    )


def make_turns(rng: random.Random, version: str, text: str | None) -> list[Turn]:
    """The talk above; `text` in place of the last line of the slice."""
    turns = []
    for i, (role, line) in enumerate(TALK):
        turn = Turn.model_validate({"role": role, "text": text if text and i == 3 else line, "token_ids": [i]})
        if role == "patient":
            turn.state = {"told": ["trigger", "onset"][:i], "gate": {"end": False, "evidence": ""}}
        if role == "doctor":
            turn.generation = make_generation(rng, version, 8, 64)
        turns.append(turn)
    return turns


def make_reply(rng: random.Random, version: str, skill: float, text: str | None, scoring: Any) -> Reply:
    met = [None if rng.random() < 0.03 else rng.random() < (skill if r.weight > 0 else 0.15) for r in RUBRICS]
    met[0] = bool(met[0])  # healthbench needs a positive criterion
    verdicts = [Verdict(met=m, explanation=text or "found: 'arm, neck or jaw'") for m in met]
    return Reply(
        generation=make_generation(rng, version, rng.randrange(10, 20), 16),
        text=text or rng.choice(REPLIES),
        verdicts=verdicts,
        rubric_reward=score(RUBRICS, verdicts, scoring),
        length_reward=0.05 if rng.random() < 0.2 else 0.0,
    )


def make_rollouts(
    step: int, num_groups: int, num_replies: int, skill: float, text: str | None = None, scoring: str = "minmax"
) -> StepRollouts:
    """Groups that all go on from the fourth turn of the same talk."""
    rng = random.Random(step * 7 + num_replies)
    version = f"step-{step}"
    rollouts = StepRollouts(step=step, weight_version=version, dialogues=[], groups=[], drops={"repeated": step % 3})
    for i in range(num_groups):
        turns = make_turns(rng, version, text)
        facts: dict[str, Any] = {"case_id": "cardiology_01"}
        uid = f"step{step}/{i}"
        rollouts.dialogues.append(Dialogue(uid=uid, seed=3, turns=turns, end_reason="max_turns", **facts))
        slice_: dict[str, Any] = {"dialogue_uid": uid, "num_turns": 4, "context": turns[:4]}
        replies = [make_reply(rng, version, skill, text, scoring) for _ in range(num_replies)]
        rollouts.groups.append(
            Group(
                uid=f"{uid}/slice4", context_ids=list(range(90)), rubrics=RUBRICS, replies=replies, **slice_, **facts
            )
        )
    return rollouts


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
        rollouts = make_rollouts(step, 3, 1, 0.3 + 0.4 * step / max(1, num_steps), text, "healthbench")
        (folder / "eval" / f"step_{step:06d}.json").write_text(rollouts.model_dump_json())
    for step in range(num_steps):
        rollouts = make_rollouts(step, groups, replies, 0.3 + 0.4 * step / max(1, num_steps), text)
        (folder / "rollouts" / f"step_{step:06d}.json").write_text(rollouts.model_dump_json())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


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
    """A run's report, as a browser sees it."""
    return Page(write_report(folder, **options).read_text(encoding="ascii"))
