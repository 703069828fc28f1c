"""What hardware counters say: DRAM bytes from ncu's table, joules from a counter that moves in steps; MLPerf's lines.

Neither tool is here. The table is written as `ncu --csv --page raw` prints it; the counters are stand-ins.
"""

import json
import sys
import types

import pytest
import torch
from bench_rows import make_row

from m2train.bench import dram, energy
from m2train.bench.mllog import MARK, MLLog
from m2train.bench.rows import append_row, read_rows

NCU = """\
==PROF== Connected to process 4242
something that the program printed, with "quotes"
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes_read.sum","dram__bytes_write.sum"
"","","","","","","","","","","","Mbyte","Kbyte"
"0","4242","python3","127.0.0.1","void softmax<float>(float *, int)","1","7","(256, 1, 1)","(1024, 1, 1)","0","9.0",\
"1,234.5","250"
"1","4242","python3","127.0.0.1","policy_loss_kernel","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0","10.5","0"
"""


def test_dram_bytes_of_all_kernels():
    assert dram.total(NCU) == pytest.approx(1234.5e6 + 10.5e6 + 250e3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== no permission", "no table"),
        (NCU.replace("dram__bytes_write.sum", "other"), "dram__bytes_write.sum"),
        (NCU.replace('"Kbyte"', '"furlong"'), "furlong"),
        (NCU.replace('"10.5"', '"n/a"'), "DCGM"),
        ("\n".join(NCU.splitlines()[:5]), "0 kernels"),
    ],
)
def test_tables_that_say_nothing_are_messages(text, message):
    with pytest.raises(ValueError, match=message):
        dram.total(text)


def test_measured_bytes_go_into_the_newest_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        make_row(device="cuda", created="2026-01-01"),
        make_row(device="cuda", created="2026-01-03"),
        make_row(device="cuda", created="2026-01-04", impl="torch"),
        make_row(created="2026-01-05"),
    ]
    for row in rows:
        append_row(path, row)
    launch = ("policy_loss", "m2", "32k", "both", "float32")
    assert "+20.0 %" in dram.merge(path, launch, 1.2e6)  # 1e6 are stated
    found = read_rows([path])
    assert [row.physics.dram_bytes for row in found] == [None, 1.2e6, None, None]
    assert "+20.0 % off" in found[1].physics.note
    dram.merge(path, launch, 1.01e6)
    note = read_rows([path])[1].physics.note
    assert note == "", "a second measurement replaces the first"
    with pytest.raises(ValueError, match="no timed CUDA row"):
        dram.merge(path, ("policy_loss", "m2", "32k", "fwd", "float32"), 1.0)


# ------------------------------------------------------------------------------------------------- energy


class Board:
    """Each launch takes 10 ms and 3 J; the counter shows what had been used when it last moved, every 50 ms."""

    def __init__(self, moves=True):
        self.now, self.used, self.shown, self.moves = 0.0, 0.0, 100.0, moves

    def launch(self):
        before = int(self.now / 0.05)
        self.now += 0.01
        self.used += 3.0
        if self.moves and int(self.now / 0.05 + 1e-9) > before:
            self.shown = 100.0 + self.used


@pytest.mark.parametrize("seconds", [0.1, 0.33, 1.0])
def test_joules_of_a_launch(seconds):
    board = Board()
    found = energy.joules(board.launch, lambda: board.shown, seconds, clock=lambda: board.now)
    assert found == pytest.approx(3.0, rel=1e-6)


def test_a_counter_that_stands_still_gives_no_figure():
    board = Board(moves=False)
    assert energy.joules(board.launch, lambda: board.shown, 0.1, clock=lambda: board.now) is None


def test_no_counter_is_a_reason(monkeypatch):
    assert energy.counter(torch.device("cpu")) == (None, "the CPU's counters need root")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "not installed" in energy.counter(torch.device("cuda"))[1]


def test_nvml_counter(monkeypatch):
    class NVMLError(Exception):
        pass

    asked = []
    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 2500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="ab-cd"))
    read, why = energy.counter(torch.device("cuda"))
    assert why == "" and read() == 2.5 and asked == ["GPU-ab-cd"]

    def fail(handle):
        raise NVMLError("Not Supported")

    fake.nvmlDeviceGetTotalEnergyConsumption = fail
    assert energy.counter(torch.device("cuda")) == (None, "NVML: Not Supported")


# ------------------------------------------------------------------------------------------------- MLPerf's lines


def test_mllog(tmp_path):
    times = iter([10.0, 10.5, 12.25])
    log = MLLog(tmp_path / "a" / "log.txt", clock=lambda: next(times))
    log.event("submission_benchmark", "step")
    with log.interval("step", variant="tree", step_num=3) as ended:
        ended["seconds"] = 1.75
    lines = (tmp_path / "a" / "log.txt").read_text().splitlines()
    assert all(line.startswith(MARK) for line in lines)
    point, start, end = (json.loads(line.removeprefix(MARK)) for line in lines)
    assert point["event_type"] == "POINT_IN_TIME" and point["value"] == "step"
    assert start["event_type"] == "INTERVAL_START" and start["time_ms"] == 10500 and start["value"] is None
    assert end["event_type"] == "INTERVAL_END" and end["value"] == {"seconds": 1.75} and end["key"] == "step"
    assert end["metadata"] == start["metadata"] == {"variant": "tree", "step_num": 3}
    assert set(point) == {"namespace", "time_ms", "event_type", "key", "value", "metadata"}
    with MLLog(None).interval("step"):
        pass
