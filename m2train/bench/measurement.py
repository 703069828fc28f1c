"""Launches that are warmed up, and interleaved rounds over several implementations in one process."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

from m2train.bench.launch import Launch, arm
from m2train.bench.stats import half_width
from m2train.bench.timers import CallgrindTimer, GraphError, GraphTimer, Timer

CONVERGED = 0.005
"""Half-width of the median's interval at which sampling ends."""
MIN_ROUNDS = 5
FEW_ROUNDS = 2
"""Enough where MIN_ROUNDS would take many times the budget: intervals resample processes first."""
OVERDRAWN, OVERDRAWN_S = 3.0, 10.0
"""How many times, and seconds at the least: a hiccup of the machine must not cost a short case its rounds."""
SLOW_S = 1.0
"""A launch that takes longer needs no second one to be warm."""
MAX_ROUNDS = 400


@dataclass
class Ready:
    """One implementation, ready to be timed."""

    launches: list[Launch]
    per_sample: int = 1
    at: int = 0

    def take(self, whole: bool) -> list[Launch]:
        """The next launches round the ring; `whole`: always the same ones (a graph is captured once)."""
        size = len(self.launches)
        start = 0 if whole else self.at
        picked = [self.launches[(start + i) % size] for i in range(self.per_sample)]
        self.at = (start + self.per_sample) % size
        return picked


def warm(one: Ready, timer: Timer, min_sample_s: float, warmup_s: float, *, compiles: bool = True) -> Ready:
    """Run for `warmup_s` after a first launch, which may compile, then choose the launches of a sample."""
    if isinstance(timer, CallgrindTimer):
        for i in range(3):
            arm(one.launches[i : i + 1] or one.launches[:1])
            (one.launches[i : i + 1] or one.launches[:1])[0]()
        return one
    arm(one.launches[:1])
    begun = time.perf_counter()
    one.launches[0]()
    timer.settle()
    if not compiles and time.perf_counter() - begun > max(SLOW_S, warmup_s):
        return one
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < warmup_s or count < 2:
        picked = one.take(False)
        arm(picked)
        for run in picked:
            run()
        timer.settle()
        count += 1
    each = (time.perf_counter() - start) / count
    one.per_sample = max(1, round(min_sample_s / each))
    if isinstance(timer, GraphTimer):  # every replay goes round the whole ring: no launch finds its data cached
        one.per_sample = max(one.per_sample, len(one.launches))
    elif len(one.launches) > 1:
        one.per_sample = min(one.per_sample, len(one.launches))
    return one


class Measurement:
    """Interleaved rounds over several implementations in one process."""

    def __init__(self, ready: dict[str, Ready], timer: Timer) -> None:
        self.ready, self.timer = ready, timer
        self.samples: dict[str, list[float]] = {name: [] for name in ready}

    def round(self, number: int) -> None:
        """One sample of each; every other round in reverse, so that none always follows the same one."""
        names = list(self.ready)
        whole = isinstance(self.timer, GraphTimer)
        for name in names if number % 2 == 0 else reversed(names):
            try:
                self.samples[name].append(self.timer.time(self.ready[name].take(whole)))
            except GraphError as err:
                raise GraphError(f"{name} cannot be captured in a CUDA graph ({err})") from err

    def run(self, budget_s: float, rounds: int | None = None) -> str:
        """Rounds until every interval is narrow, or the budget is spent; says which."""
        gc.collect()
        gc.disable()
        start, number = time.perf_counter(), 0
        try:
            while True:
                self.round(number)
                number += 1
                if rounds is not None and number >= rounds:
                    return "budget"
                spent = time.perf_counter() - start
                if number >= FEW_ROUNDS and spent > max(OVERDRAWN * budget_s, OVERDRAWN_S):
                    return "budget"
                if number >= MIN_ROUNDS:
                    if all(half_width(s) < CONVERGED for s in self.samples.values()):
                        return "converged"
                    if spent > budget_s or number >= MAX_ROUNDS:
                        return "budget"
        finally:
            gc.enable()
