"""Correctness before time: an implementation that fails here is refused, and is not timed.

wrong   an error over `ratio` times that of the baseline plus `eps`, against a float64 oracle
late    the result changes after the call has returned: a background thread or a side stream finishes it
cached  the result does not follow the inputs: new values in the same storage give the old result
Also refused: NaN where the oracle has none, and inputs that were written to.
A ceiling computes no result of the case: it is not brought here, and its rows say so.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from m2train.bench.case import Case
from m2train.bench.launch import as_leaves, callable_of, floats, launch, upstream
from m2train.bench.schema import Numerics

SETTLE_S = 0.05
SLOW_S = 1.0
"""A launch that takes longer is repeated once for `bitwise_repeat` if it is ours, and not if it is a peer's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guards:
    """Which checks are on; only selftest turns one off, to show that it is needed."""

    wrong: bool = True
    late: bool = True
    cached: bool = True


def check_phase(case: Case, phase: str) -> str:
    """The phase that is run to check one that is timed: a backward is checked with its forward."""
    return "both" if phase in ("bwd", "both") else "fwd"


def reference(case: Case, phase: str) -> list[torch.Tensor] | None:
    """Results of the oracle in float64, gradients after them; None for a case that verifies."""
    if case.oracle is None:
        return None
    cpu = case.oracle_device == "cpu"
    wide = tuple(_wide(x, cpu) for x in case.inputs)
    inputs = as_leaves(case, wide) if phase == "both" else wide
    with _all_cores():
        result = case.oracle(*inputs)
        found = floats(result)
        if phase == "both":
            live, grads = upstream(case, found)
            leaves = [inputs[i] for i in case.leaves]
            found += list(torch.autograd.grad(live, leaves, [_wide(g, cpu) for g in grads]))
    return [x.detach() for x in found]


@contextmanager
def _all_cores() -> Iterator[None]:
    """The oracle is not timed: it may have every core of this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wide(x: Any, cpu: bool) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach().cpu() if cpu else x.detach()
    return x.double() if x.is_floating_point() else x


def tensors_of(result: Any, phase: str) -> list[torch.Tensor]:
    """Floating results and, for phase both, gradients."""
    if phase != "both":
        return floats(result)
    out, grads = result
    return [*floats(out), *grads]


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Of each tensor: the largest error, and the largest value of the oracle."""

    error: list[float]
    largest: list[float]
    problem: str | None
    """A shape, NaN or infinity where the oracle has another."""


def errors(actual: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> Errors:
    """Compare with the oracle, tensor by tensor."""
    if len(actual) != len(wanted):
        return Errors(error=[], largest=[], problem=f"{len(actual)} results; the oracle has {len(wanted)}")
    error, largest = [], []
    for number, (x, y) in enumerate(zip(actual, wanted, strict=True)):
        if x.shape != y.shape:
            return Errors(error=[], largest=[], problem=f"result {number} is {list(x.shape)}, not {list(y.shape)}")
        got = x.detach().double().to(y.device)
        finite = torch.isfinite(y)
        if not torch.equal(torch.isfinite(got), finite):
            return Errors(error=[], largest=[], problem=f"result {number} has NaN or infinity; the oracle has none")
        gap = torch.where(finite, (got - y).abs(), 0.0)
        error.append(float(gap.max()) if gap.numel() else 0.0)
        largest.append(float(torch.where(finite, y.abs(), 0.0).max()) if gap.numel() else 0.0)
    return Errors(error=error, largest=largest, problem=None)


class Checker:
    """Checks the implementations of one case in one phase.

    Args:
        case: the case as it will be timed.
        fresh: the same shape with other values.
        phase: fwd | bwd | both.
        guards: which checks are on.
    """

    def __init__(self, case: Case, fresh: Case, phase: str, guards: Guards | None = None) -> None:
        self.case = case
        self.fresh = dataclasses.replace(
            fresh, grad=case.grad
        )  # the case's own upstream gradient is what is launched
        self.phase = check_phase(case, phase)
        self.guards = guards or Guards()
        self._wanted = reference(case, self.phase)
        self._wanted_fresh = reference(self.fresh, self.phase) if case.pure else None
        if case.pure and not can_refill(case.inputs, self.fresh.inputs):
            raise ValueError(
                "inputs of another seed have other shapes, or nothing that can be changed: a cached result could not "
                "be told from a new one; let the seed change values alone, or set pure=False"
            )
        self._yardstick: Errors | None = None

    def run(self, name: str) -> Numerics:
        """Everything that is known about one implementation's results."""
        fn = callable_of(self.case, name)
        inputs = as_leaves(self.case, self.case.inputs)
        before = [x.detach().clone() for x in self.case.inputs if isinstance(x, torch.Tensor)]
        start = time.perf_counter()
        result, changed = self._result(fn, inputs)
        slow = not _on_gpu(inputs) and time.perf_counter() - start > SLOW_S  # a GPU's first launch compiles
        problem = "the result changed after the call had returned: work goes on behind the clock" if changed else None
        after = [x for x in self.case.inputs if isinstance(x, torch.Tensor)]
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            problem = problem or "it writes to its inputs"
        found = self._compare(name, result, self.case, self._wanted, guard=self.guards.wrong)
        problem = problem or found.problem
        numerics = Numerics(
            verdict="ok",
            error=found.relative,
            error_ratio=found.ratio,
            quality=self.case.quality(self._plain(result)) if self.case.quality else {},
        )
        if problem is None and self.case.pure:
            repeats = (1 if name in self.case.ours else 0) if slow else 2
            numerics.bitwise_repeat = self._repeats(fn, inputs, result, repeats)
            numerics.batch_invariant = self._invariant(fn)
            problem = self.stale(name, result)
        if problem is not None:
            numerics.verdict = "refused"
            numerics.reason = problem
        return numerics

    def stale(self, name: str, old: Any = None) -> str | None:
        """Why the result is not one of the present inputs, or None; called again after the timing.

        Args:
            name: of the implementation.
            old: what it gave for the values before these, just now; None: it is run for them here.
        """
        if not self.case.pure:
            return None
        fn = callable_of(self.case, name)
        if old is None:  # it has to be in such a cache before the values change
            old = _snapshot(launch(self.case, fn, as_leaves(self.case, self.case.inputs), self.phase))
        kept = copy_inputs(self.case.inputs)
        refill(self.case.inputs, self.fresh.inputs)
        try:
            result, _ = self._result(fn, as_leaves(self.case, self.case.inputs))
            found = self._compare(name, result, self.fresh, self._wanted_fresh, guard=True)
        finally:
            refill(self.case.inputs, kept)
        if found.problem is None:
            return None
        if self._is_old(result, old):
            caught = f"the result does not follow the inputs (a cached one?): {found.problem}"
            return caught if self.guards.cached else None
        return f"wrong for other values: {found.problem}" if self.guards.wrong else None

    def _is_old(self, result: Any, old: Any) -> bool:
        """Whether a result is nearer to what the inputs before gave than to what they give now."""
        if self._wanted is None or self._wanted_fresh is None:
            return _equal(result, old)
        actual = tensors_of(result, self.phase)
        before, now = errors(actual, self._wanted), errors(actual, self._wanted_fresh)
        return any(a < b for a, b in zip(before.error, now.error, strict=False))

    def _result(self, fn: Any, inputs: tuple[Any, ...]) -> tuple[Any, bool]:
        """(the result as it was on return, whether it changed afterwards)."""
        result = launch(self.case, fn, inputs, self.phase)
        if not self.guards.late:
            _settle(inputs)
            return result, False
        now = _snapshot(result)
        _settle(inputs)
        return now, not _equal(now, result)

    def _compare(
        self, name: str, result: Any, case: Case, wanted: list[torch.Tensor] | None, *, guard: bool
    ) -> _Found:
        if case.verify is not None:
            problem = case.verify(self._plain(result), case.inputs)
            return _Found(problem if guard else None, None, None)
        assert wanted is not None
        actual = errors(tensors_of(result, self.phase), wanted)
        if actual.problem is not None:
            return _Found(actual.problem if guard else None, None, None)
        plain = self._baseline() if name != self.case.baseline else actual
        relative, ratio, problem = 0.0, None, None
        for number, (error, largest) in enumerate(zip(actual.error, actual.largest, strict=True)):
            yardstick = plain.error[number] if number < len(plain.error) else 0.0
            scale = largest if largest > 0 else 1.0
            relative = max(relative, error / scale)
            if yardstick > 0:
                ratio = max(ratio or 0.0, error / yardstick)
            limit = self.case.ratio * yardstick + self.case.eps * scale
            if name == self.case.baseline:  # no other yardstick: a wrong baseline must not pass for being one
                limit = _BASELINE_EPS[min(x.dtype.itemsize for x in tensors_of(result, self.phase))] * scale
            if not error <= limit and problem is None:
                problem = f"error {error:.2e} of result {number} is over {limit:.2e} (baseline's: {yardstick:.2e})"
        return _Found(problem if guard else None, relative, ratio)

    def _baseline(self) -> Errors:
        if self._yardstick is None:
            fn = callable_of(self.case, self.case.baseline)
            result = launch(self.case, fn, as_leaves(self.case, self.case.inputs), self.phase)
            assert self._wanted is not None
            self._yardstick = errors(tensors_of(result, self.phase), self._wanted)
        return self._yardstick

    def _repeats(self, fn: Any, inputs: tuple[Any, ...], first: Any, times: int) -> bool | None:
        again = [launch(self.case, fn, inputs, self.phase) for _ in range(times)]
        return all(_equal(first, other) for other in again) if again else None

    def _invariant(self, fn: Any) -> bool | None:
        subset = self.case.subset
        if subset is None:
            return None
        with torch.no_grad():
            whole = fn(*self.case.inputs)
            part = fn(*subset.inputs(self.case.inputs))
        return _equal(subset.output(whole), part)

    def _plain(self, result: Any) -> Any:
        return result[0] if self.phase == "both" else result


_BASELINE_EPS = {1: 0.1, 2: 0.05, 4: 1e-3, 8: 1e-6}
"""Of the oracle's largest value, by bytes of the narrowest result: eager torch, with long sums in mind."""


@dataclass(frozen=True, slots=True)
class _Found:
    problem: str | None
    relative: float | None
    ratio: float | None


def copy_inputs(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Clones of the tensors, deep copies of the rest."""
    return tuple(x.detach().clone() if isinstance(x, torch.Tensor) else copy.deepcopy(x) for x in inputs)


def can_refill(inputs: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    """Whether `refill` can put `values` in: shapes are alike, and there is a tensor or a list at all."""
    pairs = list(zip(inputs, values, strict=True))
    tensors = [x.shape == y.shape for x, y in pairs if isinstance(x, torch.Tensor)]
    lists = [len(x) == len(y) for x, y in pairs if isinstance(x, list)]
    return bool(tensors or lists) and all(tensors) and all(lists)


def refill(inputs: tuple[Any, ...], values: tuple[Any, ...]) -> None:
    """Put other values into the same tensors and lists."""
    for x, y in zip(inputs, values, strict=True):
        if isinstance(x, torch.Tensor):
            x.detach().copy_(y)
        elif isinstance(x, list):
            x[:] = y


def _on_gpu(inputs: tuple[Any, ...]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs)


def _settle(inputs: tuple[Any, ...]) -> None:
    """Let whatever was started come to its end."""
    if _on_gpu(inputs):
        torch.cuda.synchronize()
    else:
        time.sleep(SETTLE_S)


def _snapshot(value: Any) -> Any:
    """A copy as of now: on CUDA in the order of the current stream, which does not wait for others."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return [_snapshot(x) for x in value]
    return copy.deepcopy(value)


def _equal(a: Any, b: Any) -> bool:
    """Bitwise; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b = a.detach(), b.detach()
        if not a.is_floating_point():
            return bool(torch.equal(a, b))
        return bool(torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(a.nan_to_num(), b.nan_to_num()))
    if isinstance(a, tuple | list):
        if not isinstance(b, tuple | list) or len(a) != len(b):
            return False
        return all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
