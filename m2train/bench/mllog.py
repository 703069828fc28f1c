"""`:::MLLOG` lines, as MLPerf's mllog writes them and its tools read them: one JSON object a line after the mark."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = ":::MLLOG "


class MLLog:
    """Appends events and intervals to a file.

    Args:
        path: None: nothing is written.
        clock: seconds since 1970.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def event(self, key: str, value: Any = None, **metadata: Any) -> None:
        """A point in time."""
        self._line("POINT_IN_TIME", key, value, metadata)

    @contextmanager
    def interval(self, key: str, **metadata: Any) -> Iterator[dict[str, Any]]:
        """Start and end of the block. What the block puts into the dict is the value at its end."""
        self._line("INTERVAL_START", key, None, metadata)
        found: dict[str, Any] = {}
        yield found
        self._line("INTERVAL_END", key, found or None, metadata)

    def _line(self, kind: str, key: str, value: Any, metadata: dict[str, Any]) -> None:
        if self._path is None:
            return
        line = {
            "namespace": "",
            "time_ms": int(self._clock() * 1000),
            "event_type": kind,
            "key": key,
            "value": value,
            "metadata": metadata,
        }
        with self._path.open("a") as file:
            file.write(MARK + json.dumps(line) + "\n")
