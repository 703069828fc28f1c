"""Seconds per phase of a step, and NVTX ranges that show the same phases in Nsight Systems.

Phases may be entered by many asyncio tasks at once. A phase's time is wall-clock: the time during
which at least one task is in it. Start/end ranges are used, not push/pop: tasks interleave, so
ranges do not close in stack order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DOMAIN = "m2"


class Phases:
    """`with phases("rollout"):` adds to that phase's seconds; `take()` hands them over."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._open: dict[str, tuple[int, float]] = {}  # name -> (how many are inside, since when)
        self._domain = _nvtx_domain()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as phase `name`, also when it raises."""
        mark = None
        if self._domain is not None:
            mark = self._domain.start_range(self._domain.get_event_attributes(message=name))
        with self._lock:
            count, since = self._open.get(name, (0, 0.0))
            self._open[name] = (count + 1, since if count else self._clock())
        try:
            yield
        finally:
            with self._lock:
                count, since = self._open.pop(name)
                if count > 1:
                    self._open[name] = (count - 1, since)
                else:
                    self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - since
            if self._domain is not None:
                self._domain.end_range(mark)

    def take(self) -> dict[str, float]:
        """`{"time/<phase>": seconds}` since the last call; an open phase is counted up to now."""
        with self._lock:
            now = self._clock()
            for name, (count, since) in self._open.items():
                self._seconds[name] = self._seconds.get(name, 0.0) + now - since
                self._open[name] = (count, now)
            seconds, self._seconds = self._seconds, {}
        return {f"time/{name}": value for name, value in sorted(seconds.items())}


def _nvtx_domain() -> Any:
    """The NVTX domain; None (a phase then costs two clock reads) without the package or NVTX."""
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx.get_domain(DOMAIN) if nvtx.enabled() else None
