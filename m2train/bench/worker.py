"""A measuring process: builds cases, checks and times them, as told by JSON lines on stdin; answers on stdout.

open     build a case at a shape; answers with its phases, implementations and reasons
check    numerics and memory of the implementations in a phase
measure  time implementations interleaved, launch by launch, until the intervals are narrow or time is up
arm      get one implementation ready for `sample`
sample   some samples of it: compare.py alternates between two processes with this
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from m2train.bench import env, registry
from m2train.bench.case import Case, CaseSpec, Skip
from m2train.bench.check import Checker, Guards
from m2train.bench.launch import Launch, arm, callable_of, input_bytes, launch, make_ring, prepare
from m2train.bench.memory import measure_memory
from m2train.bench.schema import Numerics
from m2train.bench.stats import half_width
from m2train.bench.timers import CallgrindTimer, GraphTimer, Timer, make_timer

CONVERGED = 0.005
"""Half-width of the median's interval at which sampling ends."""
MIN_ROUNDS = 5
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


@dataclass
class Bench:
    """A case that is open in this process."""

    spec: CaseSpec
    case: Case
    shape: str
    dtype: torch.dtype
    device: torch.device
    checkers: dict[str, Checker] = field(default_factory=dict)

    def checker(self, phase: str, guards: Guards | None = None) -> Checker:
        """The checker of a phase; the oracle is computed once."""
        if phase not in self.checkers:
            fresh = self.spec.make(self.shape, self.dtype, self.device, seed=1) if self.case.pure else self.case
            self.checkers[phase] = Checker(self.case, fresh, phase, guards)
        return self.checkers[phase]

    def check(self, name: str, phase: str) -> Numerics:
        """Check one implementation; one that raises is refused with its message."""
        try:
            return self.checker(phase).run(name)
        except Exception as err:  # noqa: BLE001  (whatever a candidate raises is its verdict)
            return Numerics(verdict="refused", reason=f"{type(err).__name__}: {' '.join(str(err).split())[:300]}")

    def ready(
        self, names: list[str], phase: str, cache: str, timer: Timer, min_sample_s: float, warmup_s: float
    ) -> Any:
        """(name -> Ready, note): warmed up, with enough launches a sample."""
        ring, note = make_ring(self.case, cache, env.cache_bytes(self.device))
        found = {}
        for name in names:
            launches = prepare(self.case, callable_of(self.case, name), ring, phase)
            found[name] = _warm(Ready(launches), timer, min_sample_s, warmup_s)
        return found, note


def _warm(one: Ready, timer: Timer, min_sample_s: float, warmup_s: float) -> Ready:
    """Run for `warmup_s`, then choose the launches of a sample."""
    if isinstance(timer, CallgrindTimer):
        for i in range(3):
            arm(one.launches[i : i + 1] or one.launches[:1])
            (one.launches[i : i + 1] or one.launches[:1])[0]()
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
            self.samples[name].append(self.timer.time(self.ready[name].take(whole)))

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
                if number >= MIN_ROUNDS:
                    if all(half_width(s) < CONVERGED for s in self.samples.values()):
                        return "converged"
                    if time.perf_counter() - start > budget_s or number >= MAX_ROUNDS:
                        return "budget"
        finally:
            gc.enable()


class Server:
    """Carries out requests."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.device = torch.device(config["device"])
        self.threads = int(config["threads"])
        torch.set_num_threads(self.threads)
        self.cases = Path(config["cases"])
        workload = Path(config["workload"]) if config.get("workload") else None
        self.specs = registry.load(self.cases, workload)
        self.timer = make_timer(config["timer"], self.device)
        self.bench: Bench | None = None
        self.armed: tuple[Ready, Timer] | None = None

    def hello(self) -> dict[str, Any]:
        return {"machine": env.machine(self.device), "build": env.build(self.cases), "pid": os.getpid()}

    def open(self, case: str, shape: str, dtype: str, seed: int = 0) -> dict[str, Any]:
        self.bench, self.armed = None, None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        spec = self.specs[case]
        kind = registry.dtype_of(dtype)
        try:
            built = spec.make(shape, kind, self.device, seed)
        except Skip as skip:
            return {"skip": str(skip)}
        self.bench = Bench(spec=spec, case=built, shape=shape, dtype=kind, device=self.device)
        return {"bytes": input_bytes(built.inputs), "cache": env.cache_bytes(self.device)}

    def choose(self, pattern: dict[str, str], suite: str) -> dict[str, Any]:
        case = self._open().case
        selector = registry.Selector(**pattern)
        runnable, skipped = registry.split_impls(case, selector, suite)
        phases = registry.split_phases(case, selector)
        return {
            "impls": runnable,
            "skipped": skipped,
            "phases": phases,
            "baseline": case.baseline,
            "ours": list(case.ours),
            "rotates": case.rotate and input_bytes(case.inputs) > 0,
            "cost": {phase: case.cost(phase) for phase in phases},
        }

    def check(self, phase: str, impls: list[str]) -> dict[str, Any]:
        bench = self._open()
        found = {}
        for name in impls:
            numerics = bench.check(name, phase)
            entry: dict[str, Any] = {"numerics": numerics.to_dict()}
            if numerics.verdict == "ok":
                memory = measure_memory(bench.case, callable_of(bench.case, name), phase, self.device)
                entry["memory"] = memory.to_dict()
            found[name] = entry
        return found

    def measure(
        self, phase: str, cache: str, impls: list[str], budget_s: float, warmup_s: float, min_sample_s: float
    ) -> dict[str, Any]:
        bench = self._open()
        if phase == "bwd" and not self.timer.bwd_alone:
            return {"skip": f"timer {self.timer.name} cannot time a backward without its forward"}
        before = env.gpu_state() if self.device.type == "cuda" else {}
        ready, note = bench.ready(impls, phase, cache, self.timer, min_sample_s, warmup_s)
        run = Measurement(ready, self.timer)
        counting = isinstance(self.timer, CallgrindTimer)
        stopped = run.run(budget_s * len(impls), 3 if counting else None)
        stale = {name: bench.checker(phase).stale(name) for name in impls}
        return {
            "samples": run.samples,
            "launches": {name: one.per_sample for name, one in ready.items()},
            "launch_us": {name: self._enqueue_us(one) for name, one in ready.items()},
            "stopped": stopped,
            "stale": {name: why for name, why in stale.items() if why},
            "unit": self.timer.unit,
            "note": note,
            "gpu": [before, env.gpu_state()] if before else [],
        }

    def _enqueue_us(self, one: Ready) -> float | None:
        """CUDA: what Python needs to enqueue a launch, with nothing waiting on the device."""
        if self.device.type != "cuda":
            return None
        picked = one.launches[:1]
        found = []
        for _ in range(20):
            arm(picked)
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            picked[0]()
            found.append((time.perf_counter_ns() - start) * 1e-3)
        torch.cuda.synchronize()
        return sorted(found)[len(found) // 2]

    def arm(
        self, phase: str, cache: str, impl: str, warmup_s: float, min_sample_s: float, per_sample: int | None = None
    ) -> dict[str, Any]:
        bench = self._open()
        ready, _ = bench.ready([impl], phase, cache, self.timer, min_sample_s, warmup_s)
        one = ready[impl]
        if per_sample is not None:
            one.per_sample = per_sample
        self.armed = (one, self.timer)
        gc.collect()
        gc.disable()
        return {"per_sample": one.per_sample}

    def sample(self, count: int) -> list[float]:
        assert self.armed is not None, "sample before arm"
        one, timer = self.armed
        return [timer.time(one.take(isinstance(timer, GraphTimer))) for _ in range(count)]

    def _open(self) -> Bench:
        assert self.bench is not None, "no case is open"
        return self.bench


def run_once(bench: Bench, phase: str, impl: str) -> None:
    """One launch for a profiler: first one outside of the range, for what is set up once."""
    fn = callable_of(bench.case, impl)
    ring, _ = make_ring(bench.case, "warm", 0)
    phase = "fwd" if phase == "fwd" else "both"
    launch(bench.case, fn, ring[0], phase)
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    with nvtx_range(f"{bench.spec.name}/{impl}/{bench.shape}/{phase}"):
        launch(bench.case, fn, ring[0], phase)
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        torch.cuda.profiler.stop()


class nvtx_range:  # noqa: N801  (used as a context manager only)
    """`name` as a push/pop range inside a start/end range `m2bench`, in the trainer's domain.

    Profilers filter by the outer range, whose name needs no escaping: ncu takes the slashes of the inner one for
    nesting.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._domain: Any = None
        self._outer: Any = None

    def __enter__(self) -> None:
        try:
            import nvtx
        except ImportError:
            return
        self._domain = nvtx.get_domain("m2")
        self._outer = self._domain.start_range(self._domain.get_event_attributes(message="m2bench"))
        self._domain.push_range(self._domain.get_event_attributes(message=self._name))

    def __exit__(self, *error: object) -> None:
        if self._domain is not None:
            self._domain.pop_range()
            self._domain.end_range(self._outer)


def serve() -> None:
    """Answer requests until stdin ends. What cases and libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server: Server | None = None
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        op = request.pop("op")
        if op == "quit":
            break
        try:
            if op == "start":
                server = Server(request)
                _answer(answers, server.hello())
            else:
                assert server is not None, "the first request is start"
                _answer(answers, getattr(server, op)(**request))
        except Exception as err:  # noqa: BLE001  (reported to the parent, which decides)
            traceback.print_exc()
            kind = "value" if isinstance(err, ValueError) else "error"
            _answer(answers, None, **{kind: f"{type(err).__name__}: {' '.join(str(err).split())[:500]}"})


def _answer(out: TextIO, result: Any, **problem: str) -> None:
    out.write(json.dumps({"result": result} | problem) + "\n")
    out.flush()
