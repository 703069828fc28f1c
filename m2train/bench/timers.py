"""Clocks. Every row names its own: they measure different things, and differ several-fold for short launches.

cpu       CPU time of the process, all threads: does not count the time that neighbours take; the default on a CPU
wall      elapsed time
callgrind instructions executed, under valgrind (its emulated CPU has no AVX-512): exact, but no time
events    CUDA events around the launches: counts gaps of a stream that Python cannot fill
graph     the launches captured in one CUDA graph: no launch overhead
kineto    summed duration of the kernels alone (CUPTI, through torch.profiler)
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from m2train.bench import callgrind
from m2train.bench.launch import Launch, arm

CPU_TIMERS = ("cpu", "wall", "callgrind")
CUDA_TIMERS = ("events", "graph", "kineto", "wall")


class Timer(ABC):
    """Measures some launches; `unit` is s, or instructions."""

    name: str
    unit = "s"
    bwd_alone = True
    """Whether a backward can be timed without its forward."""

    @abstractmethod
    def time(self, launches: Sequence[Launch]) -> float:
        """Seconds (or instructions) a launch, over these launches."""

    def settle(self) -> None:  # noqa: B027  (on a CPU a call that has returned is done)
        """Wait until nothing is running."""

    def forget(self) -> None:  # noqa: B027  (most keep nothing)
        """Let go of what is kept for launches that have been timed."""


class CpuTimer(Timer):
    """CPU time of the process."""

    name = "cpu"

    def time(self, launches: Sequence[Launch]) -> float:
        arm(launches)
        start = time.process_time_ns()
        for one in launches:
            one()
        return (time.process_time_ns() - start) * 1e-9 / len(launches)


class WallTimer(Timer):
    """Elapsed time; on CUDA between two synchronisations of the whole device."""

    name = "wall"

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda

    def settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def time(self, launches: Sequence[Launch]) -> float:
        arm(launches)
        self.settle()
        start = time.perf_counter_ns()
        for one in launches:
            one()
        self.settle()
        return (time.perf_counter_ns() - start) * 1e-9 / len(launches)


class CallgrindTimer(Timer):
    """Instructions, in a worker that runs under valgrind."""

    name = "callgrind"
    unit = "instructions"

    def time(self, launches: Sequence[Launch]) -> float:
        arm(launches)
        with callgrind.counting() as count:
            for one in launches:
                one()
        return count.instructions / len(launches)


class EventTimer(Timer):
    """CUDA events on the current stream."""

    name = "events"

    def settle(self) -> None:
        torch.cuda.synchronize()

    def time(self, launches: Sequence[Launch]) -> float:
        arm(launches)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for one in launches:
            one()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3 / len(launches)


class GraphError(RuntimeError):
    """Launches that cannot be captured: they synchronise with the host, or allocate in ways that capture forbids."""


class GraphTimer(Timer):
    """One replay of a graph that holds the launches; captured once for the same launches."""

    name = "graph"
    bwd_alone = False

    def __init__(self) -> None:
        # With the launches, which it keeps alive: another launch at a freed one's address would find the wrong graph.
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, list[Launch]]] = {}

    def settle(self) -> None:
        torch.cuda.synchronize()

    def forget(self) -> None:
        self._graphs.clear()

    def time(self, launches: Sequence[Launch]) -> float:
        key = tuple(id(one) for one in launches)
        if key not in self._graphs:
            try:
                self._graphs[key] = (_capture(launches), list(launches))
            except RuntimeError as err:
                raise GraphError(" ".join(str(err).split())[:200]) from err
        graph, _ = self._graphs[key]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3 / len(launches)


def _capture(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first launch sets up must not be captured
        for one in launches[:2]:
            one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in launches:
            one()
    return graph


class KinetoTimer(Timer):
    """Summed duration of the kernels, as CUPTI reports it."""

    name = "kineto"

    def settle(self) -> None:
        torch.cuda.synchronize()

    def time(self, launches: Sequence[Launch]) -> float:
        from torch.profiler import ProfilerActivity, profile

        arm(launches)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for one in launches:
                one()
            torch.cuda.synchronize()
        total_us = sum(event.self_device_time_total for event in found.key_averages())
        if total_us <= 0:
            raise RuntimeError("the profiler saw no kernel: is another tool holding CUPTI?")
        return total_us * 1e-6 / len(launches)


def check_timer(name: str, device: str) -> str:
    """The name, if there is such a timer on this device.

    Raises:
        ValueError: there is none, or it cannot run here.
    """
    allowed = CUDA_TIMERS if device == "cuda" else CPU_TIMERS
    if name not in allowed:
        raise ValueError(f"got timer {name!r} on {device}; expected one of {', '.join(allowed)}")
    why = callgrind.unavailable() if name == "callgrind" else None
    if why is not None:
        raise ValueError(f"timer callgrind: {why}")
    return name


def make_timer(name: str, device: torch.device) -> Timer:
    """The timer of this name.

    Raises:
        ValueError: as `check_timer`, or callgrind is asked for outside of valgrind.
    """
    check_timer(name, device.type)
    if name == "wall":
        return WallTimer(device.type == "cuda")
    if name == "callgrind":
        callgrind.require()
    kinds: dict[str, type[Timer]] = {
        "cpu": CpuTimer,
        "callgrind": CallgrindTimer,
        "events": EventTimer,
        "graph": GraphTimer,
        "kineto": KinetoTimer,
    }
    return kinds[name]()


def default_timer(device: torch.device) -> str:
    """cpu, or graph: the one that counts no launch overhead (a row names it)."""
    return "graph" if device.type == "cuda" else "cpu"
