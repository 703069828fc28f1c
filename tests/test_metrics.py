"""metrics.jsonl survives kills and resumes; phases are wall-clock across tasks."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import bare_run, without_times

from m2train.metrics import MetricsWriter, read_metrics
from m2train.phases import Phases
from m2train.progress import Progress
from m2train.rundir import RunDir


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_step_comes_first_and_keys_are_sorted(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.append({"b": 1, "step": 3, "a": 0.5, "name": "x", "none": None})
    assert lines(tmp_path) == ['{"step": 3, "a": 0.5, "b": 1, "name": "x", "none": null}']
    assert read_metrics(tmp_path) == [{"step": 3, "a": 0.5, "b": 1, "name": "x", "none": None}]


def test_a_row_is_on_disk_before_append_returns(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.append({"step": 0, "a": 1.0})
    assert len(read_metrics(tmp_path)) == 1
    writer.close()


def test_nan_and_infinity_become_null_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer, caplog.at_level(logging.WARNING):
        writer.append({"step": 0, "a": float("nan"), "b": float("-inf"), "c": 2.0})
    assert read_metrics(tmp_path) == [{"step": 0, "a": None, "b": None, "c": 2.0, "warnings/nonfinite": 2}]
    assert "2 metrics are NaN" in caplog.text


def test_numpy_scalars_are_numbers_and_other_objects_are_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.append({"step": np.int64(1), "a": np.float32(0.5), "b": np.int32(2)})
        with pytest.raises(ValueError, match="'a' is a list"):
            writer.append({"step": 2, "a": [1]})  # type: ignore[dict-item]
        for bad in (None, True, 1.5, "1"):
            with pytest.raises(ValueError, match="integer 'step'"):
                writer.append({"step": bad, "a": 1})
    assert read_metrics(tmp_path) == [{"step": 1, "a": 0.5, "b": 2}]


def test_truncate_drops_later_steps_only(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(6):
            writer.append({"step": step, "a": step / 7})
        assert writer.truncate(3) == 2
        assert writer.truncate(3) == 0
        writer.append({"step": 4, "a": -1.0})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[3]["a"] == 3 / 7 and rows[4]["a"] == -1.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_below_the_first_step_empties_the_file(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        assert writer.truncate(-1) == 0
        writer.append({"step": 0})
        assert writer.truncate(-1) == 1
    assert lines(tmp_path) == []


@pytest.mark.parametrize("tail", ['{"step": 2, "a": 0.', '{"step": 2', "\0\0\0", "\udcff"])
def test_a_torn_last_line_is_cut_off_on_opening(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail.encode(errors="surrogateescape"))
    assert read_metrics(tmp_path) == [{"step": 1}]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.append({"step": 2})
    assert lines(tmp_path) == ['{"step": 1}', '{"step": 2}']


def test_a_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.append({"step": 3})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_unreadable_lines_in_the_middle_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nxx\n[]\n{"a": 1}\n{"step": 2}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert "3 unreadable lines" in caplog.text
    assert read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_holds_the_same_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        assert writer.tensorboard_reason is None
        for step in range(4):
            writer.append({"step": step, "reward/mean": step / 4, "bad": float("nan"), "name": "x"})
        writer.truncate(1)
        writer.append({"step": 2, "reward/mean": 9.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean", "warnings/nonfinite"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [
        (0, 0.0),
        (1, 0.25),
        (2, 9.0),
    ]


def test_without_tensorboard_the_reason_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with MetricsWriter(tmp_path) as writer:
        writer.append({"step": 0, "a": 1.0})
        assert writer.tensorboard_reason is not None
    assert "no TensorBoard files" in caplog.text
    assert len(read_metrics(tmp_path)) == 1


def test_what_is_compared_of_two_runs_leaves_out_times_alone() -> None:
    """Names that merely hold `_s` were left out too."""
    same = {"step": 1, "reward/group_std": 0.5, "policy/num_bad_seq": 2.0}
    times = {"time/train": 1.0, "sync/total_s": 1.0, "learner/plan_wait_s": 1.0, "export_seconds": 1.0}
    assert without_times(same | times) == same


class Engines:
    """A pool of which only the number of restarts is asked."""

    restarts_total = 0


def test_restarts_of_engines_are_in_every_row_and_told_once(tmp_path: Path) -> None:
    out, engines = io.StringIO(), Engines()
    with MetricsWriter(tmp_path, tensorboard=False) as metrics, Progress(out) as progress:
        run = bare_run(RunDir(tmp_path), engines=engines, metrics=metrics, progress=progress)
        for step, restarts in enumerate((0, 2, 2)):
            engines.restarts_total = restarts
            run.record(step, {"groups/count": 1.0})
    assert [row["engine/restarts"] for row in read_metrics(tmp_path)] == [0.0, 2.0, 2.0]
    assert out.getvalue().count("engine restarts: 2 in this step, 2 so far") == 1


def test_phases_add_up_and_reset() -> None:
    clock = Clock()
    phases = Phases(clock)
    for seconds in (2.0, 3.0):
        with phases("train"):
            clock.now += seconds
    with pytest.raises(KeyError), phases("eval"):
        clock.now += 1.0
        raise KeyError
    assert phases.take() == {"time/eval": 1.0, "time/train": 5.0}
    assert phases.take() == {}


def test_a_phase_that_many_tasks_are_in_is_counted_once() -> None:
    clock = Clock()
    phases = Phases(clock)

    async def task(start: int, end: int) -> None:
        for _ in range(start):
            await asyncio.sleep(0)
        with phases("grade"):
            for _ in range(end - start):
                await asyncio.sleep(0)

    async def tick() -> None:
        for _ in range(10):
            clock.now += 1.0
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(tick(), *(task(1, 6) for _ in range(4)))

    asyncio.run(main())
    assert phases.take() == {"time/grade": 5.0}


def test_an_open_phase_is_split_between_steps() -> None:
    clock = Clock()
    phases = Phases(clock)
    with phases("eval"):
        clock.now += 2.0
        assert phases.take() == {"time/eval": 2.0}
        clock.now += 1.5
    assert phases.take() == {"time/eval": 1.5}
