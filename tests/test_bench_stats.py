"""Intervals and verdicts: against known values, and under simulated noise with fixed seeds."""

import math

import numpy as np
import pytest

from m2train.bench import stats


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [(0.975, 1, 12.7062), (0.975, 5, 2.57058), (0.99, 7, 2.99795), (0.9, 30, 1.31042), (0.975, 2.5, 3.57465)],
)
def test_t_quantile(p, df, expected):
    """Values of printed tables (2.5: by integration of the density elsewhere)."""
    assert stats.t_quantile(p, df) == pytest.approx(expected, rel=2e-4)
    assert stats.t_quantile(1 - p, df) == pytest.approx(-expected, rel=2e-4)


def test_t_cdf_is_a_distribution():
    assert stats.t_cdf(0.0, 4) == 0.5
    assert stats.t_cdf(3.0, 4) + stats.t_cdf(-3.0, 4) == pytest.approx(1.0)


def test_bootstrap_resamples_processes():
    """Two processes that differ by 10 % leave the median unsure by about that, however many samples each has."""
    rng = np.random.default_rng(0)
    near = [1 + 0.001 * rng.standard_normal(200) for _ in range(2)]
    apart = [near[0], 1.1 * near[1]]
    low, high = stats.bootstrap_median(near)
    assert high - low < 0.01
    low, high = stats.bootstrap_median(apart)
    assert low < 1.01 and high > 1.09


@pytest.mark.parametrize(("between", "within"), [(0.05, 0.01), (0.001, 0.05)])
@pytest.mark.parametrize("processes", [3, 4])
def test_intervals_hold_what_they_promise(processes, between, within):
    """95 % of the intervals hold the true median, whether processes or samples vary more."""
    rng = np.random.default_rng(11)
    held = []
    for k in range(150):
        levels = between * rng.standard_normal(processes)
        samples = [np.exp(level + within * rng.standard_normal(40)) for level in levels]
        low, high = stats.bootstrap_median(samples, draws=200, seed=k)
        held.append(low < 1 < high)
    assert np.mean(held) > 0.91


def test_ratio_of_paired_samples_survives_a_common_drift():
    rng = np.random.default_rng(1)
    drift = np.exp(np.cumsum(0.1 * rng.standard_normal(100)))
    below, above = drift, 1.2 * drift * np.exp(0.01 * rng.standard_normal(100))
    value, low, high = stats.bootstrap_ratio([above], [below])
    assert low < 1.2 < high and high - low < 0.02 and low <= value <= high


def test_half_width():
    assert stats.half_width([1.0] * 3) == math.inf
    assert stats.half_width([1.0] * 30) == 0.0
    rng = np.random.default_rng(2)
    few, many = (stats.half_width(1 + 0.1 * rng.standard_normal(n)) for n in (20, 2000))
    assert many < few / 4


def comparisons(effect, noise, *, rows, pairs, margin, number, seed):
    """Verdicts of `number` simulated comparisons of `rows` rows."""
    rng = np.random.default_rng(seed)
    return [
        [
            stats.judge_pairs(
                math.log1p(effect) + noise * rng.standard_normal(pairs), rows=rows, margin=margin
            ).verdict
            for _ in range(rows)
        ]
        for _ in range(number)
    ]


def test_equal_code_is_not_told_apart():
    """20 rows, no margin: without the correction two of three comparisons would call one; with it one of 20 may."""
    found = comparisons(0.0, 0.06, rows=20, pairs=8, margin=0.0, number=200, seed=3)
    wrong = sum(any(v in ("SLOWER", "FASTER") for v in one) for one in found)
    assert wrong <= 20
    alone = comparisons(0.0, 0.06, rows=1, pairs=8, margin=0.0, number=400, seed=3)
    assert 0.02 <= np.mean([one != ["UNCLEAR"] for one in alone]) <= 0.09  # a level of 5 %, neither more nor less


def test_noise_of_six_percent_and_a_slowdown_of_fifteen():
    found = comparisons(0.15, 0.04, rows=3, pairs=8, margin=0.03, number=100, seed=4)
    assert all(verdict != "FASTER" for one in found for verdict in one)
    assert np.mean([verdict == "SLOWER" for one in found for verdict in one]) > 0.95


def test_limit_is_found_as_often_as_it_says():
    rng = np.random.default_rng(5)
    limits = [stats.judge_pairs(0.03 * rng.standard_normal(10), rows=4, margin=0.03).limit for _ in range(200)]
    found = comparisons(float(np.median(limits)), 0.03, rows=4, pairs=10, margin=0.03, number=100, seed=6)
    assert 0.7 < np.mean([verdict == "SLOWER" for one in found for verdict in one]) < 0.92


@pytest.mark.parametrize(
    ("effect", "verdict"), [(0.2, "SLOWER"), (-0.2, "FASTER"), (0.01, "SAME"), (-0.01, "SAME"), (0.031, "UNCLEAR")]
)
def test_verdicts(effect, verdict):
    logs = math.log1p(effect) + 0.003 * np.array([-1, 1, -0.5, 0.5, 0.1, -0.1])
    judged = stats.judge_pairs(logs, rows=2, margin=0.03)
    assert judged.verdict == verdict
    assert judged.low < judged.ratio < judged.high
    assert judged.ratio == pytest.approx(1 + effect, rel=1e-3)


def test_one_pair_decides_nothing():
    judged = stats.judge_pairs([1.0], rows=1, margin=0.01)
    assert judged.verdict == "UNCLEAR" and judged.limit == math.inf
    assert stats.judge_sides([0.0], [1.0, 1.1], rows=1, margin=0.01).verdict == "UNCLEAR"


def test_more_rows_need_more_evidence():
    logs = [0.05, 0.06, 0.045, 0.055, 0.05]
    one, many = (stats.judge_pairs(logs, rows=rows, margin=0.01) for rows in (1, 100))
    assert many.low < one.low and many.high > one.high and many.limit > one.limit


def test_sides():
    """Welch: of two sides with their own spread."""
    judged = stats.judge_sides([0.0, 0.01, -0.01], [0.3, 0.31, 0.29], rows=1, margin=0.03)
    assert judged.verdict == "SLOWER" and judged.units == 3
    assert stats.judge_sides([0.0, 0.3, -0.3], [0.1, 0.4, -0.2], rows=1, margin=0.03).verdict == "UNCLEAR"
    assert stats.judge_sides([0.0, 0.0], [0.0, 0.0], rows=1, margin=0.01).verdict == "SAME"


def test_geomean():
    assert stats.geomean([2.0, 0.5, 1.0]) == pytest.approx(1.0)
