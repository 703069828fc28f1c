"""The run's numbers: one JSON line a step in `metrics.jsonl`, and the same scalars for TensorBoard.

`metrics.jsonl` is the record; TensorBoard is a view of it. A line is on disk before `append`
returns, so a killed run loses at most the step it was in. A line cut short by a crash is dropped
when the file is next opened.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2train.files import sync_folder, write_atomic

METRICS_FILE = "metrics.jsonl"
NONFINITE_KEY = "warnings/nonfinite"

Value = float | int | str
_log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends rows to `run_dir/metrics.jsonl` and to `run_dir/tensorboard`.

    Args:
        run_dir: made if missing.
        tensorboard: also write event files. Without the package this is skipped;
            `tensorboard_reason` says why.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool = True) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.tensorboard_reason: str | None = None if tensorboard else "turned off"
        self._board: Any = None
        if self.path.exists():
            _drop_torn_tail(self.path)
        self._file = self.path.open("ab")
        sync_folder(self.path.parent)
        if tensorboard:
            self._open_board(purge_step=None)

    def append(self, row: Mapping[str, Value | None]) -> None:
        """Write one row: "step" first, other keys sorted, flushed and fsynced.

        A NaN or infinite number is stored as null, and `warnings/nonfinite` counts such values of
        the row.

        Raises:
            ValueError: no integer "step", or a value that is neither number, text nor None.
        """
        clean = _clean(row)
        self._file.write(_line(clean).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            for key, value in clean.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, clean["step"])
            self._board.flush()

    def truncate(self, step: int) -> int:
        """Drop rows whose step exceeds `step`, for a run resumed from the checkpoint of that step.

        Returns:
            How many rows were dropped. A torn last line is gone since the file was opened, and not
            counted.
        """
        rows, _ = read_lines(self.path)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) == len(rows):
            return 0
        self._file.close()
        write_atomic(self.path, "".join(_line(row) for row in kept))
        self._file = self.path.open("ab")
        if self._board is not None:
            self._board.close()
            self._open_board(purge_step=step + 1)
        return len(rows) - len(kept)

    def close(self) -> None:
        """Close both files; the writer is of no use afterwards."""
        self._file.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open_board(self, purge_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as err:
            self.tensorboard_reason = f"cannot import torch.utils.tensorboard: {err}"
            _log.warning("no TensorBoard files: %s (pip install tensorboard)", self.tensorboard_reason)
            return
        folder = str(self.path.parent / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=purge_step)  # type: ignore[no-untyped-call]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All readable rows of a run, in file order; none if there is no file.

    A last line cut short by a crash is left out; other unreadable lines are left out with a
    warning.
    """
    rows, num_bad = read_lines(Path(run_dir) / METRICS_FILE)
    if num_bad:
        _log.warning("%s: %d unreadable lines left out", Path(run_dir) / METRICS_FILE, num_bad)
    return rows


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of a metrics file and the number of complete lines that are not rows."""
    if not path.exists():
        return [], 0
    *lines, tail = path.read_bytes().split(b"\n")
    rows, num_bad = [], 0
    for line in lines:
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            num_bad += 1
    last = _parse(tail)
    if last is not None:
        rows.append(last)
    return rows, num_bad


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # covers bad JSON and bad UTF-8
        return None
    good = isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool)
    return row if good else None


def _clean(row: Mapping[str, object]) -> dict[str, Any]:
    step = row.get("step")
    if isinstance(step, bool) or not isinstance(step, numbers.Integral):
        raise ValueError(f"a row of metrics needs an integer 'step', got {step!r}")
    clean: dict[str, Any] = {"step": int(step)}
    num_nonfinite = 0
    for key in sorted(row):
        value = row[key]
        if key == "step":
            continue
        if value is None or isinstance(value, str | bool):
            clean[key] = int(value) if isinstance(value, bool) else value
        elif isinstance(value, numbers.Integral):
            clean[key] = int(value)
        elif isinstance(value, numbers.Real):
            finite = math.isfinite(value)
            clean[key] = float(value) if finite else None
            num_nonfinite += not finite
        else:
            raise ValueError(f"metric {key!r} is a {type(value).__name__}; expected a number or text")
    if num_nonfinite:
        clean[NONFINITE_KEY] = num_nonfinite
        _log.warning("step %d: %d metrics are NaN or infinite", clean["step"], num_nonfinite)
    return clean


def _drop_torn_tail(path: Path) -> None:
    """Make the file end in a newline: complete the last line if it is a row, else cut it off."""
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return
    _, _, tail = data.rpartition(b"\n")
    with path.open("r+b") as file:
        if _parse(tail) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(len(data) - len(tail))
        file.flush()
        os.fsync(file.fileno())
