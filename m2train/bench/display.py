"""The live table: a line a row as it comes, and below it what is being measured."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from m2train.bench.schema import Row

_WIDTHS = {"row": 78, "time": 31, "ratio": 25, "SOL": 8, "err": 6, "bits": 4, "MiB": 8, "own MiB": 16}
_STYLE = {"ok": "green", "refused": "bold red", "skipped": "dim"}


class Display:
    """Prints rows; on a terminal also a status line."""

    def __init__(self, *, timed: bool = True) -> None:
        self.refused = 0
        self._timed = timed
        self._console = Console(highlight=False)
        if not self._console.is_terminal:  # a log: wide enough for a row on a line
            self._console = Console(highlight=False, width=sum(_WIDTHS.values()) + len(_WIDTHS))
        self._status = self._console.status("") if self._console.is_terminal else None
        self._headed = False

    def __enter__(self) -> Display:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, text: str) -> None:
        """What is being done."""
        if self._status is not None:
            self._status.update(text)

    def row(self, row: Row) -> None:
        """One line."""
        self.refused += row.status == "refused"
        if not self._headed:
            self._line([Text(name, style="bold") for name in _WIDTHS])
            self._headed = True
        i = row.identity
        mark = " CEILING" if row.ceiling else ""
        name = Text(f"{i.case}/{i.impl}/{i.shape}/{i.phase} {i.dtype} {i.cache}{mark}", style=_STYLE[row.status])
        if row.status != "ok":
            self._console.print(name.append(f": {row.status}, {row.reason}"), no_wrap=True, overflow="ellipsis")
            return
        self._line([name, *(Text(cell) for cell in cells(row))])
        for note in notes(row):
            self._console.print(Text(f"    {note}", style="dim"), no_wrap=True, overflow="ellipsis")

    def _line(self, parts: list[Text]) -> None:
        table = Table.grid(padding=(0, 1))
        for name, width in _WIDTHS.items():
            table.add_column(width=width, no_wrap=True, justify="left" if name == "row" else "right")
        table.add_row(*parts)
        self._console.print(table)


def cells(row: Row) -> list[str]:
    """time, ratio, share of the speed of light, error ratio, repeat and invariance, peak memory, own memory."""
    t, n = row.timing, row.numerics
    time = ratio = ""
    if t is not None:
        size = scale(t.median, t.unit)[0]
        time = f"{duration(t.median, t.unit)} [{t.low / size:.4g}, {t.high / size:.4g}]"
        if t.ratio is not None:
            ratio = f"x{t.ratio.value:.3f} [{t.ratio.low:.3f}, {t.ratio.high:.3f}]"
    sol = f"{row.physics.sol_percent:.1f} %" if row.physics.sol_percent is not None else ""
    error = f"{n.error_ratio:.2f}" if n.error_ratio is not None else ""
    bits = "".join(
        {True: yes, False: "-", None: "."}[value]
        for yes, value in (("r", n.bitwise_repeat), ("i", n.batch_invariant))
    )
    m = row.memory
    memory = f"{m.peak / 2**20:.1f}" if m.peak is not None else ""
    own = f"{m.own / 2**20:.1f}" if m.own is not None else ""
    if m.own_share is not None:
        own += f" ({100 * m.own_share:.1f} %)"
    return [time, ratio, sol, error, bits, memory, own]


def label(row: Row) -> str:
    """The implementation's name in a table."""
    return f"{row.identity.impl} (ceiling, not checked)" if row.ceiling else row.identity.impl


def notes(row: Row) -> list[str]:
    """What has no column of its own: what a ceiling is, ratios to others than the baseline, and figures of merit."""
    found = [f"not checked: {row.numerics.reason}"] if row.ceiling else []
    t, quality = row.timing, row.numerics.quality
    if t is not None and t.others:
        names = {r.to: f"{r.to} (ceiling)" if r.ceiling else r.to for r in t.others}
        ratios = (f"{names[r.to]} x{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in t.others)
        found.append(f"time over others': {', '.join(ratios)}")
    physics = row.physics
    if physics.bytes is not None or physics.flops is not None:  # else its case has no speed of light to speak of
        found += [physics.note] if physics.note else []
    found += [t.note] if t is not None and t.note else []
    if quality:
        found.append(", ".join(f"{name} {value:.6g}" for name, value in quality.items()))
    return found


def scale(value: float, unit: str) -> tuple[float, str]:
    """The unit in which a time is 1 to 999, in seconds, and its name."""
    if unit == "instructions":
        return 1e6, "Minstr"
    for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= size:
            return size, name
    return 1e-9, "ns"


def duration(value: float, unit: str) -> str:
    """A time or an instruction count with its unit."""
    size, name = scale(value, unit)
    return f"{value / size:.4g} {name}"
