"""Row files: JSON Lines, one row a line, appended as rows come, so that a run that is cut off leaves what it had."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from m2train.bench.schema import Row


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """All rows of some files, or of the *.jsonl below a folder, in order.

    Raises:
        ValueError: a line is not a row of this version; names file and line.
    """
    found = []
    for path in paths:
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        for file in files:
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if not line.strip():
                    continue
                try:
                    found.append(Row.from_json(line))
                except ValueError as err:
                    raise ValueError(f"{file}:{number} is not a row of this version: {err}") from err
    return found


def append_row(path: Path, row: Row) -> None:
    """Add a row to a file, in one write: who is killed leaves whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(row.to_json().encode() + b"\n")


_COLUMNS = (
    *("id", "created", "status", "reason", "case", "impl", "shape", "dtype", "phase", "cache", "timer", "device"),
    *("threads", "unit", "median", "low", "high", "p10", "p90", "processes", "ratio", "ratio_low", "ratio_high"),
    *("ceiling", "bytes", "dram_bytes", "flops", "sol_percent", "bound", "energy_j"),
    *("error", "error_ratio", "bitwise_repeat", "batch_invariant"),
    *("peak_bytes", "result_bytes", "own_bytes", "own_share", "saved_bytes", "machine", "sha", "dirty"),
)


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV, without samples."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        t = row.timing
        values = row.identity.to_dict() | {"id": row.id, "created": row.created, "status": row.status}
        values |= {"reason": row.reason or row.numerics.reason, "ceiling": row.ceiling}
        if t is not None:
            values |= {
                name: getattr(t, name) for name in ("unit", "median", "low", "high", "p10", "p90", "processes")
            }
            if t.ratio is not None:
                values |= {"ratio": t.ratio.value, "ratio_low": t.ratio.low, "ratio_high": t.ratio.high}
        for name in ("bytes", "dram_bytes", "flops", "sol_percent", "bound", "energy_j"):
            values[name] = getattr(row.physics, name)
        for name in ("error", "error_ratio", "bitwise_repeat", "batch_invariant"):
            values[name] = getattr(row.numerics, name)
        values |= {"peak_bytes": row.memory.peak, "result_bytes": row.memory.results}
        values |= {"own_bytes": row.memory.own, "own_share": row.memory.own_share}
        values["saved_bytes"] = row.memory.saved_for_backward
        values |= {"machine": row.machine.get("id"), "sha": row.build.get("sha"), "dirty": row.build.get("dirty")}
        writer.writerow(values)
    return out.getvalue()
