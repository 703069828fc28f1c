"""Energy of a launch, from NVML's counter of the whole board (Volta and later): idle power and neighbours are in it.

The counter moves in steps of some tens of milliseconds. So launches are repeated from one step of it to a later one,
and the joules between the two steps are divided by the launches between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Read = Callable[[], float]
"""The counter, in joules."""
PATIENCE_S = 2.0
"""A counter that stands still that long is not measured by."""


def counter(device: torch.device) -> tuple[Read | None, str]:
    """(the counter of `device`, "") or (None, why there is none)."""
    if device.type != "cuda":
        return None, "the CPU's counters need root"
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as err:
        return None, f"NVML: {err}"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, ""


def joules(
    launch: Callable[[], object], read: Read, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float | None:
    """Energy of a launch; None where the counter does not move.

    Args:
        launch: returns when its work is done.
        read: the counter.
        seconds: how long to repeat, at the least.
        clock: seconds.
    """
    start = clock()
    before = first = read()
    while before == first:  # begin where the counter has just moved
        launch()
        before = read()
        if clock() - start > PATIENCE_S:
            return None
    start, count, after = clock(), 0, before
    last, since = before, start
    while True:
        launch()
        count += 1
        after = read()
        if after != last:
            if clock() - start >= seconds:
                return (after - before) / count
            last, since = after, clock()
        elif clock() - since > PATIENCE_S:
            return None
