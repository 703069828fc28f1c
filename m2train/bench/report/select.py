"""Which rows a report shows, and how it names them."""

from __future__ import annotations

from collections.abc import Sequence

from m2train.bench.schema import Row


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of rows with one key on one machine the newest, in the order of their first appearance."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        place = (str(row.machine.get("id")), *row.key())
        if place not in found or row.created >= found[place].created:
            found[place] = row
    return list(found.values())


def machine_name(row: Row) -> str:
    """What a row was measured on."""
    i, gpu = row.identity, row.machine.get("gpu")
    if gpu:
        return str(gpu.get("name"))
    return f"{row.machine.get('cpu')}, {i.threads} thread{'s' if i.threads > 1 else ''}"


def short(row: Row) -> str:
    """shape, phase, dtype and cache."""
    i = row.identity
    return f"{i.shape} {i.phase} {i.dtype} {i.cache}"


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(machine, case, shape and so on) -> rows that were measured together."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((machine_name(row), row.identity.case, short(row)), []).append(row)
    return found
