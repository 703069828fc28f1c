"""Packing speed and balance: m2kernels.pack_balanced beside a plain-Python Karmarkar-Karp.

The rival is the largest-differencing method that RL trainers use to balance micro-batches. Both get the same costs,
and each result is checked to be a partition.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Any

import m2kernels as mk
from m2train.bench import shapes
from m2train.bench.case import Case, Setup, Skip, case

Bins = list[list[int]]


def karmarkar_karp(cost: list[int], num_bins: int) -> Bins:
    """Largest differencing: merge the two partial partitions of largest spread, again and again."""
    order = itertools.count()
    heap = []
    for item, c in enumerate(cost):
        bins = [(c, [item])] + [(0, []) for _ in range(num_bins - 1)]
        heapq.heappush(heap, (-c, next(order), bins))
    while len(heap) > 1:
        a, b = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        merged = [(x + y, left + right) for (x, left), (y, right) in zip(a, reversed(b), strict=True)]
        merged.sort(key=lambda entry: -entry[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], next(order), merged))
    return [sorted(items) for _, items in heap[0][2]]


def partition(bins: Bins, inputs: tuple[Any, ...]) -> str | None:
    """What keeps `bins` from being a partition of the items, or None."""
    cost, num_bins = inputs
    if len(bins) != num_bins:
        return f"{len(bins)} bins; {num_bins} were asked for"
    if sorted(i for b in bins for i in b) != list(range(len(cost))):
        return "not a partition of the items"
    # Any list scheduling keeps the largest bin under twice the mean or one item, whatever the order.
    mean = sum(cost) / num_bins
    worst = max(sum(cost[i] for i in b) for b in bins)
    return None if worst <= mean + max(cost) else f"the largest bin has {worst / mean:.2f} times the mean"


def _recorded(workload: shapes.Workload) -> dict[str, Any]:
    pairs = zip(workload.prompts, workload.lengths, strict=True)
    cost = [prompt + length for prompt, group in pairs for length in group]
    return {"cost": tuple(cost), "bins": max(1, len(cost) // 8)}


@case(
    "packer",
    shapes={
        f"{n}x{b}": {"cost": shapes.ragged(n, 1500, 16384), "bins": b} for n, b in ((256, 8), (2048, 64), (8192, 64))
    },
    smoke=("2048x64",),
    workload=_recorded,
)
def packer(s: Setup) -> Case:
    """Items into bins of equal cost."""
    if s.device.type != "cpu":
        raise Skip("packing runs on the host: --device cpu measures it")
    shift = int(s.randint(64, 1))  # other costs for another seed
    cost = [c + shift * (i % 3) for i, c in enumerate(s.cost)]

    def spread(bins: Bins) -> dict[str, float]:
        sums = [sum(cost[i] for i in b) for b in bins]
        return {"spread_of_mean": (max(sums) - min(sums)) / (sum(sums) / len(sums))}

    return Case(
        verify=partition,
        inputs=(cost, s.bins),
        impls={"m2": mk.pack_balanced, "karmarkar_karp": karmarkar_karp},
        baseline="karmarkar_karp",
        rotate=False,
        quality=spread,
    )
