"""Plants a slowdown and three cheats, and fails unless each is caught: a harness that cannot fail proves nothing.

A/A       the same code on both sides must not be told apart
slowdown  3 % more work must be SLOWER, by launches that alternate in one process
wrong     a result off by 1 in 1000 in one element must be refused
late      a result that a background thread (CUDA: a side stream) finishes after the call has returned
cached    a result that is computed once and handed out again
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from m2train.bench import faults, stats
from m2train.bench.case import CaseSpec, Fn
from m2train.bench.check import Checker, Guards
from m2train.bench.timers import default_timer, make_timer

FAULTS = ("slowdown", "wrong", "late", "cached")
PLANTED = 0.03
MARGIN = 0.01
"""Effects up to this size are not called, as on a GPU; the planted one is 3 times as large."""
_BLOCKS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of one planted fault."""

    name: str
    caught: bool
    detail: str


def selftest(device: torch.device, let_through: str | None = None, *, seconds: float = 6.0) -> Iterator[Outcome]:
    """Run every part; `let_through` names a fault whose guard is turned off, and which is then not caught.

    Args:
        device: where.
        let_through: one of FAULTS. For the slowdown, effects up to twice its size are tolerated.
        seconds: about how long each of the two timings may take.
    """
    torch.set_num_threads(1)
    yield _same(device, seconds)
    yield _slowdown(device, seconds, guard=let_through != "slowdown")
    guards = {name: let_through != name for name in ("wrong", "late", "cached")}
    for name, plant in (("wrong", faults.wrong), ("late", faults.late), ("cached", faults.cached)):
        yield _cheat(device, name, plant, Guards(**guards))


def compare_in_process(
    a: Callable[[], object], b: Callable[[], object], device: torch.device, seconds: float, margin: float = MARGIN
) -> stats.Judgement:
    """B against A with single launches that alternate A B B A; blocks of launches are the units of the interval."""
    timer = make_timer(default_timer(device) if device.type == "cpu" else "events", device)
    for run in (a, b, a, b):
        timer.time([run])
    each = (timer.time([a] * 5) + timer.time([b] * 5)) / 2
    quads = max(10, min(2000, math.ceil(seconds / each / 4 / _BLOCKS)))
    logs = []
    for _ in range(_BLOCKS):
        block = []
        for _ in range(quads):
            first, second = timer.time([a]), timer.time([b])
            third, fourth = timer.time([b]), timer.time([a])
            block.append(math.log((second + third) / (first + fourth)))
        logs.append(float(stats.np.median(block)))
    return stats.judge_pairs(logs, rows=1, margin=margin)


def _same(device: torch.device, seconds: float) -> Outcome:
    run, _ = faults.work(device, PLANTED)
    found = compare_in_process(run, run, device, seconds)
    return Outcome(name="A/A", caught=found.verdict in ("SAME", "UNCLEAR"), detail=describe(found))


def _slowdown(device: torch.device, seconds: float, *, guard: bool) -> Outcome:
    run, slower = faults.work(device, PLANTED)
    margin = MARGIN if guard else 2 * PLANTED
    found = compare_in_process(run, slower, device, seconds, margin)
    return Outcome(name="slowdown", caught=found.verdict == "SLOWER", detail=describe(found))


def _cheat(device: torch.device, name: str, plant: Callable[[], Fn], guards: Guards) -> Outcome:
    spec = faults.spec_of(plant)
    found = check_planted(spec, device, guards)
    return Outcome(name=name, caught=found is not None, detail=found or "it passed every check")


def check_planted(spec: CaseSpec, device: torch.device, guards: Guards) -> str | None:
    """Why the planted implementation of a case is refused, or None; the honest one beside it must pass.

    Raises:
        AssertionError: the honest one is refused too: the check is broken, not the plant.
    """
    case = spec.make("plain", torch.float32, device)
    checker = Checker(case, spec.make("plain", torch.float32, device, seed=1), "both", guards)
    honest = checker.run("torch")
    assert honest.verdict == "ok", f"the honest implementation was refused: {honest.reason}"
    numerics = checker.run("planted")
    return None if numerics.verdict == "ok" else numerics.reason


def describe(found: stats.Judgement) -> str:
    """One line of a verdict."""
    return (
        f"{found.verdict}: x{found.ratio:.4f} [{found.low:.4f}, {found.high:.4f}], "
        f"would see a slowdown of {100 * found.limit:.1f} %"
    )
