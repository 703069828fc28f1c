"""What a measuring process does when its clock does not fit, and when its GPU is gone; on stand-ins for both."""

import gc
import os
import time
import types

import pytest
import torch
from bench_rows import CASE_FILE

from m2train.bench import env, measurement, timers, worker
from m2train.bench.timers import CpuTimer, GraphError, GraphTimer

HOW = {"cache": "warm", "budget_s": 0.01, "warmup_s": 0.0, "min_sample_s": 1e-4}


class NoCapture(GraphTimer):
    """A CUDA graph that cannot hold what is launched."""

    def settle(self):
        pass

    def time(self, launches):
        raise GraphError("operation not permitted when stream is capturing")


class Events(CpuTimer):
    name = "events"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """With the tiny case open, on the CPU, its timer a graph."""
    (tmp_path / "bench_tiny.py").write_text(CASE_FILE)
    kinds = {"graph": NoCapture, "events": Events, "wall": Events}
    monkeypatch.setattr(worker, "make_timer", lambda name, device: kinds[name]())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    config = {"device": "cpu", "threads": 1, "cases": str(tmp_path), "timer": "graph"}
    made = worker.Server(config)
    assert made.open("tiny", "small", "float32")["bytes"] == 256
    return made


def test_one_clock_for_all_that_are_compared(server):
    found = server.measure("fwd", ["m2", "torch"], **HOW)
    assert found["timer"] == "events" and "cannot be captured" in found["note"] and "m2" in found["note"]
    assert all(len(found["samples"][name]) >= 5 for name in ("m2", "torch"))
    with pytest.raises(GraphError):  # another process had a graph: this one must not have another clock
        server.measure("fwd", ["m2", "torch"], timer="graph", **HOW)


def test_armed_on_a_core(server):
    """The launches that `compare` alternates run where it says."""
    free = os.sched_getaffinity(0)
    server.timer = Events()
    try:
        server.arm("fwd", "warm", "m2", 0.0, 1e-4, cores=[max(free)])
        assert all(os.sched_getaffinity(int(t)) == {max(free)} for t in os.listdir("/proc/self/task"))
        assert len(server.sample(3)) == 3
    finally:
        env.pin(free)
        gc.enable()  # arming turns it off


def test_slow_launches_take_fewer_rounds(monkeypatch):
    """Two, once five would take many times the budget; one that takes long needs no second launch to be warm."""
    monkeypatch.setattr(measurement, "OVERDRAWN_S", 0.0)
    monkeypatch.setattr(measurement, "SLOW_S", 0.005)
    calls = []
    slow = measurement.Ready([lambda: calls.append(time.sleep(0.02))])
    assert measurement.warm(slow, CpuTimer(), 1e-3, 0.0, compiles=False) is slow and len(calls) == 1
    measurement.warm(slow, CpuTimer(), 1e-3, 0.0, compiles=True)
    assert len(calls) == 4  # the first may have compiled
    run = measurement.Measurement({"m2": slow}, CpuTimer())
    assert run.run(0.001) == "budget" and len(run.samples["m2"]) == measurement.FEW_ROUNDS
    run = measurement.Measurement({"m2": slow}, CpuTimer())
    run.run(0.08)
    assert len(run.samples["m2"]) == measurement.MIN_ROUNDS


def test_a_case_names_the_clock_that_it_needs(server):
    object.__setattr__(server.bench.case, "cuda_timer", "wall")
    found = server.measure("fwd", ["m2"], **HOW)
    assert found["timer"] == "events" and found["note"] == ""  # the stand-in of wall; nothing was tried before


def test_a_case_that_cannot_be_built_is_an_answer(server):
    spec = server.specs["tiny"]
    server.specs["tiny"] = types.SimpleNamespace(make=lambda *args, **kw: {}["n"], shapes=spec.shapes)
    assert server.open("tiny", "small", "float32") == {"failed": "the case cannot be built: KeyError: 'n'"}


def test_an_implementation_that_breaks_the_gpu_is_named(server, monkeypatch):
    assert set(server.check("fwd", ["m2", "off"])) == {"m2", "off"}  # wrong, and the GPU is fine
    monkeypatch.setattr(server, "_lost", lambda: True)
    found = server.check("fwd", ["m2", "off", "torch"])
    assert found["lost"] == "off" and "CUDA context" in found["reason"]


def test_graphs_are_of_these_launches_and_no_others(monkeypatch):
    """A launch at the address of one that is gone must not get its graph."""
    captured = []

    class Graph:
        def __init__(self, launches):
            captured.append(list(launches))

        def replay(self):
            pass

    event = types.SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 1.0)
    monkeypatch.setattr(timers, "_capture", Graph)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = GraphTimer()
    for number in range(50):
        assert timer.time([lambda number=number: number]) == 1e-3  # each is freed, unless the timer keeps it
    assert [one[0]() for one in captured] == list(range(50))
    timer.forget()
    assert not timer._graphs


def test_a_ceiling_is_launched_and_timed_but_never_checked(server):
    """Its results are wrong, and do not come near the check before the clock or the one after it."""
    found = server.check("fwd", ["bound", "off"])
    assert found["bound"]["numerics"]["verdict"] == "unchecked" and "memory" not in found["bound"]
    assert found["off"]["numerics"]["verdict"] == "refused"
    timed = server.measure("fwd", ["bound", "m2"], **HOW)
    assert min(timed["samples"]["bound"]) > 0 and timed["stale"] == {}
    assert server.check("both", ["bound"])["bound"]["numerics"]["verdict"] == "unchecked"
    object.__setattr__(server.bench.case.impls["bound"], "fn", lambda x: x.no_such_attribute)
    assert server.check("fwd", ["bound"])["bound"]["numerics"]["verdict"] == "refused"  # before it can end a run
