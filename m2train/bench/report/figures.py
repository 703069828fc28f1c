"""SVG of rows: roofline, ratios with intervals, trend. Colours are classes of m2train.report's style.css."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from m2train.bench.display import duration, label
from m2train.bench.report.select import short
from m2train.bench.schema import Row
from m2train.report.svg import NUM_COLORS, Axis, fmt

ROOF_WIDTH, ROOF_HEIGHT = 1180, 420
BAR_WIDTH, BAR_ROW, BAR_LABEL, BAR_VALUE = 1180, 24, 400, 200
TREND_WIDTH, TREND_HEIGHT = 600, 180


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Powers of ten inside a range, thinned to `most`; finer steps where the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits: tuple[float, ...] = (1,)
    if high / low < 30:
        digits = (1, 2, 5) if high / low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    found = [d * 10.0**e for e in range(first, last + 1) for d in digits]
    found = [t for t in found if low * 0.999 <= t <= high * 1.001]
    return found[:: max(1, math.ceil(len(found) / most))]


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'
    return head + "".join(parts) + "</svg>"


# ------------------------------------------------------------------------------------------------- roofline


def placeable(row: Row) -> bool:
    """Whether a row has a place under a roofline."""
    p, t = row.physics, row.timing
    return bool(t and t.unit == "s" and p.bytes and p.flops and p.bandwidth and p.peak)


def roofline(rows: Sequence[Row], colors: dict[str, int]) -> str:
    """FLOP/s over FLOP/byte, both logarithmic, with the measured ceilings that the rows were judged by.

    Args:
        rows: of one machine, all `placeable`; our own implementations are drawn full, others hollow.
        colors: case -> colour number.
    """
    points = []
    for row in rows:
        p, t = row.physics, row.timing
        assert t is not None and p.bytes is not None and p.flops is not None
        points.append((p.flops / p.bytes, p.flops / t.median, row))
    roofs = sorted({row.physics.bandwidth for row in rows if row.physics.bandwidth})
    peaks = sorted({row.physics.peak for row in rows if row.physics.peak})
    xs = [x for x, _, _ in points] + [peaks[-1] / roofs[-1]]
    ys = [y for _, y, _ in points] + peaks
    left, right, foot = 64.0, ROOF_WIDTH - 24.0, ROOF_HEIGHT - 40.0
    x = Axis(low=min(xs) / 3, high=max(xs) * 8, first_px=left, last_px=right, log=True)
    y = Axis(low=min(ys) / 3, high=max(ys) * 2.5, first_px=foot, last_px=14.0, log=True)
    parts = []
    for tick in log_ticks(y.low, y.high):
        parts += [_line(left, y(tick), right, y(tick), "grid"), _text(left - 6, y(tick) + 4, fmt_si(tick), "", "end")]
    for tick in log_ticks(x.low, x.high):
        parts += [_line(x(tick), 14, x(tick), foot, "grid"), _text(x(tick), foot + 17, fmt(tick), "", "middle")]
    parts.append(_line(left, foot, right, foot, "axis"))
    parts.append(_text((left + right) / 2, foot + 35, "FLOP per byte, as the case states them", "", "middle"))
    parts.append(_text(left - 50, 10, "FLOP/s"))
    for bandwidth in roofs:
        low, high = max(x.low, y.low / bandwidth), min(peaks[-1] / bandwidth, x.high)
        if low < high:
            parts.append(_line(x(low), y(low * bandwidth), x(high), y(high * bandwidth), "roof"))
            middle = math.sqrt(low * high)
            at = x(middle) - 10, y(middle * bandwidth) - 8
            parts.append(_text(*at, f"{fmt_si(bandwidth)}B/s", "rooftext", "end"))
    for peak in peaks:
        start = max(x.low, peak / roofs[-1])
        parts.append(_line(x(start), y(peak), right, y(peak), "roof"))
        parts.append(_text(right, y(peak) - 7, f"{fmt_si(peak)}FLOP/s", "rooftext", "end"))
    for intensity, rate, row in points:
        i, t = row.identity, row.timing
        assert t is not None
        share = f"{row.physics.sol_percent:.1f} % of the speed of light"
        tip = f"{i.case}/{label(row)} {short(row)}: {duration(t.median, t.unit)}, {share}"
        color = colors.get(i.case, 0) % NUM_COLORS
        kind = "own" if row.ours else "other"
        parts.append(
            f'<g class="c{color}"><circle class="{kind}" cx="{x(intensity):.1f}" cy="{y(rate):.1f}" r="5">'
            f"<title>{escape(tip)}</title></circle></g>"
        )
    return _svg(ROOF_WIDTH, ROOF_HEIGHT, f"Roofline with {len(points)} rows", parts)


def fmt_si(value: float) -> str:
    """A number with an SI prefix."""
    for size, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} "


# ------------------------------------------------------------------------------------------------- ratios


def ratios(rows: Sequence[Row], color: int) -> str:
    """Time over the baseline's, a bar a row on a logarithmic axis from 1, with its 95 % interval."""
    found = [row for row in rows if row.timing and row.timing.ratio]
    values = [v for row in found for v in (row.timing.ratio.low, row.timing.ratio.high)]  # type: ignore[union-attr]
    low, high = min([0.8, *values]) / 1.15, max([1.25, *values]) * 1.15
    height = 34 + BAR_ROW * len(found)
    x = Axis(low=low, high=high, first_px=BAR_LABEL, last_px=BAR_WIDTH - BAR_VALUE, log=True)
    parts = []
    for tick in log_ticks(low, high):
        parts += [
            _line(x(tick), 4, x(tick), height - 26, "grid"),
            _text(x(tick), height - 10, f"x{fmt(tick)}", "", "middle"),
        ]
    parts.append(_line(x(1), 0, x(1), height - 26, "one"))
    for number, row in enumerate(found):
        assert row.timing is not None and row.timing.ratio is not None
        ratio, middle = row.timing.ratio, 4 + BAR_ROW * (number + 0.5)
        start, end = sorted((x(1), x(ratio.value)))
        mark = "good" if ratio.high < 1 else "bad" if ratio.low > 1 else "even"
        parts.append(
            _text(
                BAR_LABEL - 10,
                middle + 4,
                f"{row.identity.impl}{' (ceiling)' if row.ceiling else ''}  {short(row)}",
                "label",
                "end",
            )
        )
        parts.append(
            f'<g class="c{color % NUM_COLORS}"><rect class="{mark}" x="{start:.1f}" y="{middle - 6:.1f}" '
            f'width="{max(1.0, end - start):.1f}" height="12"/></g>'
        )
        parts.append(_line(x(ratio.low), middle, x(ratio.high), middle, "whisker"))
        parts += [_line(x(e), middle - 4, x(e), middle + 4, "whisker") for e in (ratio.low, ratio.high)]
        text = f"x{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        parts.append(_text(BAR_WIDTH, middle + 4, text, "label", "end"))
    return _svg(BAR_WIDTH, height, f"Time over the baseline's for {len(found)} rows", parts)


# ------------------------------------------------------------------------------------------------- trend


def trend(rows: Sequence[Row], color: int) -> str:
    """Median and interval of one row over its runs, oldest first; each is named by its commit."""
    times = [row.timing for row in rows if row.timing is not None]
    low, high = min(t.low for t in times) * 0.92, max(t.high for t in times) * 1.08
    left, right, foot = 62.0, TREND_WIDTH - 14.0, TREND_HEIGHT - 26.0
    x = Axis(low=-0.5, high=len(times) - 0.5, first_px=left, last_px=right)
    y = Axis(low=low, high=high, first_px=foot, last_px=10.0)
    parts = [_line(left, foot, right, foot, "axis")]
    for part in (0.1, 0.5, 0.9):
        value = low + part * (high - low)
        parts += [_line(left, y(value), right, y(value), "grid")]
        parts.append(_text(left - 6, y(value) + 4, duration(value, times[0].unit), "", "end"))
    path = " ".join(f"{x(k):.1f},{y(t.median):.1f}" for k, t in enumerate(times))
    marks = "".join(
        f'<line x1="{x(k):.1f}" x2="{x(k):.1f}" y1="{y(t.low):.1f}" y2="{y(t.high):.1f}" stroke="currentColor"/>'
        f'<circle class="own" cx="{x(k):.1f}" cy="{y(t.median):.1f}" r="3"/>'
        for k, t in enumerate(times)
    )
    parts.append(f'<g class="c{color % NUM_COLORS}"><polyline points="{path}"/>{marks}</g>')
    every = max(1, len(times) // 5)
    for k, row in enumerate(rows):
        if k % every == 0:
            parts.append(_text(x(k), foot + 16, str(row.build.get("sha") or "?")[:7], "", "middle"))
    return _svg(TREND_WIDTH, TREND_HEIGHT, f"Trend over {len(times)} runs", parts)
