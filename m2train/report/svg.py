"""Draws one chart as SVG. Colours are classes of style.css: light and dark share a drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[float | None]

WIDTH, WIDE, HEIGHT = 300, 610, 196
"""In CSS pixels of a 1300 px wide window, so that text keeps its size; `WIDE` fills two columns."""
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 10, 22
NUM_COLORS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One series: the raw values, and the smoothed ones if there are enough to smooth."""

    color: int
    values: Points
    smooth: Points | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """What is drawn; `steps` are the x values of every series."""

    steps: Sequence[float]
    lines: Sequence[Line]
    summary: str
    band: tuple[Points, Points] | None = None
    range: tuple[Points, Points] | None = None
    stacked: bool = False
    log: bool = False
    limit: float | None = None
    end_labels: bool = False
    zero: bool = False
    width: int = WIDTH


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Maps values to pixels."""

    low: float
    high: float
    first_px: float
    last_px: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; on a log axis what is not positive lies on the foot."""
        low, high = self.low, self.high
        if self.log:
            low, high = math.log10(low), math.log10(high)
            value = math.log10(value) if value > 0 else low
        part = (value - low) / (high - low)
        return self.first_px + part * (self.last_px - self.first_px)


def draw(plot: Plot) -> tuple[str, float, float]:
    """The `<svg>` and the pixels of the first and last step, for the hover read-out."""
    y = _y_axis(plot)
    pad = 14.0 if plot.stacked else 6.0
    first, last = min(plot.steps), max(plot.steps)
    half = 0.5 if first == last else 0.0
    x = Axis(low=first - half, high=last + half, first_px=LEFT + pad, last_px=plot.width - RIGHT - pad)
    label, right = escape(plot.summary, quote=True), plot.width - RIGHT
    parts = [
        f'<svg viewBox="0 0 {plot.width} {HEIGHT}" role="img" aria-label="{label}">',
        _grid(x, y, right),
    ]
    if plot.stacked:
        parts.append(_bars(plot, x, y))
    else:
        parts.append(_areas(plot, x, y))
        parts += [_line(plot.steps, line, x, y) for line in plot.lines]
    if plot.limit is not None and y.low <= plot.limit <= y.high:
        at = y(plot.limit)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="limit-label" x="{right}" y="{at - 5:.1f}">limit {fmt(plot.limit)}</text>')
    if plot.end_labels:
        parts.append(_end_labels(plot, x, y))
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>')
    return "".join(parts), x(first), x(last)


def fmt(value: float | int | None) -> str:
    """A number for a person: about four digits. app.js has the same rule."""
    if value is None:
        return "-"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6:
        unit, name = (1e9, "G") if size >= 1e9 else (1e6, "M")
        return f"{value / unit:.4g}{name}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    if 0 < abs(size - 1) < 5e-4:  # importance weights: how far from 1 is the point
        return f"{value:.6f}".rstrip("0").rstrip(".")
    digits = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.1 else 4
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [round(i * size, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, (last - first) // 6)
    found = [d * 10.0**e for e in range(first, last + 1, every) for d in digits]
    return [t for t in found if low * 0.999 <= t <= high * 1.001]


def _y_axis(plot: Plot) -> Axis:
    series: list[Points] = [line.values for line in plot.lines]
    if plot.stacked:
        columns = zip(*series, strict=True)
        series = [[sum(v for v in column if v is not None) for column in columns]]
    for pair in (plot.band, plot.range):
        series += pair or ()
    values = [v for points in series for v in points if v is not None]
    if plot.limit is not None:
        values.append(plot.limit)
    foot, head = float(HEIGHT - BOTTOM), float(TOP)
    if plot.log:
        positive = [v for v in values if v > 0]
        low, high = min(positive) / 1.5, max(positive) * 1.5
        if high / low < 10:
            low, high = low / 2, high * 2
        return Axis(low=low, high=high, first_px=foot, last_px=head, log=True)
    low, high = min(values), max(values)
    if plot.stacked or plot.zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    bottom = low if plot.stacked or (plot.zero and low == 0) else low - margin
    return Axis(low=bottom, high=high + margin, first_px=foot, last_px=head)


def _grid(x: Axis, y: Axis, right: float) -> str:
    parts = []
    values = _log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high)
    for value, text in zip(values, tick_texts(values, y.log), strict=True):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick-y" x="{LEFT - 6}" y="{at + 4:.1f}">{text}</text>')
    foot = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{foot}" y2="{foot}"/>')
    count = 5 if right < WIDE / 2 else 8
    for step in sorted({round(t) for t in ticks(x.low, x.high, count)}):
        if x.low <= step <= x.high:
            parts.append(f'<text class="tick-x" x="{x(step):.1f}" y="{foot + 16}">{step}</text>')
    parts.append(f'<text class="axis-name" x="{LEFT - 6}" y="{foot + 16}">step</text>')
    return "".join(parts)


def tick_texts(values: Sequence[float], log: bool) -> list[str]:
    """Labels with as many digits as tell the ticks apart."""
    if log:
        return [fmt(v) for v in values]
    size = min((b - a for a, b in zip(values, values[1:], strict=False)), default=0.0)
    if not 1e-6 <= size < 1000 or max(map(abs, values)) < 1e-3:  # powers of ten are shorter
        return [fmt(v) for v in values]
    digits = next((d for d in range(7) if abs(round(size, d) - size) < size * 1e-6), 6)
    return [f"{v:,.{digits}f}" if v else "0" for v in values]


def _path(steps: Sequence[float], points: Points, x: Axis, y: Axis) -> str:
    return " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, points, strict=True) if v is not None)


def _areas(plot: Plot, x: Axis, y: Axis) -> str:
    parts = []
    if plot.range is not None:
        parts += [f'<polyline class="range" points="{_path(plot.steps, edge, x, y)}"/>' for edge in plot.range]
    if plot.band is not None:
        upper = _path(plot.steps, plot.band[1], x, y)
        lower = _path(plot.steps[::-1], plot.band[0][::-1], x, y)
        parts.append(f'<polygon class="band" points="{upper} {lower}"/>')
    return "".join(parts)


def _line(steps: Sequence[float], line: Line, x: Axis, y: Axis) -> str:
    color = f"c{line.color % NUM_COLORS}"
    kind = "raw faint" if line.smooth is not None else "raw"
    size = 2.6 if len(steps) <= 60 else 1.7
    dots = "".join(
        f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="{size}"/>'
        for s, v in zip(steps, line.values, strict=True)
        if v is not None
    )
    curve = line.smooth if line.smooth is not None else line.values
    path = _path(steps, curve, x, y)
    return f'<g class="{color}"><g class="{kind}">{dots}</g><polyline points="{path}"/></g>'


def _bars(plot: Plot, x: Axis, y: Axis) -> str:
    gap = (x.last_px - x.first_px) / max(1.0, max(plot.steps) - min(plot.steps))
    step_gap = min((b - a for a, b in zip(plot.steps, plot.steps[1:], strict=False)), default=1)
    width = max(1.0, min(26.0, gap * step_gap * 0.8))
    base = [0.0] * len(plot.steps)
    parts = []
    for line in plot.lines:
        rects = []
        for i, (step, value) in enumerate(zip(plot.steps, line.values, strict=True)):
            if value:
                top = y(base[i] + value)
                rects.append(
                    f'<rect x="{x(step) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
                    f'height="{y(base[i]) - top:.1f}"/>'
                )
                base[i] += value
        parts.append(f'<g class="c{line.color % NUM_COLORS} bar">{"".join(rects)}</g>')
    return "".join(parts)


def _end_labels(plot: Plot, x: Axis, y: Axis) -> str:
    parts = []
    for line in plot.lines:
        known = [(s, v) for s, v in zip(plot.steps, line.values, strict=True) if v is not None]
        for step, value in {known[0][0]: known[0][1], known[-1][0]: known[-1][1]}.items():
            anchor = "start" if step == min(plot.steps) and len(plot.steps) > 1 else "end"
            at = y(value)
            above = at - 9 if at > TOP + 22 else at + 19
            parts.append(
                f'<text class="value" text-anchor="{anchor}" x="{x(step):.1f}" y="{above:.1f}">{fmt(value)}</text>'
            )
    return "".join(parts)
