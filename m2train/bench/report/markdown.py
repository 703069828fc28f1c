"""Rows as Markdown: a table a case, for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from m2train.bench.display import cells, label, notes
from m2train.bench.report.select import groups, latest, machine_name, short
from m2train.bench.schema import Row

COLUMNS = (
    *("implementation", "time [95 %]", "of baseline [95 %]", "speed of light", "error ratio", "bits"),
    *("peak MiB", "own MiB", "row"),
)
HEAD = f"| {' | '.join(COLUMNS)} |"
LINE = "|---" * len(COLUMNS) + "|"


OWN = (
    "own MiB: peak beyond inputs, outputs, returned gradients and, where those are narrow, one float32 sum of the "
    "weight's; in brackets its share of the baseline's own."
)


def to_markdown(rows: Sequence[Row]) -> str:
    """All rows, newest of each key; refused and skipped ones with their reasons."""
    shown = latest(rows)
    parts = ["# m2bench", ""]
    for machine in dict.fromkeys(machine_name(row) for row in shown):
        parts += [f"**{machine}**", ""]
        for (where, case, what), members in groups(shown).items():
            if where != machine:
                continue
            good = [row for row in members if row.status == "ok"]
            if good:
                clock = good[0].identity.timer
                parts += [f"{case}, {what}, timer {clock}", "", HEAD, LINE, *(table_line(row) for row in good), ""]
                parts += [f"- {row.identity.impl}: {note}" for row in good for note in notes(row)]
                parts.append("")
    bad = [row for row in shown if row.status == "refused"]
    if bad:
        parts += [
            "**Refused**",
            "",
            *(f"- {row.identity.case}/{row.identity.impl} {short(row)}: {row.reason}" for row in bad),
            "",
        ]
    reasons: dict[str, list[str]] = {}
    for row in shown:
        if row.status == "skipped":
            reasons.setdefault(f"{row.identity.case}/{row.identity.impl}: {row.reason}", []).append(short(row))
    if reasons:
        parts += ["Skipped:", "", *(f"- {reason} ({len(where)} rows)" for reason, where in reasons.items()), ""]
    parts.append("bits: r repeats bitwise, i is invariant to the batch, - is not, . not asked.")
    parts.append(OWN)
    return "\n".join(parts) + "\n"


def table_line(row: Row) -> str:
    """One row of a table; the row's id is what `m2bench repro` takes."""
    return "| " + " | ".join([label(row), *cells(row), f"`{row.id}`"]) + " |"
