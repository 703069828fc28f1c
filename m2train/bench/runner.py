"""Check, then time, then a row: several processes, one group of implementations after another."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m2train.bench import ceilings as ceiling_store
from m2train.bench import env, registry, stats
from m2train.bench.case import CaseSpec
from m2train.bench.ceilings import Ceilings, physics
from m2train.bench.pool import Worker, WorkerConfig, WorkerError, workers
from m2train.bench.registry import Selector
from m2train.bench.schema import Identity, Memory, Numerics, Ratio, Row, Timing, row_id

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much effort a suite is worth."""

    processes: int
    seconds: float
    """Of sampling, per implementation and process."""
    warmup_s: float
    min_sample_s: float = 1e-3


BUDGETS = {
    "smoke": Budget(processes=2, seconds=0.3, warmup_s=0.2),
    "paper": Budget(processes=3, seconds=1.5, warmup_s=0.2),
    "nightly": Budget(processes=5, seconds=5.0, warmup_s=0.5),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What `m2bench run` was asked for."""

    cases: Path
    patterns: tuple[str, ...] = ()
    suite: str = "paper"
    device: str = "cpu"
    timer: str = "cpu"
    cache: str = "cold"
    """cold | warm | both"""
    threads: int = 1
    dtype: str | None = None
    """None: those of the case (its first one in suite smoke)."""
    workload: Path | None = None
    ceilings: Path = field(default_factory=ceiling_store.default_file)
    calibrate: bool = True
    """Measure the machine's ceilings when the file has none."""
    processes: int | None = None
    seconds: float | None = None

    @property
    def budget(self) -> Budget:
        """That of the suite, with what was set."""
        base = BUDGETS[self.suite]
        return Budget(
            processes=self.processes or base.processes,
            seconds=self.seconds or base.seconds,
            warmup_s=base.warmup_s,
            min_sample_s=base.min_sample_s,
        )

    def config(self) -> WorkerConfig:
        """Of its workers."""
        return WorkerConfig(
            cases=self.cases, device=self.device, timer=self.timer, threads=self.threads, workload=self.workload
        )


def run(options: RunOptions, say: Say) -> Iterator[Row]:
    """Rows as they are measured, skipped and refused ones among them.

    Raises:
        ValueError: what was asked for does not exist.
        WorkerError: a measuring process died.
    """
    specs = registry.load(options.cases, options.workload)
    jobs = registry.select(specs, options.patterns, options.suite)
    device = torch.device(options.device)
    with workers([options.config()] * options.budget.processes) as pool:
        facts = pool[0].facts
        found = _ceilings(options, device, facts["machine"]["id"], say)
        for spec, shape, selector in jobs:
            for dtype in _dtypes(spec, options):
                yield from _Group(options, pool, found, spec, shape, dtype, selector, say).rows()


def _dtypes(spec: CaseSpec, options: RunOptions) -> list[str]:
    if options.dtype is not None:
        return [options.dtype]
    chosen = spec.dtypes[:1] if options.suite == "smoke" else spec.dtypes
    return [registry.dtype_name(dtype) for dtype in chosen]


def _ceilings(options: RunOptions, device: torch.device, machine_id: str, say: Say) -> Ceilings | None:
    if options.timer == "callgrind":
        return None
    found = ceiling_store.stored(options.ceilings, machine_id, device, options.threads)
    if found is None and options.calibrate:
        say(f"measuring this machine's ceilings, once, for {options.ceilings}")
        found = ceiling_store.measure(device, options.threads)
        ceiling_store.store(options.ceilings, machine_id, device, options.threads, found)
    return found


class _Group:
    """A case at one shape and dtype, in all of its phases."""

    def __init__(
        self,
        options: RunOptions,
        pool: list[Worker],
        found: Ceilings | None,
        spec: CaseSpec,
        shape: str,
        dtype: str,
        selector: Selector,
        say: Say,
    ) -> None:
        self.options, self.pool, self.ceilings, self.say = options, pool, found, say
        self.spec, self.shape, self.dtype, self.selector = spec, shape, dtype, selector
        self.machine, self.build = pool[0].facts["machine"], pool[0].facts["build"]
        self.opened: dict[str, Any] = {}
        self.ours: list[str] = []

    def rows(self) -> Iterator[Row]:
        """Of every phase, cache state and implementation."""
        self.say(f"{self.spec.name} {self.shape} {self.dtype}")
        opened = [worker.ask("open", case=self.spec.name, shape=self.shape, dtype=self.dtype) for worker in self.pool]
        self.opened = opened[0]
        if "skip" in self.opened:
            phase = self.selector.phase if self.selector.phase in ("fwd", "bwd", "both") else "fwd"
            yield self._row("*", phase, self._caches(True)[0], "skipped", reason=self.opened["skip"])
            return
        chosen = self.choose()
        for phase in chosen["phases"]:
            self.say(f"{self.spec.name} {self.shape} {self.dtype} {phase}: checking")
            checked = self.pool[0].ask("check", phase=phase, impls=chosen["impls"])
            good = [name for name in chosen["impls"] if checked[name]["numerics"]["verdict"] == "ok"]
            for cache in self._caches(chosen["rotates"]):
                for name, reason in chosen["skipped"].items():
                    yield self._row(name, phase, cache, "skipped", reason=reason)
                for name in chosen["impls"]:
                    if name not in good:
                        numerics = Numerics.from_dict(checked[name]["numerics"])
                        yield self._row(name, phase, cache, "refused", reason=numerics.reason, numerics=numerics)
                yield from self._timed(chosen, phase, cache, good, checked)

    def choose(self) -> dict[str, Any]:
        """What the selection means for the case that is open."""
        chosen: dict[str, Any] = self.pool[0].ask("choose", pattern=asdict(self.selector), suite=self.options.suite)
        self.ours = chosen["ours"]
        return chosen

    def _caches(self, rotates: bool) -> list[str]:
        if not rotates:
            return ["warm"]
        return ["cold", "warm"] if self.options.cache == "both" else [self.options.cache]

    def _timed(
        self, chosen: dict[str, Any], phase: str, cache: str, good: list[str], checked: dict[str, Any]
    ) -> Iterator[Row]:
        if not good:
            return
        budget = self.options.budget
        answers = []
        for number, worker in enumerate(self.pool):
            self.say(f"{self.spec.name} {self.shape} {phase} {cache}: process {number + 1} of {len(self.pool)}")
            answer = worker.ask(
                "measure",
                phase=phase,
                cache=cache,
                impls=good,
                budget_s=budget.seconds,
                warmup_s=budget.warmup_s,
                min_sample_s=budget.min_sample_s,
            )
            if "skip" in answer:
                for name in good:
                    yield self._row(name, phase, cache, "skipped", reason=answer["skip"])
                return
            answers.append(answer)
        states = [state for answer in answers for state in answer["gpu"]]
        for name in good:
            numerics = Numerics.from_dict(checked[name]["numerics"])
            late = next((answer["stale"][name] for answer in answers if name in answer["stale"]), None)
            if late is not None:
                numerics.verdict, numerics.reason = "refused", f"after timing: {late}"
                yield self._row(name, phase, cache, "refused", reason=numerics.reason, numerics=numerics)
                continue
            baseline = chosen["baseline"] if chosen["baseline"] in good else None
            timing = make_timing(name, baseline, answers)
            row = self._row(name, phase, cache, "ok", timing=timing, numerics=numerics)
            row.memory = Memory.from_dict(checked[name]["memory"])
            moved, flops = chosen["cost"][phase]
            row.physics = physics(
                moved,
                flops,
                self.ceilings,
                seconds=timing.median if timing.unit == "s" else None,
                dtype=self.dtype,
                timer=self.options.timer,
                in_cache=cache == "warm" and self.opened["bytes"] < self.opened["cache"] / 2,
                threads=self.options.threads,
            )
            if states:
                row.machine = row.machine | {"during": env.spread(states)}
            yield row

    def _row(self, impl: str, phase: str, cache: str, status: str, **parts: Any) -> Row:
        options = self.options
        identity = Identity(
            case=self.spec.name,
            impl=impl,
            shape=self.shape,
            dtype=self.dtype,
            phase=phase,  # type: ignore[arg-type]
            cache=cache,  # type: ignore[arg-type]
            timer=options.timer,
            device=options.device,
            threads=options.threads,
        )
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        return Row(
            id=row_id(identity, created, self.machine["id"]),
            created=created,
            status=status,  # type: ignore[arg-type]
            ours=impl in self.ours,
            identity=identity,
            machine=self.machine,
            build=self.build,
            repro=repro_command(identity, options),
            **parts,
        )


def make_timing(name: str, baseline: str | None, answers: list[dict[str, Any]]) -> Timing:
    """The timing part of a row from what each process measured."""
    samples = [answer["samples"][name] for answer in answers]
    pooled = stats.flat(samples)
    low, high = stats.bootstrap_median(samples)
    p10, median, p90 = (float(q) for q in np.quantile(pooled, [0.1, 0.5, 0.9]))
    ratio = None
    if baseline is not None and baseline != name:
        below = [answer["samples"][baseline] for answer in answers]
        value, least, most = stats.bootstrap_ratio(samples, below)
        ratio = Ratio(to=baseline, value=value, low=least, high=most)
    return Timing(
        unit=answers[0]["unit"],
        median=median,
        low=min(low, median),
        high=max(high, median),
        p10=p10,
        p90=p90,
        samples=[[float(f"{x:.5g}") for x in one] for one in samples],
        launches=answers[0]["launches"][name],
        processes=len(samples),
        stopped="converged" if all(answer["stopped"] == "converged" for answer in answers) else "budget",
        launch_us=answers[0]["launch_us"][name],
        ratio=ratio,
        note=answers[0]["note"],
    )


def repro_command(identity: Identity, options: RunOptions) -> str:
    """The command line that measures a row again."""
    i = identity
    words = ["m2bench", "run", f"{i.case}/{i.impl}/{i.shape}/{i.phase}", "--suite", options.suite]
    words += ["--device", i.device, "--dtype", i.dtype, "--timer", i.timer, "--cache", i.cache]
    words += ["--threads", str(i.threads), "--processes", str(options.budget.processes)]
    if options.workload is not None:
        words += ["--workload", str(options.workload)]
    return shlex.join(words)


def check(options: RunOptions, say: Say) -> Iterator[Row]:
    """Numerics only: the same rows without times.

    Raises:
        ValueError, WorkerError: as `run`.
    """
    specs = registry.load(options.cases, options.workload)
    jobs = registry.select(specs, options.patterns, options.suite)
    with workers([options.config()]) as pool:
        for spec, shape, selector in jobs:
            for dtype in _dtypes(spec, options):
                group = _Group(options, pool, None, spec, shape, dtype, selector, say)
                yield from _checked(group)


def _checked(group: _Group) -> Iterator[Row]:
    worker = group.pool[0]
    group.say(f"{group.spec.name} {group.shape} {group.dtype}")
    opened = worker.ask("open", case=group.spec.name, shape=group.shape, dtype=group.dtype)
    if "skip" in opened:
        yield group._row("*", "fwd", "warm", "skipped", reason=opened["skip"])
        return
    chosen = group.choose()
    for phase in chosen["phases"]:
        for name, reason in chosen["skipped"].items():
            yield group._row(name, phase, "warm", "skipped", reason=reason)
        for name, entry in worker.ask("check", phase=phase, impls=chosen["impls"]).items():
            numerics = Numerics.from_dict(entry["numerics"])
            status = "ok" if numerics.verdict == "ok" else "refused"
            memory = Memory.from_dict(entry.get("memory", {}))
            yield group._row(name, phase, "warm", status, reason=numerics.reason, numerics=numerics, memory=memory)


__all__ = ["BUDGETS", "Budget", "RunOptions", "WorkerError", "check", "make_timing", "repro_command", "run"]
