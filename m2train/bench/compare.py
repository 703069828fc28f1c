"""A against B: the same rows on two commits, or in two row files, with a verdict for each.

Two commits: each is built; pairs of processes, one of each side, are alive at a time, and launches alternate
between them A B B A, so that whatever the machine does to one side it does to the other. On a CPU both run on the
same core, the next one for each pair: neighbours slow one core of a shared machine and not the other (three rows, 8
pairs, a busy hour: detection limits of 5 to 12 %, of processes left free 21 to 35 %). The unit of the interval is
the pair: processes differ from each other by several percent for reasons of their own (memory layout above all),
which no number of launches in one of them averages out. Harness and cases are those of this checkout for both
sides.

Two files: medians of processes that ran apart in time (Welch); coarser, and the limit says so.

The level of the intervals is corrected for the number of rows: a comparison of equal code calls any of its rows
FASTER or SLOWER with probability 0.05 at most.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from m2train.bench import registry, stats
from m2train.bench.build import Build, build
from m2train.bench.pool import Worker, WorkerConfig, workers
from m2train.bench.registry import Selector
from m2train.bench.report.select import latest, short
from m2train.bench.rows import read_rows
from m2train.bench.schema import Row
from m2train.bench.stats import Judgement

Say = Callable[[str], None]
SECONDS = 0.6
"""Of sampling, per row and pair."""
MIN_SAMPLE_S = 1e-3
WARMUP_S = 0.15
MIN_QUADS, MAX_QUADS = 6, 100
MORE = 3
"""How many times the pairs a row may get until its detection limit is what was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions:
    """What `m2bench compare` was asked for."""

    cases: Path
    patterns: tuple[str, ...] = ()
    device: str = "cpu"
    timer: str = "cpu"
    cache: str = "warm"
    threads: int = 1
    pairs: int = 8
    margin: float = 0.03
    limit: float = 0.1
    """Rows that would hide a slowdown of this size get more pairs. Their spread alone decides, never the verdict: to
    stop at the first SLOWER would find one sooner or later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The verdict on a row."""

    name: str
    judgement: Judgement
    ratios: list[float] = field(default_factory=list)
    """Of each pair of processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What was found."""

    a: str
    b: str
    how: str
    lines: list[Line]
    broken: list[str] = field(default_factory=list)
    """Rows that are wrong on B, or that A has and B has lost, with the reason: none of them may pass a gate."""
    notes: list[str] = field(default_factory=list)
    """Others that were not compared, with the reason: skipped on both sides, new on B, or wrong on A alone."""

    @property
    def regressed(self) -> bool:
        """Whether B is worse than A somewhere: a row is SLOWER, wrong or lost."""
        return bool(self.broken) or any(line.judgement.verdict == "SLOWER" for line in self.lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    case: str
    shape: str
    dtype: str
    impl: str
    phase: str
    cache: str

    @property
    def name(self) -> str:
        return f"{self.case}/{self.impl}/{self.shape}/{self.phase} {self.dtype} {self.cache}"


def both_files(a: str, b: str) -> bool:
    """Whether both sides are row files (or folders of them).

    Raises:
        ValueError: one is, the other is not.
    """
    found = [
        Path(side).suffix == ".jsonl" or (Path(side).is_dir() and any(Path(side).rglob("*.jsonl"))) for side in (a, b)
    ]
    if found[0] != found[1]:
        raise ValueError(f"{a} and {b}: one is a row file, the other is not; compare two files, or two commits")
    return found[0]


def compare(a: str, b: str, options: CompareOptions, say: Say) -> Comparison:
    """Compare two commits or two row files.

    Raises:
        ValueError: a side, or a row that was asked for, is not there.
        WorkerError: a measuring process died.
    """
    if both_files(a, b):
        return _compare_files(a, b, options)
    return _compare_builds(build(a, options.cases, say), build(b, options.cases, say), options, say)


# ------------------------------------------------------------------------------------------------- two builds


def _compare_builds(a: Build, b: Build, options: CompareOptions, say: Say) -> Comparison:
    configs = [
        WorkerConfig(
            cases=options.cases,
            device=options.device,
            timer=options.timer,
            threads=options.threads,
            site=side.site,
        )
        for side in (a, b)
    ]
    logs: dict[str, list[float]] = {}
    broken: dict[str, str] = {}
    notes: dict[str, str] = {}
    places: list[_Place] | None = None
    for pair in range(MORE * options.pairs):
        wanted = None if places is None else [p for p in places if p.name in logs]
        if wanted is not None and pair >= options.pairs:
            wanted = [p for p in wanted if _judge(logs[p.name], len(logs), options).limit > options.limit]
        if wanted == []:
            break
        say(
            f"pair {pair + 1} of {options.pairs}"
            + (f", {len(wanted)} noisy rows" if wanted and pair >= options.pairs else "")
        )
        order = (0, 1) if pair % 2 == 0 else (1, 0)  # neither side is always the one that started first
        with workers([configs[i] for i in order]) as started:
            sides = [started[order.index(0)], started[order.index(1)]]
            if wanted is None:
                places = wanted = _places(sides, options, broken, notes)
            for place in wanted:
                cores = _cores(pair, options)
                logs.setdefault(place.name, []).append(_pair_ratio(sides, place, options, cores))
    lines = [
        Line(name=name, judgement=_judge(x, len(logs), options), ratios=[round(math.exp(one), 4) for one in x])
        for name, x in logs.items()
    ]
    how = (
        f"{options.pairs} pairs of processes, up to {MORE * options.pairs} for rows with a limit above "
        f"{100 * options.limit:g} %; launches alternating A B B A, timer {options.timer}"
    )
    return Comparison(
        a=f"{a.ref} ({a.sha[:10]})",
        b=f"{b.ref} ({b.sha[:10]})",
        how=how,
        lines=lines,
        broken=[f"{name}: {reason}" for name, reason in broken.items()],
        notes=[f"{name}: {reason}" for name, reason in notes.items()],
    )


def _judge(logs: Sequence[float], rows: int, options: CompareOptions) -> Judgement:
    return stats.judge_pairs(logs, rows=rows, margin=options.margin)


def _places(
    sides: list[Worker], options: CompareOptions, broken: dict[str, str], notes: dict[str, str]
) -> list[_Place]:
    """The rows to compare; those that cannot be go into `broken` or `notes`."""
    found, nowhere = [], 0
    for spec, shape, selector in registry.select(registry.load(options.cases), options.patterns, "smoke"):
        dtype = registry.dtype_name(spec.dtypes[0])
        opened = [side.ask("open", case=spec.name, shape=shape, dtype=dtype) for side in sides]
        closed = [answer.get("skip") or answer.get("failed") for answer in opened]
        if any(closed):
            nowhere += all(closed)
            into, reason = (broken, f"lost on side B: {closed[1]}") if not closed[0] else (notes, str(closed[0]))
            into[f"{spec.name}/{shape}"] = reason if closed[1] else f"new on side B; on side A: {reason}"
            continue
        chosen = [side.ask("choose", pattern=asdict(selector), suite="smoke") for side in sides]
        for phase in chosen[0]["phases"]:
            for impl in _impls(chosen, selector):
                place = _Place(
                    case=spec.name,
                    shape=shape,
                    dtype=dtype,
                    impl=impl,
                    phase=phase,
                    cache=options.cache if chosen[0]["rotates"] else "warm",
                )
                on_a, on_b = (_problem(*side, place) for side in zip(sides, chosen, strict=True))
                if on_b is not None:
                    broken[place.name] = f"{on_b} on side B"
                elif on_a is not None:
                    notes[place.name] = f"{on_a} on side A, right on side B"
                else:
                    found.append(place)
    if not found and not broken and len(notes) == nowhere:
        raise ValueError("nothing to compare: no row of ours runs here")
    return found


def _impls(chosen: list[dict[str, Any]], selector: Selector) -> list[str]:
    names = list(dict.fromkeys(name for side in chosen for name in side["impls"]))
    if selector.impl != "*":
        return fnmatch.filter(names, selector.impl)
    return [name for name in names if any(name in side["ours"] for side in chosen)]


def _problem(side: Worker, chosen: dict[str, Any], place: _Place) -> str | None:
    """Why a row cannot be timed on a side, or None. `_impls` names those that one side has at least."""
    if place.impl not in chosen["impls"]:
        return f"absent ({chosen['skipped'].get(place.impl, 'no such implementation')})"
    numerics = side.ask("check", phase=place.phase, impls=[place.impl])[place.impl]["numerics"]
    return f"wrong ({numerics['reason']})" if numerics["verdict"] == "refused" else None


def _cores(pair: int, options: CompareOptions) -> list[int] | None:
    """Those that both processes of a pair run on, in turns; None: any."""
    free = sorted(os.sched_getaffinity(0))
    if options.device != "cpu" or options.threads >= len(free):
        return None
    return [free[(pair + i) % len(free)] for i in range(options.threads)]


def _pair_ratio(sides: list[Worker], place: _Place, options: CompareOptions, cores: list[int] | None) -> float:
    """log(time of B / time of A) of one pair of processes: the median over quadruples A B B A."""
    common = {"phase": place.phase, "cache": place.cache, "impl": place.impl, "warmup_s": WARMUP_S}
    common |= {"min_sample_s": MIN_SAMPLE_S, "cores": cores}
    for side in sides:
        side.ask("open", case=place.case, shape=place.shape, dtype=place.dtype)
    each = sides[0].ask("arm", **common)["per_sample"]
    sides[1].ask("arm", **common, per_sample=each)
    quads = 2 if options.timer == "callgrind" else MIN_QUADS
    found: list[float] = []
    spent = 0.0
    while len(found) < quads or (options.timer != "callgrind" and spent < SECONDS and len(found) < MAX_QUADS):
        first, second, third, fourth = (sides[i].ask("sample", count=1)[0] for i in (0, 1, 1, 0))
        found.append(math.log((second + third) / (first + fourth)))
        spent += (first + second + third + fourth) * each
    return median(found)


# ------------------------------------------------------------------------------------------------- two files


def _compare_files(a: str, b: str, options: CompareOptions) -> Comparison:
    read = [latest([row for row in read_rows([Path(path)]) if _matches(row, options.patterns)]) for path in (a, b)]
    sides = [{row.key(): row for row in rows if row.status == "ok" and row.timing is not None} for rows in read]
    if not sides[0]:
        raise ValueError(f"{a} holds no timed row that was asked for")
    shared = [key for key in sides[0] if key in sides[1]]
    # A peer's row that was never right is no loss; one of ours must not be wrong whatever it was before.
    wrong = {row.key(): row for row in read[1] if row.status == "refused" and (row.ours or row.key() in sides[0])}
    broken = [f"{_name(row)}: wrong in {b}: {row.reason}" for row in wrong.values()]
    lost = [row for key, row in sides[0].items() if key not in sides[1] and key not in wrong]
    broken += [f"{_name(row)}: not in {b}" for row in lost]
    notes = [f"{_name(row)}: new in {b}" for key, row in sides[1].items() if key not in sides[0]]
    machines = {row.machine.get("id") for side in sides for row in side.values()}
    lines = []
    for key in shared:
        before, after = (_process_logs(side[key]) for side in sides)
        judged = stats.judge_sides(before, after, rows=len(shared), margin=options.margin)
        lines.append(Line(name=_name(sides[0][key]), judgement=judged))
    how = "two files, measured apart in time" + ("" if len(machines) == 1 else ", ON DIFFERENT MACHINES")
    return Comparison(a=a, b=b, how=how, lines=lines, broken=broken, notes=notes)


def _process_logs(row: Row) -> list[float]:
    assert row.timing is not None
    return [math.log(median(one)) for one in row.timing.samples]


def _name(row: Row) -> str:
    return f"{row.identity.case}/{row.identity.impl}/{short(row)}"


def _matches(row: Row, patterns: tuple[str, ...]) -> bool:
    selectors = [Selector.parse(pattern) for pattern in patterns] or [Selector()]
    i = row.identity
    return any(
        fnmatch.fnmatchcase(i.case, s.case)
        and fnmatch.fnmatchcase(i.impl, s.impl)
        and fnmatch.fnmatchcase(i.shape, s.shape)
        and fnmatch.fnmatchcase(i.phase, s.phase)
        for s in selectors
    )


# ------------------------------------------------------------------------------------------------- output


def render(found: Comparison) -> str:
    """The verdicts as text."""
    lines = [f"A {found.a}", f"B {found.b}", found.how, ""]
    width = max([3, *(len(line.name) for line in found.lines)])
    lines.append(f"{'row':<{width}}  verdict  time of B / time of A       limit  n")
    for line in found.lines:
        j = line.judgement
        interval = f"x{j.ratio:.3f} [{j.low:.3f}, {j.high:.3f}]"
        limit = f"{100 * j.limit:.1f} %" if math.isfinite(j.limit) else "none"
        lines.append(f"{line.name:<{width}}  {j.verdict:<7}  {interval:<26}  {limit:>6}  {j.units}")
    lines += [f"BROKEN on B: {reason}" for reason in found.broken]
    lines += [f"not compared: {reason}" for reason in found.notes]
    if found.lines:
        margin = found.lines[0].judgement.margin
        ratios = [line.judgement.ratio for line in found.lines]
        lines += [
            "",
            f"geometric mean of the ratios: x{stats.geomean(ratios):.3f}",
            f"intervals: {100 * (1 - stats.ALPHA):g} % over all {len(found.lines)} rows together (Bonferroni); "
            f"effects up to {100 * margin:g} % are not called",
            f"limit: the smallest slowdown that is called SLOWER with probability {stats.POWER:g}",
            "n: pairs of processes; of two files, processes of the smaller side",
        ]
    return "\n".join(lines)


def as_json(found: Comparison) -> dict[str, Any]:
    """The verdicts as JSON values; infinities are null."""
    lines = [
        {"row": line.name, "ratios": line.ratios}
        | {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(line.judgement).items()}
        for line in found.lines
    ]
    sides = {"a": found.a, "b": found.b, "how": found.how}
    return sides | {"rows": lines, "broken": found.broken, "notes": found.notes}
