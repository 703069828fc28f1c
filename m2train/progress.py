"""What a person sees of a run: a live display on a terminal, one plain line a step elsewhere.

The finished steps scroll by as lines in both cases; a terminal has two bars below them (the run,
and the phase that the step is in). Text that comes from models or exceptions is shown with its
control characters removed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from m2train.config import Recipe

RECENT_STEPS = 20
TOTAL_KEYS = ("time/step", "time/total")


class Progress:
    """Context manager around a run.

    Args:
        stream: where to write; standard output by default. The live display is used when it is a
            terminal.
        heartbeat_s: without a terminal, a step that lasts longer than this says which phase it is
            in, this often.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        heartbeat_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._steps = 0
        self._done = 0
        self._last = self._spoke = clock()
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._live = _Live(self._stream) if self._stream.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def start(self, recipe: Recipe, run_dir: Path, *, done: int = 0) -> None:
        """Announce the run.

        Args:
            recipe: its name, step count and sizes are shown.
            run_dir: where its files are.
            done: steps finished before, for a resumed run.
        """
        self._steps, self._done = recipe.steps, done
        self._last = self._spoke = self._clock()
        learner, rollout, algo = recipe.learner, recipe.rollout, recipe.algo
        engines = f"{len(rollout.urls)} given" if rollout.urls else f"{rollout.servers} started here"
        groups = rollout.cases_per_step * rollout.slices_per_dialogue
        self._say(
            f"m2train {recipe.name}: {recipe.model.path}, {recipe.steps} steps of "
            f"{groups} x {algo.group_size} replies"
        )
        self._say(
            f"  learner tp {learner.tp} pp {learner.pp} dp {learner.dp}; "
            f"rollout engines: {engines}; seed {recipe.seed}"
        )
        self._say(f"  run directory {run_dir}" + (f", resumed after step {done}" if done else ""))
        if self._live is not None:
            self._live.start(self._steps, done)

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """The current step is in phase `name`, `done` of `total` through (None: no count)."""
        count = f" {done}/{total}" if total else ""
        if self._live is not None:
            self._live.phase(_printable(name), done, total)
        elif self._clock() - self._spoke >= self._heartbeat_s:
            seconds = self._clock() - self._last
            where = f"step {self._done + 1}/{self._steps}" if self._done < self._steps else "after the last step"
            self._say(f"  {where}: {name}{count}, {seconds:.0f} s so far")

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is finished, with this row; one without `groups/count` was an evaluation alone."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        if "groups/count" not in row:  # no reward either, but that may be for want of replies
            held = _number(row.get("heldout/reward"))
            self._say(f"evaluation: held-out reward {held}, {_seconds(seconds)}")
            return
        self._recent.append(seconds)
        self._done += 1
        self._say(self._step_line(row, seconds))
        if self._live is not None:
            self._live.advance(self._done, self.time_left())

    def note(self, text: str) -> None:
        """One line that is not a step: a warning, a restart, a checkpoint."""
        self._say(text)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Close the display and print `summary`, one name and value a line."""
        if self._live is not None:
            self._live.stop()
        width = max((len(name) for name in summary), default=0)
        for name, value in summary.items():
            self._say(f"  {name:<{width}}  {_number(value) if isinstance(value, float) else value}")

    def time_left(self) -> float | None:
        """Seconds to the end: steps left x median recent step; None before the first step."""
        if not self._recent:
            return None
        return max(0, self._steps - self._done) * statistics.median(self._recent)

    def _step_line(self, row: Mapping[str, Any], seconds: float) -> str:
        width = len(str(self._steps))
        parts = [
            f"step {self._done:>{width}}/{self._steps}",
            f"reward {_number(row.get('reward/mean'))}",
        ]
        if row.get("heldout/reward") is not None:
            parts.append(f"held-out {_number(row['heldout/reward'])}")
        if drops := _drops(row):
            parts.append(drops)
        tokens = row.get("tokens/generated")
        if isinstance(tokens, int | float) and seconds > 0:
            parts.append(f"{tokens / seconds:,.0f} tok/s")
        parts.append(_seconds(seconds) + _phase_times(row))
        left = self.time_left()
        if left:
            parts.append(f"{_seconds(left)} left")
        return "  ".join(parts)

    def _say(self, text: str) -> None:
        self._spoke = self._clock()
        line = _printable(text)
        if self._live is not None:
            self._live.say(line)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


class _Live:
    """The terminal's display: lines that scroll, and two bars under them."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bars

        self._console: Console = Console(file=stream, highlight=False)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False, style="dim"),
            console=self._console,
            transient=True,
        )
        self._steps = 0
        self._run: Any = None
        self._phase: Any = None

    def start(self, steps: int, done: int) -> None:
        """Show the bars."""
        self._steps = steps
        self._run = self._bars.add_task("run", total=steps, completed=done, count=f"{done}/{steps}", left="")
        self._phase = self._add_phase("starting", 0, None)
        self._bars.start()

    def phase(self, name: str, done: int, total: int | None) -> None:
        """Set the second bar; without a total it only says that something goes on."""
        if self._phase is None:
            return
        old = self._bars.tasks[1]
        if name == old.description and total == old.total:
            count = f"{done}/{total}" if total else ""
            self._bars.update(self._phase, completed=done, count=count)
        else:  # rich cannot take a total back from a bar
            self._bars.remove_task(self._phase)
            self._phase = self._add_phase(name, done, total)

    def _add_phase(self, name: str, done: int, total: int | None) -> Any:
        count = f"{done}/{total}" if total else ""
        return self._bars.add_task(name, total=total, completed=done, count=count, left="")

    def advance(self, done: int, left: float | None) -> None:
        """Set the first bar."""
        if self._run is not None:
            text = f"{_seconds(left)} left" if left else ""
            self._bars.update(self._run, completed=done, count=f"{done}/{self._steps}", left=text)

    def say(self, line: str) -> None:
        """A line above the bars; never read as rich markup, never wrapped into the bars."""
        name, _, rest = line.partition("  ")
        text = self._console.render_str(line, markup=False, highlight=False)
        if line.startswith("step ") and rest:
            text.stylize("bold", 0, len(name))
        self._bars.console.print(text, soft_wrap=True)

    def stop(self) -> None:
        """Remove the bars; may be called twice."""
        self._bars.stop()


def _phase_times(row: Mapping[str, Any]) -> str:
    times = {k.removeprefix("time/"): v for k, v in row.items() if k.startswith("time/") and k not in TOTAL_KEYS}
    shown = [f"{name} {value:.1f}" for name, value in sorted(times.items(), key=lambda kv: -(kv[1] or 0)) if value]
    return f" ({', '.join(shown)})" if shown else ""


def _drops(row: Mapping[str, Any]) -> str:
    """Slices that the step lost, by cause; empty if none."""
    counts = [(k.removeprefix("drops/"), v) for k, v in sorted(row.items()) if k.startswith("drops/") and v]
    return f"dropped ({', '.join(f'{name} {_number(count)}' for name, count in counts)})" if counts else ""


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _printable(text: str) -> str:
    """One line without control characters: an escape code in a reply must not act."""
    return "".join(c if c.isprintable() else " " for c in text)
