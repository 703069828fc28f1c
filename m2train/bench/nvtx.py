"""NVTX ranges for profilers, where the nvtx package is installed; nothing without it, which `m2bench env` says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


def version() -> str | None:
    """Of the nvtx package, or None."""
    if importlib.util.find_spec("nvtx") is None:
        return None
    try:
        return importlib.metadata.version("nvtx")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@contextmanager
def launch_range(name: str) -> Iterator[None]:
    """`name` as a push/pop range inside a start/end range `m2bench`, in the trainer's domain.

    The outer name needs no escaping in a profiler's filter; ncu takes the slashes of the inner one for nesting.
    """
    try:
        import nvtx
    except ImportError:
        yield
        return
    domain = nvtx.get_domain("m2")
    outer = domain.start_range(domain.get_event_attributes(message="m2bench"))
    domain.push_range(domain.get_event_attributes(message=name))
    try:
        yield
    finally:
        domain.pop_range()
        domain.end_range(outer)
