"""Medians, intervals and verdicts. Samples are kept whole: no outlier is dropped anywhere.

Samples come as one list a process: noise between processes (memory layout, caches, neighbours) is larger than within
one, so intervals resample processes first, and compare.py has a pair of processes as its unit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Samples = Sequence[Sequence[float]]
Verdict = Literal["SAME", "FASTER", "SLOWER", "UNCLEAR"]

ALPHA = 0.05
"""Chance that any verdict of a comparison is wrong, over all of its rows."""
POWER = 0.8
"""Chance with which an effect of the detection limit is found."""


def flat(samples: Samples) -> np.ndarray:
    """All samples of all processes."""
    return np.concatenate([np.asarray(one, dtype=np.float64) for one in samples])


def bootstrap_median(
    samples: Samples, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the pooled median: processes are drawn with replacement, then samples within each."""
    logs = [np.log(np.asarray(one, dtype=np.float64)) for one in samples]
    low, high = _interval(logs, level, draws, seed)
    return math.exp(low), math.exp(high)


def bootstrap_ratio(
    above: Samples, below: Samples, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(median ratio, low, high) of paired samples: the i-th of both were taken in the same round."""
    logs = []
    for a, b in zip(above, below, strict=True):
        size = min(len(a), len(b))
        logs.append(np.log(np.asarray(a[:size])) - np.log(np.asarray(b[:size])))
    low, high = _interval(logs, level, draws, seed)
    return math.exp(float(np.median(np.concatenate(logs)))), math.exp(low), math.exp(high)


def _interval(data: Sequence[np.ndarray], level: float, draws: int, seed: int) -> tuple[float, float]:
    """Of the pooled median: its bootstrap standard error times Student's t for the number of processes.

    Quantiles of the draws would be too narrow: of 3 processes they hold what they promise in 3 of 4 cases, for they
    know neither that 3 draws vary less than 3 processes (by k - 1 over k) nor how unsure a spread of 3 values is. One
    process says nothing of others: its quantiles are those of its samples alone.
    """
    rng = np.random.default_rng(seed)
    found = np.empty(draws)
    for k in range(draws):
        chosen = rng.integers(len(data), size=len(data))
        found[k] = np.median(np.concatenate([rng.choice(data[i], size=len(data[i])) for i in chosen]))
    number = len(data)
    if number == 1:
        low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)
    center = float(np.median(np.concatenate(data)))
    error = float(found.std()) * math.sqrt(number / (number - 1))
    reach = t_quantile((1 + level) / 2, number - 1) * error
    return center - reach, center + reach


def half_width(samples: Sequence[float]) -> float:
    """Relative half-width of the median's 95 % interval from order statistics: quick enough for a stopping rule."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    reach = 0.98 * math.sqrt(len(ordered))
    low, high = math.floor(len(ordered) / 2 - reach), math.ceil(len(ordered) / 2 + reach) - 1
    if low < 0 or high >= len(ordered):
        return math.inf
    return float((ordered[high] - ordered[low]) / 2 / np.median(ordered))


# ------------------------------------------------------------------------------------------------- Student's t


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) of Student's t, by Simpson's rule: with t = sqrt(df) tan(a) the density is cos(a)^(df - 1)."""
    angle = math.atan(abs(t) / math.sqrt(df))
    steps = 400
    x = np.linspace(0.0, angle, steps + 1)
    y = np.cos(x) ** (df - 1)
    area = float((y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()) * angle / steps / 3)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    half = area * scale
    return 0.5 + half if t >= 0 else 0.5 - half


@functools.cache
def t_quantile(p: float, df: float) -> float:
    """The t below which a share `p` lies; by bisection, to 1e-9."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


# ------------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a comparison says about one row; ratios are time of B over time of A."""

    ratio: float
    low: float
    high: float
    verdict: Verdict
    limit: float
    """Smallest slowdown that would have been called SLOWER with probability 0.8: 0.04 is 4 %."""
    margin: float
    """Effects up to this size are not called."""
    units: int
    """Pairs of processes, or processes of the smaller side."""


def judge_pairs(logs: Sequence[float], *, rows: int, margin: float) -> Judgement:
    """Judge a row from paired log ratios, one a pair of processes.

    Args:
        logs: log(time of B / time of A).
        rows: rows judged together; the interval's level is corrected for them (Bonferroni).
        margin: relative effect that is not worth a verdict (0.03 is 3 %).
    """
    x = np.asarray(logs, dtype=np.float64)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.inf
    return _judge(float(x.mean()), error, len(x) - 1, rows, margin, len(x))


def judge_sides(a: Sequence[float], b: Sequence[float], *, rows: int, margin: float) -> Judgement:
    """Judge a row from the logs of the medians of each side's processes (Welch); the runs were apart in time."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    units = min(len(x), len(y))
    if units < 2:
        return _judge(float(y.mean() - x.mean()), math.inf, 0, rows, margin, units)
    u, v = float(x.var(ddof=1) / len(x)), float(y.var(ddof=1) / len(y))
    df = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1)) if u + v > 0 else float(units - 1)
    return _judge(float(y.mean() - x.mean()), math.sqrt(u + v), df, rows, margin, units)


def _judge(mean: float, error: float, df: float, rows: int, margin: float, units: int) -> Judgement:
    edge = math.log1p(margin)
    if df < 1 or not math.isfinite(error):
        low, high, limit = -math.inf, math.inf, math.inf
    else:
        critical = t_quantile(1 - ALPHA / (2 * rows), df)
        low, high = mean - critical * error, mean + critical * error
        limit = math.expm1(edge + (critical + t_quantile(POWER, df)) * error)
    if low > edge:
        verdict: Verdict = "SLOWER"
    elif high < -edge:
        verdict = "FASTER"
    elif -edge <= low and high <= edge:
        verdict = "SAME"
    else:
        verdict = "UNCLEAR"
    return Judgement(
        ratio=math.exp(mean),
        low=math.exp(low) if math.isfinite(low) else 0.0,
        high=math.exp(high) if math.isfinite(high) else math.inf,
        verdict=verdict,
        limit=limit,
        margin=margin,
        units=units,
    )


def geomean(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(math.fsum(math.log(r) for r in ratios) / len(ratios))
