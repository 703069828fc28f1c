"""What a benchmark file states about an op: data and callables, nothing about timing.

@case("rmsnorm", shapes=shapes.MODELS["qwen3-8b"] | shapes.EDGE)
def rmsnorm(s: Setup) -> Case:
    x, w, dy = s.randn(s.M, s.N), s.randn(s.N), s.randn(s.M, s.N)
    return Case(oracle=ref.rmsnorm, inputs=(x, w), grad=dy,
                impls={"m2": mk.rms_norm, "torch": F.rms_norm, "compile": compiled(F.rms_norm)},
                bytes=2 * x.nbytes + w.nbytes, flops=5 * x.numel())
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

PHASES = ("fwd", "bwd", "both")
"""Forward without a graph; backward alone; forward and backward."""
SUITES = ("smoke", "paper", "nightly")

ON_DEVICE = 2**24
"""Elements from which random inputs of a GPU are drawn there."""

Fn = Callable[..., Any]
Dims = Mapping[str, Any]


class Skip(Exception):
    """Why something is not run. Raised by a case for a shape, or given in place of an implementation."""


@dataclass(frozen=True, slots=True)
class SlowStart:
    """An implementation that takes seconds to get ready (a compiler, heavy imports) or to run: not in suite smoke."""

    fn: Fn


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The part that no implementation can do without (the GEMMs of a loss), alone: a bound on the speed of all.

    `fn` has the interface of an implementation, and results of its shapes, whose values mean nothing: they are never
    checked, and every row and table says so.
    """

    fn: Fn


Impl = Fn | Skip | SlowStart | Ceiling


def compiled(fn: Fn, **options: Any) -> SlowStart:
    """`fn` under torch.compile, which is imported, and compiles, when it is first called."""
    made: list[Fn] = []

    def run(*inputs: Any) -> Any:
        if not made:
            made.append(torch.compile(fn, dynamic=False, **options))
        return made[0](*inputs)

    return SlowStart(run)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subset:
    """How to cut a case to some of its rows, for batch invariance: the part's result must be bitwise the whole's."""

    inputs: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    """All inputs -> those of the part."""
    output: Callable[[Any], Any]
    """The whole's output -> what the part's must equal."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape.

    Attributes:
        impls: name -> callable of `inputs`, or why it is not there.
        inputs: tensors, or anything else that the callables take.
        oracle: float64 tensors in place of the floating inputs -> the right result. None: `verify` decides.
        verify: (result, inputs) -> what is wrong with it, or None; for results that are not unique.
        grad: upstream gradient of each floating output that has one; None: forward only.
        wrt: indices of the inputs that get a gradient. None: all floating ones.
        bytes: memory traffic at the least, a number (forward) or by phase.
        flops: likewise.
        allowance: bytes, by phase, that no implementation's own memory counts: a float32 sum of a narrow gradient.
        baseline: the implementation whose error is the yardstick and whose time the ratios are against; no Ceiling.
        ours: the implementations that `compare` watches; no Ceiling.
        ratio, eps: an error may be `ratio` times the baseline's, plus `eps` of the oracle's largest value.
        rotate: inputs may be cloned to keep them out of the caches.
        least_read: bytes of inputs that the implementation which reads least of them reads; None: all read all.
        pure: the same inputs give the same result, and nothing else changes.
        quality: result -> named figures of merit that go into the row.
        subset: None: the op promises no batch invariance.
        phases: None: fwd, and both where there is a gradient.
        oracle_device: where the oracle runs in float64: cpu, or `same` as the inputs, where that would take minutes.
        cuda_timer: in place of a CUDA graph, for a case that synchronises with the host (a row names its timer).
    """

    impls: Mapping[str, Impl]
    inputs: tuple[Any, ...]
    oracle: Fn | None = None
    verify: Callable[[Any, tuple[Any, ...]], str | None] | None = None
    grad: Any = None
    wrt: tuple[int, ...] | None = None
    bytes: float | Mapping[str, float] | None = None
    flops: float | Mapping[str, float] | None = None
    allowance: Mapping[str, float] = field(default_factory=dict)
    baseline: str = "torch"
    ours: tuple[str, ...] = ("m2",)
    ratio: float = 2.0
    eps: float = 1e-6
    rotate: bool = True
    least_read: int | None = None
    pure: bool = True
    quality: Callable[[Any], dict[str, float]] | None = None
    subset: Subset | None = None
    phases: tuple[str, ...] | None = None
    oracle_device: Literal["cpu", "same"] = "cpu"
    cuda_timer: Literal["graph", "events", "wall"] = "graph"

    def __post_init__(self) -> None:
        """Raise ValueError for a case that could be timed without being checked."""
        if self.oracle is None and self.verify is None:
            raise ValueError("a case needs an oracle or a verify: nothing but a ceiling is timed unchecked")
        if self.oracle is None and self.grad is not None:
            raise ValueError("a case with gradients needs an oracle: verify sees the results alone")
        if self.baseline not in self.impls:
            raise ValueError(f"baseline {self.baseline!r} is none of the implementations {list(self.impls)}")
        unchecked = [name for name in (self.baseline, *self.ours) if name in self.ceilings]
        if unchecked:
            raise ValueError(f"{unchecked[0]!r} is a ceiling, which is never checked: neither a baseline nor ours")

    @property
    def ceilings(self) -> tuple[str, ...]:
        """Names of the implementations that are timed without being checked."""
        return tuple(name for name, impl in self.impls.items() if isinstance(impl, Ceiling))

    @property
    def leaves(self) -> tuple[int, ...]:
        """Indices of the inputs that get a gradient."""
        if self.grad is None:
            return ()
        if self.wrt is not None:
            return self.wrt
        return tuple(i for i, x in enumerate(self.inputs) if isinstance(x, torch.Tensor) and x.is_floating_point())

    def all_phases(self) -> tuple[str, ...]:
        """The phases that are timed unless others are asked for."""
        if self.phases is not None:
            return self.phases
        return ("fwd",) if self.grad is None else ("fwd", "both")

    def cost(self, phase: str) -> tuple[float | None, float | None]:
        """(bytes, FLOPs) of a launch; None where the case does not state them."""
        return _of_phase(self.bytes, phase), _of_phase(self.flops, phase)

    def allowed(self, phase: str) -> float:
        """Bytes that are left out of every implementation's own memory."""
        return self.allowance.get(phase, 0.0)


def _of_phase(value: float | Mapping[str, float] | None, phase: str) -> float | None:
    if isinstance(value, Mapping):
        return value.get(phase)
    return float(value) if value is not None and phase == "fwd" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What a case is built from: a shape's dimensions as attributes, and random inputs that its seed fixes."""

    name: str
    dims: Dims
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.dims:
            raise AttributeError(f"shape {self.name!r} has no dimension {name!r}; it has {list(self.dims)}")
        return self.dims[name]

    def randn(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        """Normal values; drawn on the CPU, so that every device gets the same, unless that would take seconds."""
        if self.device.type == "cuda" and math.prod(shape) > ON_DEVICE:
            seed = int(torch.randint(2**31, (), generator=self.generator))
            own = torch.Generator(self.device).manual_seed(seed)
            return torch.randn(*shape, generator=own, device=self.device, dtype=dtype or self.dtype) * scale
        x = torch.randn(*shape, generator=self.generator) * scale
        return x.to(self.device, dtype or self.dtype)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uniform values in [0, 1)."""
        return torch.rand(*shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def randint(self, high: int, *shape: int) -> torch.Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def segments(self, lengths: Sequence[int]) -> torch.Tensor:
        """int64 [sum(lengths)]: the number of the sequence of each token."""
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseSpec:
    """A registered case.

    Attributes:
        build: Setup -> Case; may raise Skip.
        shapes: name -> dimensions.
        dtypes: the first one is the smoke suite's.
        smoke: names of the shapes of the smoke suite.
        nightly: names of the shapes that only the nightly suite runs.
        first: names of the shapes that a run with a time limit takes first.
        workload: recorded rollouts -> dimensions; None: the case has no ragged shape.
    """

    name: str
    build: Callable[[Setup], Case]
    shapes: Mapping[str, Dims]
    dtypes: tuple[torch.dtype, ...]
    smoke: tuple[str, ...]
    nightly: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    workload: Callable[[Any], Dims] | None = None
    doc: str = ""

    def of_suite(self, suite: str) -> list[str]:
        """Shape names of a suite."""
        if suite == "smoke":
            return list(self.smoke)
        return [name for name in self.shapes if suite == "nightly" or name not in self.nightly]

    def make(self, shape: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
        """Build the case at a shape.

        Raises:
            Skip: the case does not run here.
        """
        setup = Setup(
            name=shape,
            dims=self.shapes[shape],
            dtype=dtype,
            device=device,
            generator=torch.Generator().manual_seed(seed),
        )
        return self.build(setup)


REGISTERED: dict[str, CaseSpec] = {}
"""Filled by `case` while registry.load imports the case files."""


def case(
    name: str,
    *,
    shapes: Mapping[str, Dims],
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    smoke: tuple[str, ...] | None = None,
    nightly: tuple[str, ...] = (),
    first: tuple[str, ...] = (),
    workload: Callable[[Any], Dims] | None = None,
) -> Callable[[Callable[[Setup], Case]], Callable[[Setup], Case]]:
    """Register a function of a shape as a case; `smoke` is the first shape unless named.

    Raises:
        ValueError: a suite names a shape that is not there, or the case's name is taken.
    """
    chosen = tuple(shapes)[:1] if smoke is None else smoke
    missing = [shape for shape in (*chosen, *nightly, *first) if shape not in shapes]
    if missing:
        raise ValueError(f"case {name}: no shape {', '.join(missing)}; it has {', '.join(shapes)}")

    def register(build: Callable[[Setup], Case]) -> Callable[[Setup], Case]:
        if name in REGISTERED:
            raise ValueError(f"two cases are called {name!r}; rename one")
        doc = (build.__doc__ or "").strip().partition("\n")[0]
        REGISTERED[name] = CaseSpec(
            name=name,
            build=build,
            shapes=shapes,
            dtypes=dtypes,
            smoke=chosen,
            nightly=nightly,
            first=first,
            workload=workload,
            doc=doc,
        )
        return functools.wraps(build)(build)

    return register
