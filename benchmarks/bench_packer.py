"""Packing speed and balance: m2kernels.pack_balanced beside a plain-Python Karmarkar-Karp.

The rival is the largest-differencing method that RL trainers use to balance micro-batches. Both
get the same costs; each is checked to be a partition before it is timed; the best of five runs is
reported, with the spread (most minus least expensive bin) as a share of the mean.

    python benchmarks/bench_packer.py [--items 8192] [--bins 64]
"""

import argparse
import heapq
import itertools
import time
from collections.abc import Callable

import numpy as np

import m2kernels as mk

Pack = Callable[[list[int], int], list[list[int]]]


def karmarkar_karp(cost: list[int], num_bins: int) -> list[list[int]]:
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


def measure(pack: Pack, cost: list[int], num_bins: int, repeats: int = 5) -> tuple[float, float]:
    """Best seconds of `repeats`, and the spread as a share of the mean."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        bins = pack(cost, num_bins)
        seconds.append(time.perf_counter() - start)
    if sorted(i for b in bins for i in b) != list(range(len(cost))):
        raise RuntimeError("not a partition: a broken packer must not be timed")
    sums = [sum(cost[i] for i in b) for b in bins]
    return min(seconds), (max(sums) - min(sums)) / (sum(sums) / num_bins)


def main() -> None:
    """Print one line a packer and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="*", default=[256, 2048, 8192])
    parser.add_argument("--bins", type=int, nargs="*", default=[8, 64])
    args = parser.parse_args()
    packers: dict[str, Pack] = {"pack_balanced": mk.pack_balanced, "karmarkar_karp": karmarkar_karp}
    print(f"{'items':>6} {'bins':>5} {'packer':<15} {'ms':>9} {'spread':>9}")
    for items, bins in itertools.product(args.items, args.bins):
        cost = np.random.default_rng(0).lognormal(7, 1, items).astype(int).tolist()
        for name, pack in packers.items():
            seconds, spread = measure(pack, cost, bins, 5 if name == "pack_balanced" else 1)
            print(f"{items:>6} {bins:>5} {name:<15} {seconds * 1e3:>9.2f} {spread:>9.2e}")


if __name__ == "__main__":
    main()
