"""The numbers behind each curve: binned if there are many steps, smoothed if enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from m2train.report import svg
from m2train.report.specs import NOT_CURVES, PEAK_KEYS, SECTIONS, TOTAL_TIME_KEYS, Spec

MAX_POINTS = 300
MAX_BARS = 60
MIN_TO_SMOOTH = 10

Row = dict[str, Any]
Values = list[float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A drawn chart and what its read-out needs."""

    title: str
    unit: str
    note: str
    svg: str
    wide: bool
    legend: list[dict[str, Any]]
    data: dict[str, Any]


def make_charts(rows: list[Row], *, limit: float | None = None) -> list[tuple[str, list[Chart]]]:
    """All curves that the rows have numbers for, by section; metrics without a chart come last.

    Args:
        rows: one per step, ascending.
        limit: the recipe's mismatch limit, drawn into the difference curve.
    """
    keys = sorted({key for row in rows for key, value in row.items() if _is_number(value)})
    sections, used = [], set()
    for name, specs in SECTIONS:
        charts = []
        for spec in specs:
            spec = _fill(spec, keys)
            used |= set(spec.series)
            chart = make_chart(spec, rows, keys, limit if "mismatch/max_abs" in spec.series else None)
            if chart is not None:
                charts.append(chart)
        if charts:
            sections.append((name, charts))
    rest = [key for key in keys if key not in used and not key.startswith(NOT_CURVES)]
    others = [make_chart(Spec(title=key, unit="", series={key: "value"}), rows, keys) for key in rest]
    if others:
        charts = sections.pop()[1] if sections and sections[-1][0] == "Time" else []
        name = "Time and other metrics" if charts else "Other metrics"
        sections.append((name, charts + [chart for chart in others if chart is not None]))
    return sections


def _fill(spec: Spec, keys: list[str]) -> Spec:
    """Name the series of a chart whose metrics the run named: rubric dimensions and phases."""
    if not spec.prefix:
        return spec
    found = [key for key in keys if key.startswith(spec.prefix) and key not in TOTAL_TIME_KEYS]
    return replace(spec, series={key: key.removeprefix(spec.prefix).replace("_", " ") for key in found})


def make_chart(spec: Spec, rows: list[Row], keys: Collection[str], limit: float | None = None) -> Chart | None:
    """One chart of the spec's series that are among `keys`; None if no row has a number for it."""
    present = {key: label for key, label in spec.series.items() if key in keys}
    rows = [row for row in rows if any(_is_number(row.get(key)) for key in present)]
    if not present or not rows:
        return None
    per_bin = -(-len(rows) // (MAX_BARS if spec.stacked else MAX_POINTS))
    bins = [rows[i : i + per_bin] for i in range(0, len(rows), per_bin)]
    steps = [float(bin_[-1]["step"]) for bin_ in bins]
    columns = {key: _column(bins, key, max if key in PEAK_KEYS else statistics.fmean) for key in present}
    if spec.stacked:  # the largest phase at the foot
        columns = dict(sorted(columns.items(), key=lambda item: -sum(v or 0 for v in item[1])))
    if all(value == 0 for column in columns.values() for value in column) and spec.title == "Length bonus":
        return None
    window = 0 if spec.exact or spec.stacked else _window(len(steps))
    lines = [
        svg.Line(color=i, values=column, smooth=_smooth(column, window) if window else None)
        for i, column in enumerate(columns.values())
    ]
    positive = any(v is not None and v > 0 for column in columns.values() for v in column)
    plot = svg.Plot(
        steps=steps,
        lines=lines,
        summary=_summary(spec, present, columns, steps),
        stacked=spec.stacked,
        band=_band(bins, spec),
        range=_range(bins, spec, keys),
        log=spec.log and positive,
        limit=limit,
        end_labels=spec.end_labels,
        zero=spec.zero,
        width=svg.WIDE if spec.wide else svg.WIDTH,
    )
    drawing, first_px, last_px = svg.draw(plot)
    return Chart(
        title=spec.title,
        unit=spec.unit,
        note=_note(spec, per_bin, columns, plot.band is not None),
        svg=drawing,
        legend=[
            {"label": present[key], "color": i % svg.NUM_COLORS, "last": svg.fmt(_last(column))}
            for i, (key, column) in enumerate(columns.items())
        ],
        wide=spec.wide,
        data={
            "steps": [int(step) for step in steps],
            "values": [[_short(v) for v in column] for column in columns.values()],
            "px": [round(first_px, 1), round(last_px, 1)],
            "width": plot.width,
        },
    )


def _column(bins: list[list[Row]], key: str, join: Callable[[Iterable[float]], float]) -> Values:
    joined: Values = []
    for rows in bins:
        known = [float(row[key]) for row in rows if _is_number(row.get(key))]
        joined.append(join(known) if known else None)
    return joined


def _band(bins: list[list[Row]], spec: Spec) -> tuple[Values, Values] | None:
    if spec.band is None:
        return None
    mean, spread = (_column(bins, key, statistics.fmean) for key in spec.band)
    pairs = list(zip(mean, spread, strict=True))
    if all(m is None or s is None for m, s in pairs):
        return None
    low: Values = [None if m is None or s is None else m - s for m, s in pairs]
    high: Values = [None if m is None or s is None else m + s for m, s in pairs]
    return low, high


def _range(bins: list[list[Row]], spec: Spec, keys: Collection[str]) -> tuple[Values, Values] | None:
    if spec.range is None or not set(spec.range) <= set(keys):
        return None
    return _column(bins, spec.range[0], min), _column(bins, spec.range[1], max)


def _window(num_points: int) -> int:
    """Odd width of the moving mean; 0: too few points to smooth."""
    return 0 if num_points < MIN_TO_SMOOTH else max(3, num_points // 8 | 1)


def _smooth(values: Sequence[float | None], window: int) -> Values:
    smooth: Values = []
    for i, value in enumerate(values):
        reach = min(window // 2, i, len(values) - 1 - i)  # narrower at the ends, so that it is never one-sided
        near = [v for v in values[i - reach : i + reach + 1] if v is not None]
        smooth.append(None if value is None else statistics.fmean(near))
    return smooth


def _note(spec: Spec, per_bin: int, columns: dict[str, Values], band: bool) -> str:
    parts = [spec.note] if spec.note and (band or spec.band is None) else []
    if per_bin > 1:
        kind = "greatest" if any(key in PEAK_KEYS for key in columns) else "mean"
        parts.append(f"Each point stands for {per_bin} steps ({kind}).")
    if spec.log and any(v is not None and v <= 0 for column in columns.values() for v in column):
        parts.append("Values of 0 lie on the foot of the log scale.")
    return " ".join(parts)


def _summary(spec: Spec, labels: dict[str, str], columns: dict[str, Values], steps: list[float]) -> str:
    parts = []
    for key, column in columns.items():
        known = [v for v in column if v is not None]
        parts.append(
            f"{labels[key]}: first {svg.fmt(known[0])}, last {svg.fmt(known[-1])}, "
            f"least {svg.fmt(min(known))}, greatest {svg.fmt(max(known))}"
        )
    return f"{spec.title}, {spec.unit}, steps {steps[0]:.0f} to {steps[-1]:.0f}. " + "; ".join(parts)


def _last(column: Values) -> float | None:
    return next((v for v in reversed(column) if v is not None), None)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
