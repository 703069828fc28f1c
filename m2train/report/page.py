"""Puts the page together: text goes through jinja2's escaping, data through `script_json`."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from m2train.metrics import METRICS_FILE
from m2train.report.curves import make_charts
from m2train.report.dialogues import Sample, pack_rollouts
from m2train.report.read import Run, setting
from m2train.report.svg import fmt

_HERE = Path(__file__).parent


def render(run: Run, max_rollout_bytes: int) -> str:
    """The whole report as HTML."""
    sample = pack_rollouts(run, max_rollout_bytes)
    rows = _with_evaluations(run.rows, sample.eval_rewards)
    sections = make_charts(rows, limit=number(run.config.get("mismatch_limit")))
    data = {
        "charts": [chart.data for _, charts in sections for chart in charts],
        "steps": sample.steps,
    }
    return fill(
        "report.html",
        data,
        title=str(run.config.get("name") or run.folder.name),
        head=_header(run, rows),
        tiles=_tiles(run, rows),
        sections=sections,
        num_rows=len(run.rows),
        drops=_drops(run, sample),
        num_nonfinite=sum(number(row.get("warnings/nonfinite")) or 0 for row in run.rows),
        recipe=_recipe(run.config),
        sample=sample.sentence(),
        has_groups=sample.groups_shown > 0,
        problems=run.problems,
    )


def fill(template: str, data: object, **values: Any) -> str:
    """A template of this folder with style, script and `data` inside; all text is escaped."""
    import jinja2

    script = (_HERE / "app.js").read_text(encoding="ascii")
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template(template).render(
        written=_date(datetime.now(UTC).isoformat()),
        style=(_HERE / "style.css").read_text(encoding="ascii"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=script_json(data),
        **values,
    )


def script_json(data: object) -> str:
    """JSON for inside a `<script>`: ASCII, no NaN, no character that HTML could act on."""
    text = json.dumps(_finite(data), allow_nan=False, default=str, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _with_evaluations(rows: list[dict[str, Any]], rewards: dict[int, float]) -> list[dict[str, Any]]:
    """Rows, with the evaluations that have a file but no number in the metrics."""
    by_step = {row["step"]: row for row in rows}
    for step, reward in rewards.items():
        row = by_step.get(step, {"step": step})
        if row.get("heldout/reward") is None:
            by_step[step] = row | {"heldout/reward": reward}
    return [by_step[step] for step in sorted(by_step)]


def _header(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    status, config = run.status, run.config
    state = str(status.get("state") or "unknown")
    learner, rollout = config.get("learner", {}), config.get("rollout", {})
    engines = f"{len(rollout['urls'])} given" if rollout.get("urls") else f"{rollout.get('servers', 1)} started here"
    machine = status.get("machine")
    facts = {
        "Model": setting(config, "model", "path"),
        "Layout": f"learner TP {learner.get('tp', 1)}, PP {learner.get('pp', 1)}, "
        f"DP {learner.get('dp', 1)}, "
        f"{learner.get('dtype', '?')}; rollout engines: {engines}, {rollout.get('dtype', '?')}"
        if config
        else None,
        "Seed": config.get("seed"),
        "Started": _date(status.get("started")),
        "Ended": _date(status.get("ended")),
        "Machine": ", ".join(f"{k}: {plain(v)}" for k, v in machine.items())
        if isinstance(machine, dict)
        else machine,
        "Run directory": run.folder.name,
    }
    known = {"finished", "running", "failed", "stopped"}
    return {
        "state": state,
        "kind": state if state in known else "unknown",
        "cause": str(status.get("cause") or ""),
        "facts": {name: str(value) for name, value in facts.items() if value not in (None, "")},
    }


def _tiles(run: Run, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    tiles = []
    held = series(rows, "heldout/reward")
    if len(held) > 1:
        (first, before), (last, after) = held[0], held[-1]
        change = f"{after - before:+.3f} from step {first} to {last}"
        tiles.append({"name": "Held-out reward", "value": f"{before:.3f} \u2192 {after:.3f}", "sub": change})
    elif held:
        tiles.append(
            {
                "name": "Held-out reward",
                "value": f"{held[0][1]:.3f}",
                "sub": f"at step {held[0][0]}",
            }
        )
    train = series(rows, "reward/mean")
    if train:
        part = max(1, len(train) // 5)
        ends = [math.fsum(v for _, v in some) / part for some in (train[:part], train[-part:])]
        sub = "first and last step" if part == 1 else f"means of the first and last {part} steps"
        tiles.append({"name": "Training reward", "value": f"{ends[0]:.3f} \u2192 {ends[1]:.3f}", "sub": sub})
    worst = max(series(rows, "mismatch/max_abs"), key=lambda item: item[1], default=None)
    if worst is not None:
        limit = number(run.config.get("mismatch_limit"))
        sub = f"max |log-prob difference|, step {worst[0]}" + (f"; limit {fmt(limit)}" if limit else "")
        tiles.append({"name": "Rollout/learner mismatch", "value": fmt(worst[1]), "sub": sub})
    planned = run.config.get("steps")
    done = str(len(series(rows, "groups/count"))) + (f" / {planned}" if planned else "")
    tokens = sum(value for _, value in series(rows, "tokens/trained"))
    tiles.append({"name": "Steps", "value": done, "sub": f"{fmt(tokens)} tokens trained" if tokens else ""})
    learner = _learner_tile(rows)
    if learner is not None:
        tiles.append(learner)
    seconds = _elapsed(run)
    if seconds is not None:
        name = "From start to end" if run.status.get("ended") else "From start to the last step"
        tiles.append({"name": name, "value": _duration(seconds), "sub": _step_time(rows)})
    return tiles


def _learner_tile(rows: list[dict[str, Any]]) -> dict[str, str] | None:
    times = [value for _, value in series(rows, "time/train")]
    tokens, unique = (math.fsum(v for _, v in series(rows, f"learner/{key}")) for key in ("tokens", "unique_tokens"))
    if not times or not unique:
        return None
    sub = f"median step; {fmt(unique)} of {fmt(tokens)} tokens computed ({tokens / unique:.2f}x fewer)"
    return {"name": "Learner", "value": _duration(statistics.median(times)), "sub": sub}


def _step_time(rows: list[dict[str, Any]]) -> str:
    sums = []
    for row in rows:
        times = [v for k, v in row.items() if k.startswith("time/") and k not in ("time/step", "time/total")]
        total = number(row.get("time/step")) or math.fsum(v for v in times if isinstance(v, int | float))
        if total and row.get("reward/mean") is not None:
            sums.append(total)
    return f"median step {_duration(sorted(sums)[len(sums) // 2])}" if sums else ""


def _drops(run: Run, sample: Sample) -> list[dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    found = [
        (row["step"], key.removeprefix("drops/"), value)
        for row in run.rows
        for key, value in row.items()
        if key.startswith("drops/")
    ]
    if not found:  # an older or cut run: what its rollout files say
        found = [
            (s["step"], reason, n) for s in sample.steps if s["kind"] == "train" for reason, n in s["drops"].items()
        ]
    for step, reason, value in found:
        count = number(value)
        if count:
            entry = table.setdefault(
                reason, {"reason": reason.replace("_", " "), "count": 0, "steps": 0, "last": step}
            )
            entry.update(count=entry["count"] + count, steps=entry["steps"] + 1, last=step)
    for entry in table.values():
        entry["count"] = fmt(entry["count"])
    return sorted(table.values(), key=lambda entry: entry["reason"])


def _recipe(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Sections of the recipe; values that differ from the default are marked."""
    from m2train.config import Recipe

    defaults = Recipe.model_validate({}).model_dump()
    top = {key: value for key, value in config.items() if not isinstance(value, dict)}
    groups = [("run", top, defaults)]
    groups += [(key, value, defaults.get(key) or {}) for key, value in config.items() if isinstance(value, dict)]
    return [
        {
            "name": name,
            "items": [
                {
                    "key": key,
                    "value": plain(value),
                    "kind": ("changed " if key not in known or known[key] != value else "")
                    + ("long" if len(plain(value)) > 36 else ""),
                }
                for key, value in values.items()
            ],
        }
        for name, values, known in groups
        if values
    ]


def plain(value: object) -> str:
    """A setting as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def series(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have a number there."""
    pairs = [(row["step"], number(row.get(key))) for row in rows]
    return [(step, value) for step, value in pairs if value is not None]


def number(value: object) -> float | None:
    """The value if it is a finite number."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None  # type: ignore[return-value]


def _time(text: object) -> datetime | None:
    if not isinstance(text, str):
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _date(text: object) -> str | None:
    when = _time(text)
    if when is None:
        return str(text) if text else None
    return when.strftime("%Y-%m-%d %H:%M:%S ") + (when.tzname() or "")


def _elapsed(run: Run) -> float | None:
    started, ended = _time(run.status.get("started")), _time(run.status.get("ended"))
    if started is None:
        return None
    if ended is None:  # still running, or killed: up to the last row
        path = run.folder / METRICS_FILE
        return max(0.0, path.stat().st_mtime - started.timestamp()) if run.rows else None
    return (ended - started).total_seconds()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
