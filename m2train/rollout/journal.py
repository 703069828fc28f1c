"""Generations of a step in progress, so that a killed run repeats none of them.

Every request has a stable key (step, case, turn, sample); its result is appended once it arrives. After a restart the
same keys are asked for again, in whatever order, and those already journaled are answered from the file. The
simulator, the rubrics and the grades are deterministic given the generations, so they need no journal.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from m2train.records import Generation

log = logging.getLogger(__name__)


class Journal:
    """Append-only map from request key to generation.

    A line cut by a kill (no newline, or no valid JSON) is dropped, and the file truncated to the whole lines before
    it, so that new lines never merge with it.

    Args:
        path: the file; made when missing.
        weight_version: the version that this step's tokens must come from; of others, or of none: ignored.
    """

    def __init__(self, path: Path, weight_version: str) -> None:
        self.weight_version = weight_version
        self._done: dict[str, Generation] = {}
        whole = 0
        raw = path.read_bytes() if path.exists() else b""
        for line in raw.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
            except ValueError:
                break
            whole += len(line)
            generation = Generation.model_validate(entry["generation"])
            if {span.version for span in generation.weight_versions} == {weight_version}:
                self._done[entry["key"]] = generation
        if whole < len(raw):
            log.warning("journal %s: dropped %d bytes of an unfinished line", path, len(raw) - whole)
        self._file = path.open("ab")
        if whole < len(raw):
            self._file.truncate(whole)
        self.num_recovered = len(self._done)

    def get(self, key: str) -> Generation | None:
        """The journaled result of a request, if it arrived before."""
        return self._done.get(key)

    def put(self, key: str, generation: Generation) -> None:
        """Append a result durably."""
        self._done[key] = generation
        line = json.dumps({"key": key, "generation": generation.model_dump()}, separators=(",", ":"))
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
