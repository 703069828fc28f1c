"""Finds the case files, and selects what is to be run: `case[/impl[/shape[/phase]]]`, each part may hold * and ?."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from m2train.bench import peers
from m2train.bench.case import REGISTERED, SUITES, Case, CaseSpec, Ceiling, Skip, SlowStart
from m2train.bench.shapes import load_workload

CASES_ENV = "M2BENCH_CASES"


def cases_folder(given: Path | None) -> Path:
    """The folder of case files: the given one, $M2BENCH_CASES, or ./benchmarks.

    Raises:
        ValueError: it holds none.
    """
    folder = given or Path(os.environ.get(CASES_ENV, "benchmarks"))
    if not any(folder.glob("bench_*.py")):
        raise ValueError(
            f"no bench_*.py in {folder.resolve()}; the cases are in the source tree, not in the wheel: run in a "
            f"checkout, or name their folder with --cases or {CASES_ENV}"
        )
    return folder.resolve()


def load(folder: Path, workload: Path | None = None) -> dict[str, CaseSpec]:
    """Import every bench_*.py of a folder; name -> case.

    Args:
        folder: of the case files.
        workload: recorded rollouts, which become a further shape of every case that takes one.

    Raises:
        ValueError: two cases have one name.
    """
    peers.use_folder()
    REGISTERED.clear()
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))  # case files may import one another
    for path in sorted(folder.glob("bench_*.py")):
        spec = importlib.util.spec_from_file_location(f"m2bench_cases.{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    if workload is None:
        return dict(REGISTERED)
    recorded = load_workload(workload)
    return {
        name: spec
        if spec.workload is None
        else dataclasses.replace(spec, shapes={**spec.shapes, recorded.name: spec.workload(recorded)})
        for name, spec in REGISTERED.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Selector:
    """A pattern of rows."""

    case: str = "*"
    impl: str = "*"
    shape: str = "*"
    phase: str = "*"

    @classmethod
    def parse(cls, text: str) -> Selector:
        """From `case[/impl[/shape[/phase]]]`.

        Raises:
            ValueError: too many parts, or an empty one.
        """
        parts = text.split("/")
        if len(parts) > 4 or not all(parts):
            raise ValueError(f"got {text!r}; expected case[/impl[/shape[/phase]]], such as policy_loss/m2/*/both")
        return cls(**dict(zip(("case", "impl", "shape", "phase"), parts, strict=False)))


def select(specs: dict[str, CaseSpec], patterns: Sequence[str], suite: str) -> list[tuple[CaseSpec, str, Selector]]:
    """(case, shape, pattern) of what is asked for; a shape that a pattern names need not be in the suite.

    Raises:
        ValueError: a pattern matches nothing, or the suite is unknown.
    """
    if suite not in SUITES:
        raise ValueError(f"got suite {suite!r}; expected one of {', '.join(SUITES)}")
    found: dict[tuple[str, str, Selector], tuple[CaseSpec, str, Selector]] = {}
    for pattern in patterns or ["*"]:
        selector = Selector.parse(pattern)
        hits = 0
        for spec in specs.values():
            if not fnmatch.fnmatchcase(spec.name, selector.case):
                continue
            shapes = spec.of_suite(suite) if selector.shape == "*" else list(spec.shapes)
            for shape in fnmatch.filter(shapes, selector.shape):
                found[spec.name, shape, selector] = (spec, shape, selector)
                hits += 1
        if not hits:
            names = ", ".join(f"{s.name} ({', '.join(s.shapes)})" for s in specs.values())
            raise ValueError(f"{pattern!r} matches no case and shape; there are: {names}")
    return list(found.values())


def split_impls(case: Case, selector: Selector, suite: str) -> tuple[list[str], dict[str, str]]:
    """Names to run (the baseline among them), and name -> why the others are not run.

    Raises:
        ValueError: the pattern matches no implementation.
    """
    wanted = fnmatch.filter(case.impls, selector.impl)
    if not wanted:
        raise ValueError(f"no implementation matches {selector.impl!r}; there are {', '.join(case.impls)}")
    runnable, skipped = [], {}
    for name, impl in case.impls.items():
        if name not in wanted and name != case.baseline:
            continue
        if isinstance(impl, Skip):
            skipped[name] = str(impl)
        elif isinstance(impl, SlowStart | Ceiling) and suite == "smoke" and selector.impl == "*":
            why = "a ceiling" if isinstance(impl, Ceiling) else "takes seconds to get ready or to run"
            skipped[name] = f"{why}: left out of suite smoke (name it to run it)"
        else:
            runnable.append(name)
    return runnable, skipped


def split_phases(case: Case, selector: Selector) -> list[str]:
    """Phases to time.

    Raises:
        ValueError: the pattern names a phase that the case does not have.
    """
    possible: Iterable[str] = ("fwd", "bwd", "both") if case.grad is not None else case.all_phases()
    if selector.phase == "*":
        return list(case.all_phases())
    found = fnmatch.filter(possible, selector.phase)
    if not found:
        raise ValueError(f"no phase matches {selector.phase!r}; this case has {', '.join(possible)}")
    return found


def dtype_of(name: str) -> torch.dtype:
    """From its name without `torch.`."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"got dtype {name!r}; expected a name such as float32 or bfloat16")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The name without `torch.`."""
    return str(dtype).removeprefix("torch.")
