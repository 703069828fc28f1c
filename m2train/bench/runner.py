"""Check, then time, then a row: several processes, one group of implementations after another."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m2train.bench import ceilings as ceiling_store
from m2train.bench import env, registry, stats
from m2train.bench.case import CaseSpec
from m2train.bench.ceilings import Ceilings, physics
from m2train.bench.memory import with_share
from m2train.bench.pool import Pool, WorkerConfig, WorkerError
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
    energy_s: float = 0.0
    """CUDA: of repeating an implementation for its energy."""


BUDGETS = {
    "smoke": Budget(processes=3, seconds=0.1, warmup_s=0.1),
    "paper": Budget(processes=5, seconds=1.0, warmup_s=0.2, energy_s=0.4),
    "nightly": Budget(processes=8, seconds=5.0, warmup_s=0.5, energy_s=1.0),
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
    minutes: float | None = None
    """None: no limit. What is not begun by then becomes rows that say so; most wanted shapes come first."""

    @property
    def budget(self) -> Budget:
        """That of the suite, with what was set."""
        base = BUDGETS[self.suite]
        return replace(base, processes=self.processes or base.processes, seconds=self.seconds or base.seconds)

    def config(self) -> WorkerConfig:
        """Of its workers."""
        return WorkerConfig(
            cases=self.cases,
            device=self.device,
            timer=self.timer,
            threads=self.threads,
            workload=self.workload,
            neighbours=env.others() if self.device == "cuda" else None,
        )


def run(options: RunOptions, say: Say) -> Iterator[Row]:
    """Rows as they are measured, skipped and refused ones among them.

    Raises:
        ValueError: what was asked for does not exist.
        WorkerError: a measuring process died.
    """
    start = time.monotonic()
    specs = registry.load(options.cases, options.workload)
    jobs = [
        (spec, shape, dtype, selector)
        for spec, shape, selector in registry.select(specs, options.patterns, options.suite)
        for dtype in _dtypes(spec, options)
    ]
    if options.minutes is not None:
        jobs = _most_wanted_first(jobs)
    device = torch.device(options.device)
    with Pool(options.config(), options.budget.processes) as pool:
        found = _ceilings(options, device, pool.workers[0].facts["machine"]["id"], say)
        for spec, shape, dtype, selector in jobs:
            group = _Group(options, pool, found, spec, shape, dtype, selector, say)
            if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
                yield group.whole("skipped", f"not begun: the {options.minutes:g} minutes of --minutes were over")
                continue
            try:
                yield from group.rows()
            except WorkerError as err:
                yield group.whole("refused", f"a measuring process broke, others were started: {err}")
                pool.restart()


_Job = tuple[CaseSpec, str, str, Selector]


def _most_wanted_first(jobs: list[_Job]) -> list[_Job]:
    """First dtypes before second ones; shapes that a case wants first before the others; cases in turn."""
    seen: dict[tuple[str, str], int] = {}
    ranked = []
    for job in jobs:
        spec, shape, dtype, _ = job
        number = seen[spec.name, dtype] = seen.get((spec.name, dtype), -1) + 1
        first = spec.first.index(shape) if shape in spec.first else len(spec.first) + number
        ranked.append((dtype != registry.dtype_name(spec.dtypes[0]), first, job))
    return [job for *_, job in sorted(ranked, key=lambda entry: entry[:2])]


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
        pool: Pool,
        found: Ceilings | None,
        spec: CaseSpec,
        shape: str,
        dtype: str,
        selector: Selector,
        say: Say,
    ) -> None:
        self.options, self.pool, self.ceilings, self.say = options, pool, found, say
        self.spec, self.shape, self.dtype, self.selector = spec, shape, dtype, selector
        self.machine, self.build = pool.workers[0].facts["machine"], pool.workers[0].facts["build"]
        self.opened: dict[str, Any] = {}
        self.ours: list[str] = []
        self.unchecked: list[str] = []
        self.lost: dict[str, str] = {}
        """Implementations that took a process's GPU with them."""

    def rows(self) -> Iterator[Row]:
        """Of every phase, cache state and implementation."""
        self.say(f"{self.spec.name} {self.shape} {self.dtype}")
        if not self.open():
            yield self.whole(*self.closed())
            return
        chosen = self.choose()
        for phase in chosen["phases"]:
            checked = self._checked(chosen, phase)
            good = [name for name, entry in checked.items() if entry["numerics"]["verdict"] != "refused"]
            for cache in self._caches(chosen["rotates"]):
                for name, reason in chosen["skipped"].items():
                    yield self._row(name, phase, cache, "skipped", reason=reason)
                for name in chosen["impls"]:
                    if name not in good:
                        entry = checked.get(
                            name, {"numerics": {"verdict": "refused", "reason": self.lost.get(name, "")}}
                        )
                        numerics = Numerics.from_dict(entry["numerics"])
                        yield self._row(name, phase, cache, "refused", reason=numerics.reason, numerics=numerics)
                yield from self._timed(chosen, phase, cache, good, checked)

    def open(self) -> bool:
        """Build the case in every process; False if it has no rows here."""
        answers = self.pool.ask("open", case=self.spec.name, shape=self.shape, dtype=self.dtype)
        self.opened = next((answer for answer in answers if "skip" in answer or "failed" in answer), answers[0])
        return "bytes" in self.opened

    def closed(self) -> tuple[str, str]:
        """Status and reason of a case that has no rows here."""
        return ("skipped", self.opened["skip"]) if "skip" in self.opened else ("refused", self.opened["failed"])

    def whole(self, status: str, reason: str) -> Row:
        """One row that stands for all implementations."""
        phase = self.selector.phase if self.selector.phase in ("fwd", "bwd", "both") else "fwd"
        return self._row("*", phase, self._caches(True)[0], status, reason=reason)

    def _checked(self, chosen: dict[str, Any], phase: str) -> dict[str, Any]:
        """Numerics by implementation; those in `lost` are left out, after whom all processes were started anew."""
        while True:
            self.say(f"{self.spec.name} {self.shape} {self.dtype} {phase}: checking")
            names = [name for name in chosen["impls"] if name not in self.lost]
            found: dict[str, Any] = self.pool.workers[0].ask("check", phase=phase, impls=names)
            if "lost" not in found:
                return found
            self.lost[found["lost"]] = found["reason"]
            self.pool.restart()
            self.open()
            self.choose()

    def numerics(self) -> Iterator[Row]:
        """As `rows`, without times."""
        self.say(f"{self.spec.name} {self.shape} {self.dtype}")
        if not self.open():
            yield self.whole(*self.closed())
            return
        chosen = self.choose()
        for phase in chosen["phases"]:
            for name, reason in chosen["skipped"].items():
                yield self._row(name, phase, "warm", "skipped", reason=reason)
            checked = self._checked(chosen, phase)
            for name, entry in checked.items():
                numerics, memory = Numerics.from_dict(entry["numerics"]), _memory(checked, name, chosen["baseline"])
                status = {"ok": "ok", "unchecked": "skipped"}.get(numerics.verdict, "refused")
                yield self._row(name, phase, "warm", status, reason=numerics.reason, numerics=numerics, memory=memory)
            for name in self.lost.keys() & set(chosen["impls"]):
                yield self._row(name, phase, "warm", "refused", reason=self.lost[name])

    def choose(self) -> dict[str, Any]:
        """What the selection means for the case that is open."""
        chosen: dict[str, Any] = self.pool.workers[0].ask(
            "choose", pattern=asdict(self.selector), suite=self.options.suite
        )
        self.ours, self.unchecked = chosen["ours"], chosen["ceilings"]
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
        answers: list[dict[str, Any]] = []
        for number, worker in enumerate(self.pool.workers):
            self.say(f"{self.spec.name} {self.shape} {phase} {cache}: process {number + 1} of {budget.processes}")
            answer = worker.ask(
                "measure",
                phase=phase,
                cache=cache,
                impls=good,
                timer=answers[0]["timer"] if answers else None,
                budget_s=budget.seconds,
                warmup_s=budget.warmup_s,
                min_sample_s=budget.min_sample_s,
                # The process that has the oracle, and one that need not be repeated for an interval.
                stale=not answers,
                energy_s=0.0 if answers else budget.energy_s,
            )
            if "skip" in answer:
                for name in good:
                    yield self._row(name, phase, cache, "skipped", reason=answer["skip"])
                return
            answers.append(answer)
        timer = answers[0]["timer"]
        for name in good:
            numerics = Numerics.from_dict(checked[name]["numerics"])
            late = answers[0]["stale"].get(name)
            if late is not None:
                numerics.verdict, numerics.reason = "refused", f"after timing: {late}"
                yield self._row(name, phase, cache, "refused", reason=numerics.reason, numerics=numerics, timer=timer)
                continue
            baseline = chosen["baseline"] if chosen["baseline"] in good else None
            others = [one for one in good if one not in self.ours] if name in self.ours else []
            timing = make_timing(name, baseline, answers, others, self.unchecked)
            row = self._row(name, phase, cache, "ok", timing=timing, numerics=numerics, timer=timer)
            row.memory = _memory(checked, name, chosen["baseline"])
            moved, flops = chosen["cost"][phase]
            row.physics = physics(
                moved,
                flops,
                self.ceilings,
                seconds=timing.median if timing.unit == "s" else None,
                dtype=self.dtype,
                timer=timer,
                in_cache=cache == "warm" and self.opened["bytes"] < self.opened["cache"] / 2,
                threads=self.options.threads,
            )
            row.physics.energy_j = answers[0]["energy_j"].get(name)
            states = [answer["gpu"][name] for answer in answers if answer["gpu"][name]]
            if states:
                row.machine = row.machine | {"during": env.spread(states)}
            yield row

    def _row(self, impl: str, phase: str, cache: str, status: str, *, timer: str | None = None, **parts: Any) -> Row:
        options = self.options
        identity = Identity(
            case=self.spec.name,
            impl=impl,
            shape=self.shape,
            dtype=self.dtype,
            phase=phase,  # type: ignore[arg-type]
            cache=cache,  # type: ignore[arg-type]
            timer=timer or options.timer,
            device=options.device,
            threads=options.threads,
        )
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        return Row(
            id=row_id(identity, created, self.machine["id"]),
            created=created,
            status=status,  # type: ignore[arg-type]
            ours=impl in self.ours,
            ceiling=impl in self.unchecked,
            identity=identity,
            machine=self.machine,
            build=self.build,
            repro=repro_command(identity, options),
            **parts,
        )


def _memory(checked: dict[str, Any], name: str, baseline: str) -> Memory:
    """Of one implementation, beside the baseline's."""
    found, base = (Memory.from_dict(checked.get(which, {}).get("memory", {})) for which in (name, baseline))
    return with_share(found, base if name != baseline else None)


def make_timing(
    name: str,
    baseline: str | None,
    answers: list[dict[str, Any]],
    others: Sequence[str] = (),
    ceilings: Sequence[str] = (),
) -> Timing:
    """The timing part of a row from what each process measured; `others` are further ones to be compared with."""
    samples = [answer["samples"][name] for answer in answers]
    pooled = stats.flat(samples)
    low, high = stats.bootstrap_median(samples)
    p10, median, p90 = (float(q) for q in np.quantile(pooled, [0.1, 0.5, 0.9]))

    def over(other: str) -> Ratio:
        value, least, most = stats.bootstrap_ratio(samples, [answer["samples"][other] for answer in answers])
        return Ratio(to=other, value=value, low=least, high=most, ceiling=other in ceilings)

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
        ratio=over(baseline) if baseline not in (None, name) else None,
        others=[over(other) for other in others if other not in (name, baseline)],
        note=answers[0]["note"],
    )


def repro_command(identity: Identity, options: RunOptions) -> str:
    """The command line that measures a row again."""
    i = identity
    words = ["m2bench", "run", f"{i.case}/{i.impl}/{i.shape}/{i.phase}", "--suite", options.suite]
    words += ["--device", i.device, "--dtype", i.dtype, "--timer", i.timer, "--cache", i.cache]
    words += ["--threads", str(i.threads), "--processes", str(options.budget.processes)]
    words += ["--seconds", f"{options.budget.seconds:g}"]
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
    with Pool(options.config(), 1) as pool:
        for spec, shape, selector in jobs:
            for dtype in _dtypes(spec, options):
                group = _Group(options, pool, None, spec, shape, dtype, selector, say)
                try:
                    yield from group.numerics()
                except WorkerError as err:
                    yield group.whole("refused", f"the process broke, another was started: {err}")
                    pool.restart()


__all__ = ["BUDGETS", "Budget", "RunOptions", "WorkerError", "check", "make_timing", "repro_command", "run"]
