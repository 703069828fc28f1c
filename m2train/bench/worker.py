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
from m2train.bench.case import Case, CaseSpec, Skip, SlowStart
from m2train.bench.check import Checker, Guards, check_phase
from m2train.bench.energy import counter, joules
from m2train.bench.launch import arm, as_leaves, callable_of, input_bytes, launch, make_ring, prepare
from m2train.bench.measurement import Measurement, Ready, warm
from m2train.bench.memory import measure_memory
from m2train.bench.schema import Numerics
from m2train.bench.timers import CallgrindTimer, GraphError, GraphTimer, Timer, make_timer


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
        """Check one implementation; one that raises is refused with its message. A ceiling is launched, no more."""
        try:
            if name in self.case.ceilings:
                fn, inputs = callable_of(self.case, name), as_leaves(self.case, self.case.inputs)
                launch(self.case, fn, inputs, check_phase(self.case, phase))
                return Numerics(
                    verdict="unchecked", reason="a ceiling: part of the work alone, no result of the case"
                )
            return self.checker(phase).run(name)
        except Exception as err:  # noqa: BLE001  (whatever a candidate raises is its verdict)
            return Numerics(verdict="refused", reason=brief(err))

    def ready(
        self, names: list[str], phase: str, cache: str, timer: Timer, min_sample_s: float, warmup_s: float
    ) -> Any:
        """(name -> Ready, note): warmed up, with enough launches a sample."""
        ring, note = make_ring(self.case, cache, env.cache_bytes(self.device))
        found = {}
        for name in names:
            launches = prepare(self.case, callable_of(self.case, name), ring, phase)
            compiles = self.device.type == "cuda" or isinstance(self.case.impls[name], SlowStart)
            found[name] = warm(Ready(launches), timer, min_sample_s, warmup_s, compiles=compiles)
        return found, note


class Server:
    """Carries out requests."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.device = torch.device(config["device"])
        self.threads = int(config["threads"])
        torch.set_num_threads(self.threads)
        self.neighbours: int | None = config.get("neighbours")
        self.cases = Path(config["cases"])
        self.workload = Path(config["workload"]) if config.get("workload") else None
        self.specs = registry.load(self.cases, self.workload)
        self.timer = make_timer(config["timer"], self.device)
        self.bench: Bench | None = None
        self.armed: tuple[Ready, Timer] | None = None

    def hello(self) -> dict[str, Any]:
        build = env.build(self.cases) | {"cases": env.digest(sorted(self.cases.glob("*.py")))}
        if self.workload is not None:
            build["workload"] = env.digest([self.workload])
        return {"machine": env.machine(self.device, self.neighbours), "build": build, "pid": os.getpid()}

    def open(self, case: str, shape: str, dtype: str, seed: int = 0) -> dict[str, Any]:
        self.bench, self.armed = None, None
        gc.collect()
        self._release()
        spec = self.specs[case]
        kind = registry.dtype_of(dtype)
        try:
            built = spec.make(shape, kind, self.device, seed)
        except Skip as skip:
            return {"skip": str(skip)}
        except Exception as err:  # noqa: BLE001  (a case that cannot be built must not end the run)
            traceback.print_exc()
            return {"failed": f"the case cannot be built: {brief(err)}"}
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
            "ceilings": list(case.ceilings),
            "rotates": case.rotate and input_bytes(case.inputs) > 0,
            "cost": {phase: case.cost(phase) for phase in phases},
        }

    def check(self, phase: str, impls: list[str]) -> dict[str, Any]:
        bench = self._open()
        found = {}
        self._release()
        for name in impls:
            numerics = bench.check(name, phase)
            entry: dict[str, Any] = {"numerics": numerics.to_dict()}
            if numerics.verdict == "ok":
                memory = measure_memory(bench.case, callable_of(bench.case, name), phase, self.device)
                entry["memory"] = memory.to_dict()
            elif numerics.verdict == "refused" and self._lost():
                return {"lost": name, "reason": f"it broke the CUDA context: {numerics.reason}"}
            found[name] = entry
            self._release()
        return found

    def _release(self) -> None:
        """Hand cached memory back: the processes beside this one have the same GPU, and are measured next."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _lost(self) -> bool:
        """Whether nothing runs on the GPU any more in this process: an illegal access is one for all who follow."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize()
            return bool(torch.ones(1, device=self.device).item() != 1.0)
        except RuntimeError:
            return True

    def measure(self, phase: str, impls: list[str], *, timer: str | None = None, **how: Any) -> dict[str, Any]:
        """Time some implementations by one clock: `timer`, or the one asked for, or what the case or they need.

        An implementation that no CUDA graph can hold would be missing, or have another clock than those beside it.
        """
        bench = self._open()
        chosen = self.timer if timer is None else make_timer(timer, self.device)
        if timer is None and isinstance(chosen, GraphTimer) and bench.case.cuda_timer != "graph":
            chosen = make_timer(bench.case.cuda_timer, self.device)
        note = ""
        try:
            found = self._measured(chosen, phase, impls, **how)
        except GraphError as err:
            if timer is not None:
                raise
            torch.cuda.synchronize()
            chosen, note = make_timer("events", self.device), f"{err}: events for all that are compared with it"
            found = self._measured(chosen, phase, impls, **how)
        self._release()
        found["note"] = "; ".join(filter(None, [found.get("note"), note]))
        return found | {"timer": chosen.name}

    def _measured(
        self,
        timer: Timer,
        phase: str,
        impls: list[str],
        *,
        cache: str,
        budget_s: float,
        warmup_s: float,
        min_sample_s: float,
        energy_s: float = 0.0,
        stale: bool = True,
    ) -> dict[str, Any]:
        bench = self._open()
        if phase == "bwd" and not timer.bwd_alone:
            return {"skip": f"timer {timer.name} cannot time a backward without its forward"}
        ready, note = bench.ready(impls, phase, cache, timer, min_sample_s, warmup_s)
        run = Measurement(ready, timer)
        try:
            stopped = run.run(budget_s * len(impls), 3 if isinstance(timer, CallgrindTimer) else None)
        finally:
            timer.forget()
        checked = [name for name in impls if name not in bench.case.ceilings]
        late = {name: bench.checker(phase).stale(name) for name in checked} if stale else {}
        return {
            "samples": run.samples,
            "launches": {name: one.per_sample for name, one in ready.items()},
            "launch_us": {name: self._enqueue_us(one) for name, one in ready.items()},
            "energy_j": {name: self._joules(one, energy_s) for name, one in ready.items()} if energy_s else {},
            "stopped": stopped,
            "stale": {name: why for name, why in late.items() if why},
            "unit": timer.unit,
            "note": note,
            "gpu": {name: self._state_under(one) for name, one in ready.items()},
        }

    def _state_under(self, one: Ready) -> dict[str, Any]:
        """CUDA: clocks, power and temperature under this load, read after its timing, not to disturb it."""
        if self.device.type != "cuda":
            return {}

        def busy() -> None:
            arm(one.launches[:1])
            one.launches[0]()
            torch.cuda.synchronize()

        return env.gpu_state(busy)

    def _joules(self, one: Ready, seconds: float) -> float | None:
        """CUDA: energy of a launch, where NVML counts it. A forward that bwd needs would be counted too."""
        read, _ = counter(self.device)
        if read is None or not all(callable(x) and not hasattr(x, "arm") for x in one.launches):
            return None

        def launch() -> None:
            for run in one.launches:
                run()
            torch.cuda.synchronize()

        whole = joules(launch, read, seconds)
        return None if whole is None else whole / len(one.launches)

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
        self,
        phase: str,
        cache: str,
        impl: str,
        warmup_s: float,
        min_sample_s: float,
        per_sample: int | None = None,
        cores: list[int] | None = None,
    ) -> dict[str, Any]:
        bench = self._open()
        if cores is not None:
            env.pin(cores)
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
            # Elsewhere a ValueError is a mistake of the case, not of who started the run.
            kind = "value" if isinstance(err, ValueError) and op in ("start", "choose") else "error"
            _answer(answers, None, **{kind: brief(err)})


def brief(err: Exception) -> str:
    """An exception on one line."""
    return f"{type(err).__name__}: {' '.join(str(err).split())[:500]}"


def _answer(out: TextIO, result: Any, **problem: str) -> None:
    out.write(json.dumps({"result": result} | problem) + "\n")
    out.flush()
