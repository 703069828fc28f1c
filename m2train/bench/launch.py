"""One launch of an implementation, and rings of cloned inputs that keep every launch's data out of the caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from m2train.bench.case import Case, Ceiling, Fn, SlowStart

Launch = Callable[[], Any]
MAX_RING_BYTES = 2**30
"""Of all clones together; a machine with a larger cache gets a note in the row."""
MAX_RING = 512


def callable_of(case: Case, name: str) -> Fn:
    """The implementation itself; it must be one that can run."""
    impl = case.impls[name]
    fn = impl.fn if isinstance(impl, SlowStart | Ceiling) else impl
    assert callable(fn), f"{name}: {fn}"
    return fn


def floats(result: Any) -> list[torch.Tensor]:
    """The floating tensors of a result: a tensor, or a tuple or list that holds some."""
    items = result if isinstance(result, tuple | list) else [result]
    return [x for x in items if isinstance(x, torch.Tensor) and x.is_floating_point()]


def as_leaves(case: Case, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs, those that get a gradient as leaves of a graph of their own."""
    leaves = set(case.leaves)
    return tuple(x.detach().requires_grad_() if i in leaves else x for i, x in enumerate(inputs))


def upstream(case: Case, outputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(outputs that have a gradient, their upstream gradients)."""
    given = list(case.grad) if isinstance(case.grad, tuple | list) else [case.grad]
    live = [y for y in outputs if y.requires_grad]
    if len(live) != len(given):
        raise ValueError(f"{len(live)} outputs have a gradient, but the case gives {len(given)}")
    return live, [g.to(y.dtype) for y, g in zip(live, given, strict=True)]


def backward(case: Case, result: Any, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Gradients of the leaves of `inputs`."""
    outputs, grads = upstream(case, floats(result))
    return torch.autograd.grad(outputs, [inputs[i] for i in case.leaves], grads)


def launch(case: Case, fn: Fn, inputs: tuple[Any, ...], phase: str) -> Any:
    """Run a phase once: fwd -> the result, both -> (result, gradients)."""
    if phase == "fwd":
        with torch.no_grad():
            return fn(*inputs)
    assert phase == "both", phase
    result = fn(*inputs)
    return result, backward(case, result, inputs)


def prepare(case: Case, fn: Fn, ring: Sequence[tuple[Any, ...]], phase: str) -> list[Launch]:
    """One launch per set of inputs; for bwd, `arm` runs the forward of each before the clock starts."""
    if phase == "bwd":
        return [_Backward(case, fn, inputs) for inputs in ring]
    return [lambda inputs=inputs: launch(case, fn, inputs, phase) for inputs in ring]  # type: ignore[misc]


class _Backward:
    """A backward whose forward has been run by `arm`, before the clock starts."""

    def __init__(self, case: Case, fn: Fn, inputs: tuple[Any, ...]) -> None:
        self._case, self._fn, self._inputs = case, fn, inputs
        self._result: Any = None

    def arm(self) -> None:
        self._result = self._fn(*self._inputs)

    def __call__(self) -> Any:
        result, self._result = self._result, None
        return backward(self._case, result, self._inputs)


def arm(launches: Sequence[Launch]) -> None:
    """Do what must not be timed before these launches."""
    for one in launches:
        if isinstance(one, _Backward):
            one.arm()


def input_bytes(inputs: tuple[Any, ...]) -> int:
    """Bytes of the tensors among the inputs."""
    return sum(x.nbytes for x in inputs if isinstance(x, torch.Tensor))


def make_ring(case: Case, cache: str, cache_bytes: int) -> tuple[list[tuple[Any, ...]], str]:
    """Sets of inputs to go round, and a note where they do not exceed 3 times the last-level cache.

    Rotation rather than a flush: a flush would be timed along, in a CUDA graph, or cost more than what is timed.
    """
    first = as_leaves(case, case.inputs)
    size = input_bytes(case.inputs)
    if cache == "warm" or not case.rotate or size == 0:
        return [first], ""
    wanted = 3 * cache_bytes // (case.least_read or size) + 1
    number = max(1, min(wanted, MAX_RING, MAX_RING_BYTES // size))
    clones = [
        as_leaves(case, tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in case.inputs))
        for _ in range(number - 1)
    ]
    read = case.least_read or size
    note = (
        "" if number == wanted else f"{number} input sets of {read} B read, short of 3 x the cache of {cache_bytes} B"
    )
    return [first, *clones], note
