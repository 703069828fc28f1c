"""Memory of one launch beyond its inputs."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from m2train.bench.case import Case, Fn
from m2train.bench.launch import as_leaves, launch
from m2train.bench.schema import Memory

REPEATS, SECONDS = 3, 5.0
"""Launches on a host, as many as begin within so many seconds: their median; one is off by a few blocks' reuse."""


def measure_memory(case: Case, fn: Fn, phase: str, device: torch.device) -> Memory:
    """Peak of a launch, how much of it are results or allowed, and what its forward keeps for the backward."""
    inputs = as_leaves(case, case.inputs)
    phase = "fwd" if phase == "fwd" else "both"
    held: list[Any] = []
    peaks: list[int | None] = []
    start = time.perf_counter()
    while not peaks or (device.type == "cpu" and len(peaks) < REPEATS and time.perf_counter() - start < SECONDS):
        held.clear()
        _touch(inputs)
        found, how = (_cuda_peak if device.type == "cuda" else _host_peak)(
            lambda: held.append(launch(case, fn, inputs, phase))
        )
        peaks.append(found)
    results = sum(_storages(held[0]).values())
    held.clear()
    saved = _saved(case, fn, inputs) if case.grad is not None else None
    known = [x for x in peaks if x is not None]
    peak = int(median(known)) if known else None
    own = None if peak is None else max(0, peak - results - int(case.allowed(phase)))
    return Memory(peak=peak, results=results, own=own, saved_for_backward=saved, how=how)


def with_share(found: Memory, baseline: Memory | None) -> Memory:
    """`found` with its share of the baseline's own memory."""
    if baseline is not None and baseline.own and found.own is not None:
        found.own_share = found.own / baseline.own
    return found


def _touch(inputs: tuple[Any, ...]) -> None:
    """Read every page of the inputs: one that the system had put away would come back in the launch, as growth."""
    for x in inputs:
        if isinstance(x, torch.Tensor) and not x.is_cuda:
            x.detach().reshape(-1)[:: max(1, 4096 // x.itemsize)].sum()


def _storages(result: Any) -> dict[int, int]:
    """Address -> bytes of the storages of all tensors in a result."""
    if isinstance(result, torch.Tensor):
        return {result.untyped_storage().data_ptr(): result.untyped_storage().nbytes()}
    if isinstance(result, tuple | list):
        return {address: size for part in result for address, size in _storages(part).items()}
    return {}


def _cuda_peak(run: Any) -> tuple[int | None, str]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"


def _host_peak(run: Any) -> tuple[int | None, str]:
    """Growth of the resident set: the kernel's high-water mark, reset before the launch.

    Unlike a count of torch's allocations it sees what libraries take for themselves (oneDNN packs bfloat16 panels).
    """
    reset = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (OSError, AttributeError):
        return None, "not available: no /proc/self/clear_refs"
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before), "resident set, pages of 4 KiB; freed blocks may hide small amounts"


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def _saved(case: Case, fn: Fn, inputs: tuple[Any, ...]) -> int:
    """Bytes of the storages that autograd keeps, those of the inputs left out."""
    own = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, torch.Tensor)}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = fn(*inputs)
        del result
    return sum(kept.values())
