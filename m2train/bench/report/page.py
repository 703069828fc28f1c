"""The HTML page: text goes through jinja2's escaping; no script, no network, nothing beside the file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import m2train.report
from m2train.bench.display import cells, label, notes
from m2train.bench.report import figures
from m2train.bench.report.select import groups, latest, machine_name, short
from m2train.bench.schema import Row

_HERE = Path(__file__).parent


def render(rows: Sequence[Row]) -> str:
    """The page as HTML."""
    import jinja2

    shown = latest(rows)
    colors = {case: k for k, case in enumerate(dict.fromkeys(row.identity.case for row in shown))}
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Path(m2train.report.__file__).with_name("style.css").read_text(encoding="ascii")
    return env.get_template("template.html").render(
        style=style + (_HERE / "bench.css").read_text(encoding="ascii"),
        machines=[_machine(name, shown, rows, colors) for name in dict.fromkeys(map(machine_name, shown))],
        refused=[(_name(row), row.reason) for row in shown if row.status == "refused"],
        skipped=_skipped(shown),
        tiles=_tiles(shown),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _name(row: Row) -> str:
    return f"{row.identity.case}/{row.identity.impl} {short(row)}"


def _tiles(shown: Sequence[Row]) -> list[dict[str, str]]:
    good = [row for row in shown if row.status == "ok" and row.timing is not None]
    widths = [(r.timing.high - r.timing.low) / 2 / r.timing.median for r in good if r.timing and r.timing.median > 0]
    count = {status: sum(row.status == status for row in shown) for status in ("ok", "refused", "skipped")}
    tiles = [
        {"name": "Rows", "value": str(count["ok"]), "sub": f"{count['refused']} refused, {count['skipped']} skipped"}
    ]
    if widths:
        worst = f"widest {100 * max(widths):.1f} %"
        tiles.append(
            {"name": "Noise: half-width of a median", "value": f"{100 * median(widths):.1f} %", "sub": worst}
        )
    counts = {str(row.timing.processes) for row in good if row.timing}
    tiles.append(
        {"name": "Processes a row", "value": " or ".join(sorted(counts)) or "-", "sub": "intervals resample them"}
    )
    commits = {
        str(row.build.get("sha") or "unknown")[:10] + (" +" if row.build.get("dirty") else "") for row in shown
    }
    tiles.append(
        {
            "name": "Commit",
            "value": next(iter(commits)) if len(commits) == 1 else str(len(commits)),
            "sub": "+ : uncommitted changes",
        }
    )
    return tiles


def _machine(name: str, shown: Sequence[Row], rows: Sequence[Row], colors: dict[str, int]) -> dict[str, Any]:
    mine = [row for row in shown if machine_name(row) == name and row.status == "ok"]
    placed = [row for row in mine if figures.placeable(row)]
    facts = next((row for row in reversed(shown) if machine_name(row) == name), shown[0])
    packages = facts.build.get("packages", {})
    cases = []
    for case, color in colors.items():
        members = [row for row in mine if row.identity.case == case]
        if members:
            ratio = [row for row in members if row.timing and row.timing.ratio]
            cases.append(
                {
                    "name": case,
                    "color": color % figures.NUM_COLORS,
                    "timers": ", ".join(sorted({row.identity.timer for row in members})),
                    "baseline": ratio[0].timing.ratio.to
                    if ratio and ratio[0].timing and ratio[0].timing.ratio
                    else "",
                    "ratios": figures.ratios(ratio, color) if ratio else "",
                    "groups": [
                        {
                            "what": what,
                            "rows": [_cells(row) for row in group],
                        }
                        for (_, _, what), group in groups(members).items()
                    ],
                }
            )
    return {
        "name": name,
        "facts": {
            "Machine": facts.machine.get("id"),
            "Last-level cache": f"{facts.machine.get('cache_bytes', 0) / 2**20:.0f} MiB",
            "Load when started": facts.machine.get("load"),
            "torch": packages.get("torch"),
            "triton": packages.get("triton", "not installed"),
            "CPU kernels": facts.build.get("cpu_isa"),
            "Python": facts.build.get("python"),
        },
        "roofline": figures.roofline(placed, colors) if placed else "",
        "legend": [
            {"name": case, "color": colors[case] % figures.NUM_COLORS}
            for case in dict.fromkeys(r.identity.case for r in placed)
        ],
        "cases": cases,
        "trends": _trends(name, rows, colors),
    }


def _cells(row: Row) -> tuple[list[str], list[str]]:
    """A table's row, and what stands below it."""
    return [label(row), *cells(row), row.id], notes(row)


def _trends(name: str, rows: Sequence[Row], colors: dict[str, int]) -> list[dict[str, str]]:
    series: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if machine_name(row) == name and row.status == "ok" and row.timing is not None and row.ours:
            series.setdefault(row.key(), []).append(row)
    return [
        {"name": _name(found[0]), "svg": figures.trend(sorted(found, key=lambda r: r.created), colors[key[0]])}
        for key, found in series.items()
        if len(found) > 1
    ]


def _skipped(shown: Sequence[Row]) -> list[tuple[str, str, int]]:
    found: dict[tuple[str, str], int] = {}
    for row in shown:
        if row.status == "skipped":
            place = (f"{row.identity.case}/{row.identity.impl}", row.reason)
            found[place] = found.get(place, 0) + 1
    return [(name, reason, count) for (name, reason), count in found.items()]
