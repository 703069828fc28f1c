"""Runs side by side: where their recipes differ, whether they learned the same, what their learners cost.

Made for runs on the same rollouts (`m2train train --train-from`) under another packing, layout or dtype; of runs that
sampled for themselves it shows what each came to, and says that their differences are those of the rollouts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2train.config import ConfigError
from m2train.files import write_atomic
from m2train.report import svg
from m2train.report.curves import Chart, make_chart
from m2train.report.page import fill, number, plain, series
from m2train.report.read import Run, load_run
from m2train.report.specs import Spec

COMPARISON_FILE = "compare.html"

CURVES = (
    ("Loss", "per step", "policy/loss"),
    ("Gradient norm", "before clipping", "learner/grad_norm"),
    ("Entropy", "nats per token", "policy/entropy"),
    ("Time of the learner", "seconds per step", "learner_s"),
    ("Tokens of the learner", "computed per step", "learner/unique_tokens"),
    ("Tile inflation", "pairs in the tiles of attention / visible pairs", "learner/tile_inflation"),
    ("Training reward", "mean over the step's replies", "reward/mean"),
    ("Held-out reward", "mean over unseen cases, greedy replies", "heldout/reward"),
)
OUTCOMES = (
    ("Held-out reward, first to last evaluation", "heldout/reward"),
    ("Training reward, first to last step", "reward/mean"),
)
COSTS = (
    ("Time of the learner, median s per step", "learner_s"),
    ("of it forward and backward", "learner/forward_backward_s"),
    ("of it optimizer", "learner/optimizer_s"),
    ("Tokens per step, median", "learner/tokens"),
    ("of them computed", "learner/unique_tokens"),
    ("of them duplicates, not computed", "learner/duplicate_tokens"),
    ("Tile inflation, median", "learner/tile_inflation"),
    ("Micro-batches per rank and step, median", "learner/micro_batches"),
    ("Planning on its thread, median s per step", "learner/plan_s"),
    ("Waiting for the plan, median s per step", "learner/plan_wait_s"),
)
AGREEMENT = (
    ("Loss, largest difference", "policy/loss", False),
    ("Gradient norm, largest relative difference", "learner/grad_norm", True),
    ("Entropy, largest difference", "policy/entropy", False),
    ("Mean log-prob, largest difference", "policy/logp_mean", False),
)


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page that compares runs with the first of them.

    Args:
        run_dirs: at least two, at most ten.
        path: of the page, replaced in one rename.

    Raises:
        ConfigError: a folder that is not there or named twice, or too many of them.
    """
    if not 2 <= len(run_dirs) <= svg.NUM_COLORS:
        raise ConfigError(f"{len(run_dirs)} run directories to compare; expected 2 to {svg.NUM_COLORS}")
    if len({folder.resolve() for folder in run_dirs}) < len(run_dirs):
        raise ConfigError("a run directory is named twice; expected different ones")
    for folder in run_dirs:
        if not folder.is_dir():
            raise ConfigError(f"no run directory {folder}")
    runs = [load_run(folder) for folder in run_dirs]
    write_atomic(path, render(runs).encode("ascii", errors="xmlcharrefreplace"))
    return path


def render(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    names = _names(runs)
    rows = [[_with_sum(row) for row in run.rows] for run in runs]
    charts = [chart for curve in CURVES if (chart := _overlay(names, rows, *curve)) is not None]
    return fill(
        "compare.html",
        {"charts": [chart.data for chart in charts], "steps": []},
        title=", ".join(names),
        names=names,
        states=[str(run.status.get("state") or "unknown") for run in runs],
        settings=_settings(runs),
        outcome=_outcome(rows),
        apart=sum(bool(run.rollout_files) for run in runs) > 1,
        costs=_costs(rows),
        agreement=_agreement(rows),
        sections=[("Curves", charts)] if charts else [],
        problems=[f"{name}: {text}" for name, run in zip(names, runs, strict=True) for text in run.problems],
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """As much of each path as tells it from the others."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _with_sum(row: dict[str, Any]) -> dict[str, Any]:
    parts = [number(row.get(f"learner/{part}_s")) for part in ("forward_backward", "optimizer")]
    known = [part for part in parts if part is not None]
    return row | ({"learner_s": math.fsum(known)} if known else {})


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs."""
    flat: list[dict[str, str]] = []
    for run in runs:
        flat.append({})
        for section, value in run.config.items():
            values = value if isinstance(value, dict) else {"": value}
            flat[-1] |= {f"{section}.{key}".rstrip("."): plain(item) for key, item in values.items()}
    keys = dict.fromkeys(key for one in flat for key in one if key != "name")
    table = [{"name": key, "values": [one.get(key, "-") for one in flat]} for key in keys]
    return [line for line in table if len(set(line["values"])) > 1]


def _outcome(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each run learned: where its rewards began and ended."""
    table: list[dict[str, Any]] = []
    for name, key in OUTCOMES:
        ends = [[value for _, value in series(own, key)] for own in rows]
        if any(ends):
            cells = [f"{own[0]:.3f} \u2192 {own[-1]:.3f} ({own[-1] - own[0]:+.3f})" if own else "-" for own in ends]
            table.append({"name": name, "values": cells})
    steps = [svg.fmt(len(series(own, "groups/count"))) for own in rows]
    return [*table, {"name": "Steps", "values": steps}]


def _costs(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    table = []
    for name, key in COSTS:
        medians = []
        for own in rows:
            found = [value for _, value in series(own, key)]
            medians.append(statistics.median(found) if found else None)
        if any(value is not None for value in medians):
            table.append({"name": name, "values": [_against(value, medians[0]) for value in medians]})
    return table


def _against(value: float | None, first: float | None) -> str:
    """A number, and how many times the first run's it is."""
    if value is None or not first or value == first:
        return svg.fmt(value)
    return f"{svg.fmt(value)} (\u00d7{value / first:.3g})"


def _agreement(rows: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Largest differences from the first run over the steps that every run has; the first step's beside them."""
    steps = sorted(set.intersection(*({step for step, _ in series(own, "policy/loss")} for own in rows)))
    table = []
    for name, key, relative in AGREEMENT:
        found = [dict(series(own, key)) for own in rows]
        if not steps or any(step not in own for own in found for step in steps):
            continue
        values = []
        for own in found[1:]:
            gaps = [abs(own[s] - found[0][s]) / (abs(found[0][s]) or 1.0 if relative else 1.0) for s in steps]
            values.append(f"{max(gaps):.2e} (first step {gaps[0]:.2e})")
        table.append({"name": name, "values": ["-", *values]})
    return {"steps": len(steps), "lines": table}


def _overlay(names: list[str], rows: list[list[dict[str, Any]]], title: str, unit: str, key: str) -> Chart | None:
    """One metric of all runs in one chart."""
    merged: dict[int, dict[str, Any]] = {}
    for i, own in enumerate(rows):
        for step, value in series(own, key):
            merged.setdefault(step, {"step": step})[f"run{i}"] = value
    labels = {f"run{i}": name for i, name in enumerate(names)}
    known = {key for row in merged.values() for key in row}
    spec = Spec(title=title, unit=unit, series=labels, wide=True)
    return make_chart(spec, [merged[step] for step in sorted(merged)], known)
