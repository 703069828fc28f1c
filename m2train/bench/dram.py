"""DRAM traffic as Nsight Compute counted it, beside what a case states: the check on our own formulas."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from m2train.bench.rows import read_rows
from m2train.bench.schema import Row
from m2train.files import write_atomic

COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
TOLERANCE = 0.05
"""Disagreement with the stated bytes that is noted in the row."""
_UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}


def total(text: str) -> float:
    """Bytes over all kernels of `ncu --csv --page raw`: a line of names, one of units, then a line a kernel.

    Raises:
        ValueError: there is no such table in the text, or it lacks a counter, or holds one that is not a number.
    """
    # What the profiled program printed, and ncu's own ==PROF== lines, may come first.
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError('ncu printed no table: no line starts with "ID"; expected --csv --page raw')
    names, units, *kernels = csv.reader(lines[start:])
    missing = [name for name in COUNTERS if name not in names]
    if missing or not kernels:
        raise ValueError(f"ncu's table has {len(kernels)} kernels, and lacks: {', '.join(missing) or 'nothing'}")
    found = 0.0
    for name in COUNTERS:
        at = names.index(name)
        if units[at] not in _UNITS:
            raise ValueError(f"{name} is in {units[at]!r}; expected one of {', '.join(_UNITS)}")
        for kernel in kernels:
            try:
                found += float(kernel[at].replace(",", "")) * _UNITS[units[at]]
            except (ValueError, IndexError) as err:
                raise ValueError(f"{name} of kernel {kernel[:1]} is not a number: was DCGM holding it?") from err
    return found


def merge(path: Path, launch: Iterable[str], dram_bytes: float) -> str:
    """Put measured bytes into the newest row of a file that has times for this launch; says what they are.

    Args:
        path: a row file.
        launch: case, impl, shape, phase, dtype.
        dram_bytes: over all of its kernels.

    Raises:
        ValueError: no such row.
    """
    wanted = tuple(launch)
    rows = read_rows([path])
    found = [row for row in rows if row.status == "ok" and _launch(row) == wanted and row.identity.device == "cuda"]
    if not found:
        raise ValueError(f"{path} has no timed CUDA row of {'/'.join(wanted)}; `m2bench run -o` it first")
    newest = max(found, key=lambda row: row.created)
    physics = newest.physics
    physics.dram_bytes = dram_bytes
    notes = [part for part in physics.note.split("; ") if part and not part.startswith("measured DRAM")]
    text = f"{newest.id}: {dram_bytes:.4g} bytes of DRAM traffic measured"
    if physics.bytes:
        excess = dram_bytes / physics.bytes - 1
        text += f", {physics.bytes:.4g} stated ({100 * excess:+.1f} %)"
        if abs(excess) > TOLERANCE:
            notes.append(f"measured DRAM traffic is {100 * excess:+.1f} % off the stated bytes")
    physics.note = "; ".join(notes)
    write_atomic(path, "".join(row.to_json() + "\n" for row in rows))
    return text


def _launch(row: Row) -> tuple[str, ...]:
    i = row.identity
    return (i.case, i.impl, i.shape, i.phase, i.dtype)
