"""Plain lines without a terminal; a live display that leaves no mess with one."""

from __future__ import annotations

import io
from pathlib import Path

from m2train.config import Recipe
from m2train.progress import Progress
from m2train.records import StepRollouts
from m2train.stats import rollout_row

ROW = {
    "step": 0,
    "groups/count": 2.0,
    "reward/mean": 0.41234,
    "heldout/reward": 0.3,
    "tokens/generated": 5000.0,
    "time/dialogues": 6.0,
    "time/train": 3.5,
    "time/sync": 0.0,
}


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def recipe(steps: int = 10) -> Recipe:
    return Recipe(name="demo", steps=steps, seed=4)


def test_one_line_a_step_without_a_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock=clock) as progress:
        progress.start(recipe(), Path("runs/demo"))
        for _ in range(3):
            progress.phase("replies", 3, 32)
            clock.now += 10.0
            progress.step(ROW)
        progress.finish({"held-out reward": "0.30 -> 0.50", "loss": 0.123456, "n": 3})
    text = stream.getvalue()
    assert text.isascii() and "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "m2train demo: smollm2-135m, 10 steps of 8 x 8 replies"
    steps = [line for line in lines if line.startswith("step")]
    assert steps[0] == (
        "step  1/10  reward 0.4123  held-out 0.3  500 tok/s  10.0 s (dialogues 6.0, train 3.5)  90.0 s left"
    )
    assert len(steps) == 3 and "replies 3/32" not in text
    assert lines[-3:] == [
        "  held-out reward  0.30 -> 0.50",
        "  loss             0.1235",
        "  n                3",
    ]


def test_time_left_is_the_median_of_recent_steps_and_survives_resuming() -> None:
    clock = Clock()
    with Progress(io.StringIO(), clock=clock) as progress:
        progress.start(recipe(40), Path("r"), done=20)
        assert progress.time_left() is None
        for seconds in (10, 10, 500, 10, 10):  # one step held an evaluation
            clock.now += seconds
            progress.step(ROW)
        assert progress.time_left() == 15 * 10


def test_last_step_has_no_time_left_and_evaluation_is_no_step() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock=clock) as progress:
        progress.start(recipe(1), Path("r"))
        clock.now += 5
        progress.step(ROW)
        clock.now += 7
        progress.step({"step": 1, "heldout/reward": 0.5})
        assert progress.time_left() == 0
    lines = stream.getvalue().splitlines()
    assert lines[-2].startswith("step 1/1") and "left" not in lines[-2]
    assert lines[-1] == "evaluation: held-out reward 0.5, 7.0 s"


def test_a_step_that_lost_all_its_slices_is_a_step_and_names_the_drops() -> None:
    stream, clock = io.StringIO(), Clock()
    lost = StepRollouts(step=0, weight_version="x", dialogues=[], groups=[], drops={"repeated": 2, "empty": 1})
    with Progress(stream, clock=clock) as progress:
        progress.start(recipe(2), Path("r"))
        clock.now += 5
        progress.step({"step": 0, "heldout/reward": 0.5, **rollout_row(lost, trained=True)})
        assert progress.time_left() == 5.0
    line = stream.getvalue().splitlines()[-1]
    assert line.startswith("step 1/2  reward -  held-out 0.5  dropped (empty 1, repeated 2)")


def test_missing_and_null_metrics_do_not_stop_a_line() -> None:
    stream = io.StringIO()
    with Progress(stream, clock=Clock()) as progress:
        progress.start(recipe(), Path("r"))
        bare = {"step": 0, "groups/count": 2.0, "tokens/generated": None, "time/train": None}
        progress.step(bare | {"reward/mean": 0.5})
        progress.step({"step": 1, "reward/mean": None})
    assert "step  1/10  reward 0.5" in stream.getvalue()


def test_a_long_step_says_where_it_is() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock=clock, heartbeat_s=60) as progress:
        progress.start(recipe(), Path("r"))
        for done in range(10):
            clock.now += 13
            progress.phase("grading", done, 32)
    beats = [line for line in stream.getvalue().splitlines() if "grading" in line]
    assert beats == [
        "  step 1/10: grading 4/32, 65 s so far",
        "  step 1/10: grading 9/32, 130 s so far",
    ]


def test_escape_codes_and_markup_are_inert() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Progress(stream, clock=Clock()) as progress:
            progress.start(recipe(), Path("r"))
            progress.note("bad \x1b[31m\x07 text\nnext [red]line[/red] [/]")
        assert "\x07" not in stream.getvalue() and "\x1b[31m" not in stream.getvalue()
        assert "bad  [31m  text next [red]line[/red] [/]" in stream.getvalue()


def test_a_terminal_gets_bars_and_the_same_lines() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock=clock) as progress:
        progress.phase("before start", 0, 1)
        progress.start(recipe(), Path("r"))
        progress.phase("grading [x]", 1, 2)
        progress.phase("train")
        clock.now += 4
        progress.step(ROW)
        progress.finish({"state": "finished"})
    text = stream.getvalue()
    assert "reward 0.4123" in text and "finished" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is shown again


def test_leaving_by_an_exception_restores_the_terminal() -> None:
    stream = Terminal()
    try:
        with Progress(stream) as progress:
            progress.start(recipe(), Path("r"))
            raise RuntimeError
    except RuntimeError:
        pass
    assert "\x1b[?25h" in stream.getvalue()
