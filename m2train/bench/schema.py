"""The row: one implementation of a case at one shape, with all that is needed to judge and to repeat the number.

Rows are JSON Lines. `schema_version` changes with the meaning of a field; a reader refuses what it does not know.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

from m2train.bench.parts import Part

Bound = Literal["memory", "compute", "launch"]


@dataclass(kw_only=True)
class Identity(Part):
    """What was measured, and with which clock."""

    case: str
    impl: str
    shape: str
    dtype: str
    phase: Literal["fwd", "bwd", "both"]
    cache: Literal["cold", "warm"]
    timer: str
    device: str
    """cpu | cuda"""
    threads: int


@dataclass(kw_only=True)
class Ratio(Part):
    """Time of this row over time of another one, measured in the same rounds; under 1 is faster."""

    to: str
    value: float
    low: float
    high: float
    ceiling: bool = False
    """`to` is a ceiling: part of the work alone, whose results were not checked."""


@dataclass(kw_only=True)
class Timing(Part):
    """Per launch, in `unit`; centre and interval are of the median over all processes."""

    unit: Literal["s", "instructions"]
    median: float
    low: float
    high: float
    p10: float
    p90: float
    samples: list[list[float]]
    """By process."""
    launches: int
    """Per sample."""
    processes: int
    stopped: Literal["converged", "budget"]
    """Within every process: half-width of the median's interval under 0.5 %, or out of time."""
    launch_us: float | None = None
    """CUDA: time for Python to enqueue a launch."""
    ratio: Ratio | None = None
    """To the case's baseline."""
    others: list[Ratio] = field(default_factory=list)
    """Rows of ours: to every other implementation that was timed beside them, the baseline left out."""
    note: str = ""


@dataclass(kw_only=True)
class Physics(Part):
    """What the case says must be moved and computed, and how near to the machine's own best that is."""

    bytes: float | None = None
    flops: float | None = None
    bandwidth: float | None = None
    """Ceiling used, B/s."""
    peak: float | None = None
    """Ceiling used, FLOP/s."""
    floor_s: float | None = None
    """Time of an empty launch."""
    sol_s: float | None = None
    """Speed of light: the largest of the three times."""
    sol_percent: float | None = None
    bound: Bound | None = None
    dram_bytes: float | None = None
    """Read and written, as Nsight Compute counted them (`m2bench profile --rows`)."""
    energy_j: float | None = None
    """CUDA: of a launch, idle power of the board included; from NVML's energy counter."""
    note: str = ""


@dataclass(kw_only=True)
class Numerics(Part):
    """How right the results are."""

    verdict: Literal["ok", "refused", "unchecked"] = "unchecked"
    reason: str = ""
    error: float | None = None
    """Largest error against float64, relative to the oracle's largest value, over results and gradients."""
    error_ratio: float | None = None
    """Over the baseline's error at the same dtype."""
    bitwise_repeat: bool | None = None
    batch_invariant: bool | None = None
    quality: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Memory(Part):
    """Bytes beyond the inputs; None: not measured."""

    peak: int | None = None
    results: int | None = None
    """Part of the peak: outputs and gradients that the caller gets."""
    own: int | None = None
    """The rest of the peak, less what the case allows to every implementation (a float32 sum of a gradient)."""
    own_share: float | None = None
    """Of the baseline's `own`."""
    saved_for_backward: int | None = None
    how: str = ""


@dataclass(kw_only=True)
class Row(Part):
    """One line of a row file."""

    schema_version: Literal[1] = 1
    id: str
    created: str
    """UTC, ISO 8601."""
    status: Literal["ok", "refused", "skipped"]
    reason: str = ""
    ours: bool = False
    """One of this project's implementations; the others are there to be compared with."""
    ceiling: bool = False
    """Timed, never checked: part of the work alone, a bound on the speed of the implementations."""
    identity: Identity
    timing: Timing | None = None
    physics: Physics = field(default_factory=Physics)
    numerics: Numerics = field(default_factory=Numerics)
    memory: Memory = field(default_factory=Memory)
    machine: dict[str, Any]
    build: dict[str, Any]
    repro: str

    def key(self) -> tuple[str, ...]:
        """What makes two rows of different runs comparable."""
        i = self.identity
        return (i.case, i.impl, i.shape, i.dtype, i.phase, i.cache, i.timer, i.device, str(i.threads))


def row_id(identity: Identity, created: str, machine_id: str) -> str:
    """Ten hex digits that name a row for `m2bench repro`."""
    text = "\n".join([identity.to_json(), created, machine_id])
    return hashlib.sha256(text.encode()).hexdigest()[:10]
