"""What this very machine can do at best, measured; no data-sheet constants anywhere.

Kept in a file keyed by machine, device and threads, so that a row's share of the speed of light is of the machine
that the row was measured on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from m2train.bench.env import cache_bytes
from m2train.bench.schema import Bound, Physics
from m2train.bench.timers import Timer, make_timer
from m2train.files import write_atomic

Ceilings = dict[str, float]


def default_file() -> Path:
    """$XDG_CACHE_HOME/m2bench/ceilings.json."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "m2bench" / "ceilings.json"


def key(machine_id: str, device: torch.device, threads: int) -> str:
    """What ceilings are stored under."""
    return f"{machine_id}/{device.type}" + (f"/{threads}" if device.type == "cpu" else "")


def stored(path: Path, machine_id: str, device: torch.device, threads: int) -> Ceilings | None:
    """The ceilings of a machine, or None."""
    if not path.exists():
        return None
    found = json.loads(path.read_text()).get(key(machine_id, device, threads))
    return None if found is None else {name: float(value) for name, value in found.items()}


def store(path: Path, machine_id: str, device: torch.device, threads: int, found: Ceilings) -> None:
    """Add the ceilings of a machine to the file."""
    everything: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    everything[key(machine_id, device, threads)] = found
    write_atomic(path, json.dumps(everything, indent=1) + "\n")


def measure(device: torch.device, threads: int, seconds: float = 0.5) -> Ceilings:
    """Measure all ceilings; each takes about `seconds`. The best of many launches counts.

    copy, read, write   B/s of memory (a copy counts both ways); copy_cached: within half of the last-level cache
    fp32, bf16          FLOP/s of a large square GEMM
    launch_<timer>      seconds of an op on one element, by that clock
    """
    torch.set_num_threads(threads)
    found = _measured(device, threads, seconds)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the measuring processes have the same GPU
    return found


def _measured(device: torch.device, threads: int, seconds: float) -> Ceilings:
    timer = make_timer("events" if device.type == "cuda" else "cpu" if threads == 1 else "wall", device)
    cache = cache_bytes(device)
    found: Ceilings = {}
    large = max(4 * cache, 2**26 if device.type == "cpu" else 2**30) // 4
    source, target = (torch.ones(large, device=device) for _ in range(2))
    found["copy"] = 2 * source.nbytes / _best(timer, lambda: target.copy_(source), seconds)
    found["read"] = source.nbytes / _best(timer, lambda: source.sum(), seconds)
    found["write"] = source.nbytes / _best(timer, lambda: target.fill_(1.0), seconds)
    small = cache // 16
    source, target = (torch.ones(small, device=device) for _ in range(2))
    # Many at once: on a GPU one is over before the next is launched.
    found["copy_cached"] = 2 * source.nbytes / _best(timer, lambda: target.copy_(source), seconds, many=64)
    size = 1024 if device.type == "cpu" else 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * size**3 / _best(timer, lambda a=a, b=b: a @ b, seconds)  # type: ignore[misc]
    one = torch.zeros(1, device=device)
    for name in ("cpu", "wall") if device.type == "cpu" else ("graph", "events", "wall"):
        found[f"launch_{name}"] = _best(make_timer(name, device), lambda: one.add_(1.0), seconds / 4, many=64)
    return found


def _best(timer: Timer, run: Callable[[], Any], seconds: float, many: int = 1) -> float:
    """Least seconds of a launch within a time budget, after a warm-up of a quarter of it."""
    launches: Sequence[Callable[[], Any]] = [run] * many
    spent, best, total = 0.0, float("inf"), 0
    while spent < seconds or total < 5:
        took = timer.time(launches)
        spent += max(took * many, 1e-7)
        total += 1
        if spent > seconds / 4 or total > 3:
            best = min(best, took)
    return best


def physics(
    bytes_moved: float | None,
    flops: float | None,
    ceilings: Ceilings | None,
    *,
    seconds: float | None,
    dtype: str,
    timer: str,
    in_cache: bool,
    threads: int,
) -> Physics:
    """Speed of light of a launch, and how near to it a time is.

    Args:
        bytes_moved, flops: as the case states them.
        ceilings: of the machine; None: not calibrated.
        seconds: measured time; None: the timer does not measure time.
        dtype: chooses the GEMM ceiling.
        timer: chooses the floor of a launch.
        in_cache: the data stayed in the last-level cache: that bandwidth is the ceiling.
        threads: CPU time of several threads is no elapsed time, and has no speed of light.
    """
    found = Physics(bytes=bytes_moved, flops=flops)
    if ceilings is None:
        found.note = "no ceilings for this machine: run `m2bench calibrate`"
        return found
    if seconds is None or (timer == "cpu" and threads > 1):
        found.note = f"no speed of light for timer {timer} with {threads} threads"
        return found
    found.bandwidth = ceilings["copy_cached" if in_cache else "copy"]
    found.peak = ceilings["bf16" if dtype in ("bfloat16", "float16") else "fp32"]
    found.floor_s = ceilings.get(f"launch_{timer}", 0.0)
    if bytes_moved is None and flops is None:
        found.note = "the case states neither bytes nor FLOPs for this phase"
        return found
    times: dict[Bound, float] = {
        "memory": (bytes_moved or 0.0) / found.bandwidth,
        "compute": (flops or 0.0) / found.peak,
        "launch": found.floor_s,
    }
    found.sol_s = max(times.values())
    found.bound = next(name for name, value in times.items() if value == found.sol_s)
    found.sol_percent = 100 * found.sol_s / seconds
    if found.sol_percent > 105:
        found.note = "faster than the speed of light: stated bytes or FLOPs, or the ceilings, are wrong"
    return found
