"""Files between the controller and rank 0, under `run_dir/learner/<session>/`.

    recipe.json     what to train; written by the controller before `run_dir/learner/session.json` names the session
    cmd_000001.json, batch_000001_0.safetensors ...     a command and its data
    reply_000001.json, reply_000001.safetensors         its answer; reply_000000.json says that the ranks are ready
    error.json      one line of cause; the first rank to fail writes it
    alive           a number that the controller changes every few seconds

Every file but `alive` is written under a temporary name, flushed and renamed, so whoever sees it sees it whole. This
needs nothing but a file system that both sides share.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from m2train.files import write_atomic

CONTROLLER = "M2TRAIN_CONTROLLER"
"""In the environment of ranks that a controller started: its pid."""
POLL_S = 0.015
HEARTBEAT_S = 3.0


class Session:
    """Paths of one session.

    Args:
        run_dir: the run directory.
        name: the session's folder name.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        self.folder = run_dir / "learner" / name

    @property
    def recipe(self) -> Path:
        """What to train."""
        return self.folder / "recipe.json"

    @property
    def error(self) -> Path:
        """Why the learner ended."""
        return self.folder / "error.json"

    @property
    def alive(self) -> Path:
        """The controller's heartbeat."""
        return self.folder / "alive"

    @property
    def served(self) -> Path:
        """Made by the rank 0 that took the session."""
        return self.folder / "served"

    def command(self, number: int) -> Path:
        """The command file of this number."""
        return self.folder / f"cmd_{number:06d}.json"

    def batch(self, number: int, index: int) -> Path:
        """Data of a command."""
        return self.folder / f"batch_{number:06d}_{index}.safetensors"

    def reply(self, number: int) -> Path:
        """The answer to a command."""
        return self.folder / f"reply_{number:06d}.json"

    def tensors(self, number: int) -> Path:
        """Tensors of an answer."""
        return self.folder / f"reply_{number:06d}.safetensors"


def current_session(run_dir: Path) -> Path:
    """The file that names the current session."""
    return run_dir / "learner" / "session.json"


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content; None while it is not there."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    assert isinstance(value, dict), path
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file atomically."""
    write_atomic(path, json.dumps(value))


def write_first(path: Path, value: dict[str, Any]) -> bool:
    """Write a file unless it is there already; of several writers one wins, whole.

    Returns:
        Whether this call wrote it.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temp.write_text(json.dumps(value))
    try:
        os.link(temp, path)
    except FileExistsError:
        return False
    finally:
        temp.unlink()
    return True


class Watch:
    """Tells how long a file's content has not changed, by this machine's clock alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = ""
        self._since = time.monotonic()

    def silence(self) -> float:
        """Seconds since the content last changed."""
        try:
            now = self._path.read_text()
        except OSError:
            now = self._last
        if now != self._last:
            self._last, self._since = now, time.monotonic()
        return time.monotonic() - self._since


def one_line(err: BaseException) -> str:
    """`Type: message` on one line of at most 500 characters."""
    text = " ".join(str(err).split())
    return f"{type(err).__name__}: {text}"[:500] if text else type(err).__name__
