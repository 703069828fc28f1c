"""Reads a run directory as it is: missing and unreadable files are reported, never fatal."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from m2train.metrics import METRICS_FILE, read_lines
from m2train.records import StepRollouts

_STEP_FILE = re.compile(r"step_(\d+)\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What was found in a run directory."""

    folder: Path
    config: dict[str, Any]
    status: dict[str, Any]
    rows: list[dict[str, Any]]
    """One row a step, ascending; of rows with the same step the last one counts."""
    rollout_files: dict[int, Path]
    eval_files: dict[int, Path]
    problems: list[str] = field(default_factory=list)
    """What could not be read, in words for the report."""


def load_run(folder: Path) -> Run:
    """Read everything but the rollouts, which are read one file at a time by `read_step`."""
    problems: list[str] = []
    raw_rows, num_bad = read_lines(folder / METRICS_FILE)
    if num_bad:
        problems.append(f"{METRICS_FILE}: {num_bad} unreadable line(s) left out")
    by_step = {row["step"]: row for row in raw_rows}
    if len(by_step) < len(raw_rows):
        problems.append(f"{METRICS_FILE}: {len(raw_rows) - len(by_step)} row(s) of a repeated step; the last counts")
    return Run(
        folder=folder,
        config=_read_config(folder / "config.toml", problems),
        status=_read_status(folder / "status.json", problems),
        rows=[by_step[step] for step in sorted(by_step)],
        rollout_files=_step_files(folder / "rollouts"),
        eval_files=_step_files(folder / "eval"),
        problems=problems,
    )


def read_step(path: Path, problems: list[str]) -> StepRollouts | None:
    """The rollouts of one step, or None and a line in `problems`."""
    try:
        return StepRollouts.model_validate_json(path.read_bytes())
    except ValidationError as err:
        first = err.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        problems.append(f"{path.parent.name}/{path.name}: not readable ({where}: {first['msg']})")
    except OSError as err:
        problems.append(f"{path.parent.name}/{path.name}: {err.strerror}")
    return None


def setting(config: dict[str, Any], section: str, key: str) -> Any:
    """A setting of a recipe; None if it is not there."""
    part = config.get(section)
    return part.get(key) if isinstance(part, dict) else None


def _step_files(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    found = {}
    for path in folder.iterdir():
        match = _STEP_FILE.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name}: missing")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        problems.append(f"{path.name}: not readable ({err})")
    return {}


def _read_status(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        status = json.loads(path.read_bytes())
    except FileNotFoundError:
        problems.append(f"{path.name}: missing")
        return {}
    except ValueError as err:
        problems.append(f"{path.name}: not readable ({err})")
        return {}
    if not isinstance(status, dict):
        problems.append(f"{path.name}: not an object")
        return {}
    return status
