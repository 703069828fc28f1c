"""The README's table: rendered between two markers from committed rows, so that no figure is without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m2train.bench.display import duration, label
from m2train.bench.report.select import latest
from m2train.bench.schema import Row
from m2train.files import write_atomic

BEGIN = "<!-- m2bench:begin (written by `m2bench report --readme README.md`) -->"
END = "<!-- m2bench:end -->"
NO_ROWS = "No H100 rows yet: nothing has been timed on a GPU."
_GPU = "h100"


def table(rows: Sequence[Row]) -> str:
    """The H100 rows of our implementations beside the best other one; or that there are none."""
    good = [
        row
        for row in latest(rows)
        if row.status == "ok"
        and row.timing is not None
        and _GPU in str(row.machine.get("gpu", {}).get("name")).lower()
    ]
    if not good:
        return NO_ROWS
    lines = [
        "| op | shape | implementation | time | of baseline [95 %] | speed of light | again |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(good, key=lambda r: (r.key(), r.id)):
        i, t = row.identity, row.timing
        assert t is not None
        ratio = f"x{t.ratio.value:.3f} [{t.ratio.low:.3f}, {t.ratio.high:.3f}]" if t.ratio else "is the baseline"
        sol = f"{row.physics.sol_percent:.0f} %" if row.physics.sol_percent is not None else "-"
        what = f"{i.shape} {i.phase} {i.dtype} {i.cache}"
        clock = f"{duration(t.median, t.unit)} ({i.timer})"
        lines.append(f"| {i.case} | {what} | {label(row)} | {clock} | {ratio} | {sol} | `m2bench repro {row.id}` |")
    return "\n".join(lines)


def update(path: Path, rows: Sequence[Row], *, write: bool) -> bool:
    """Put the table between the markers; returns whether it was that already.

    Args:
        path: the README.
        rows: all that are committed.
        write: False only compares.

    Raises:
        ValueError: the file lacks a marker.
    """
    text = path.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the markers {BEGIN!r} and {END!r}; put them where the table is to be")
    new = f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}"
    if new == text:
        return True
    if write:
        write_atomic(path, new)
    return False
