"""Files for people from rows: one self-contained HTML page, Markdown for a pull request, CSV, the README's table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m2train.bench.report.markdown import to_markdown
from m2train.bench.report.page import render
from m2train.bench.rows import to_csv
from m2train.bench.schema import Row
from m2train.files import write_atomic


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write report.html, report.md and rows.csv; returns their paths.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to report on; `m2bench run -o FILE` writes some")
    parts = {
        "report.html": render(rows).encode("ascii", errors="xmlcharrefreplace"),
        "report.md": to_markdown(rows).encode(),
        "rows.csv": to_csv(rows).encode(),
    }
    for name, data in parts.items():
        write_atomic(folder / name, data)
    return [folder / name for name in parts]
