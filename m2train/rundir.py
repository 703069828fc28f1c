"""The run directory: where each thing lies, who owns it, and how the run stands."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import re
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from m2train.config import ConfigError, Recipe, load
from m2train.files import write_atomic
from m2train.records import StepRollouts

IDENTITY_FILE = "run.json"
_FOLDERS = ("rollouts", "eval", "checkpoints", "logs")
# All that a run leaves, besides the lock; --restart removes nothing else.
_OWN = frozenset(
    {*_FOLDERS, "learner", "tensorboard", "config.toml", IDENTITY_FILE, "status.json", "metrics.jsonl"}
    | {"report.html", "compare.html"}
)
_TEMP = re.compile(rf"\.(?:{'|'.join(re.escape(name) for name in sorted(_OWN) if '.' in name)})\.\d+\.tmp")
# Settings that a resumed run may change: how it is run, not what it computes.
_MAY_CHANGE = re.compile(
    r"name$|steps$|mismatch_limit$|checkpoint\.|vllm\.|learner\.(tp|pp|dp|sequence_parallel|threads|launch|recompute|packing|"
    r"micro_batch|timeout_s|start_timeout_s)|rollout\.(urls|servers|tensor_parallel|threads|concurrency|\w*timeout_s|max_restarts)"
).match


class Identity(BaseModel):
    """What a run is besides its recipe: kept in `run.json` from its start on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    """Tells its weights from another run's on the same server; empty in a run from before there was an id."""
    mode: Literal["train", "rollouts-only", "train-from"]
    source: str = ""
    """Of train-from: the run directory of the rollouts, resolved."""

    @property
    def told(self) -> str:
        """The mode, as on the command line."""
        return "a live run" if self.mode == "train" else f"--{self.mode} {self.source}".rstrip()


class RunDir:
    """Layout of a run directory, with a lock that a kill releases.

    Args:
        root: the folder; made when missing.

    Raises:
        ConfigError: another process is running there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        try:
            for name in _FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as err:
            raise ConfigError(f"the run directory {root} cannot be made: {err.filename} is a file") from err
        self._lock = (self.root / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise ConfigError(f"{root} is in use by another run; wait for it, or name another --run-dir") from err

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    @property
    def config(self) -> Path:
        """The recipe this run was started with."""
        return self.root / "config.toml"

    @property
    def identity(self) -> Identity | None:
        """Who this run is; None if no run was started here, or one from before this was kept.

        Raises:
            ConfigError: `run.json` is there and cannot be read.
        """
        path = self.root / IDENTITY_FILE
        try:
            return Identity.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as err:
            raise ConfigError(f"{path} does not say what run this is ({err}); restore it, or use --restart") from err

    def weight_version(self, step: int) -> str:
        """The name of this run's weights before `step`, on any server."""
        identity = self.identity
        return f"{identity.id}-step-{step}" if identity is not None and identity.id else f"step-{step}"

    def rollouts(self, step: int) -> Path:
        """All that was sampled for `step`."""
        return rollout_file(self.root, step)

    def journal(self, step: int) -> Path:
        """Generations of a step that is not yet complete."""
        return self.root / "rollouts" / f"step_{step:06d}.journal.jsonl"

    def evaluation(self, step: int) -> Path:
        """The held-out evaluation of the weights before `step`."""
        return self.root / "eval" / f"step_{step:06d}.json"

    def checkpoint(self, step: int) -> Path:
        """The learner after `step` optimizer phases."""
        return self.root / "checkpoints" / f"step_{step:06d}"

    def latest_checkpoint(self) -> int | None:
        """The largest step with a whole checkpoint (a checkpoint is renamed into place last)."""
        return max(self._checkpoints(), default=None)

    def _checkpoints(self) -> list[int]:
        """Steps of the whole ones, ascending; a copy that somebody put beside them is not ours."""
        found = (self.root / "checkpoints").glob("step_*")
        return sorted(int(p.name[5:]) for p in found if re.fullmatch(r"step_\d{6,}", p.name))

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints."""
        for step in self._checkpoints()[:-keep]:
            shutil.rmtree(self.checkpoint(step))

    def _drop_unfinished(self) -> None:
        """Remove what a kill left in the middle of a write (`m2train.files.write_atomic`, a checkpoint)."""
        temps = [temp for temp in self.root.iterdir() if _TEMP.fullmatch(temp.name)]
        for name in ("rollouts", "eval", "checkpoints"):
            temps.extend((self.root / name).glob(".step_*.tmp"))
        for temp in (*temps, *(self.root / "learner").rglob(".*.tmp")):
            shutil.rmtree(temp) if temp.is_dir() else temp.unlink(missing_ok=True)

    def is_empty(self) -> bool:
        """Whether no run was started here."""
        return not self.config.exists()

    def clear(self) -> None:
        """Remove what an earlier run left here; what says so last: a kill never leaves rollouts without it.

        Raises:
            ConfigError: files of somebody else are here, and no run.
        """
        names = {entry.name for entry in self.root.iterdir()} - _OWN - {"lock"}
        others = sorted(name for name in names if not _TEMP.fullmatch(name))
        if others and self.is_empty() and not (self.root / IDENTITY_FILE).exists():
            raise ConfigError(
                f"--restart discards a run, but {self.root} holds none; it holds {', '.join(others[:3])}: name "
                "another --run-dir"
            )
        last = (self.config.name, IDENTITY_FILE)
        for entry in sorted(self.root.iterdir(), key=lambda entry: (entry.name in last, entry.name)):
            if entry.name in _OWN:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for name in _FOLDERS:
            (self.root / name).mkdir()

    def write_status(self, state: Literal["running", "finished", "failed"], cause: str = "") -> None:
        """Say how the run stands, for the report and for whoever watches."""
        path = self.root / "status.json"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        old: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        write_atomic(
            path,
            json.dumps(
                {
                    "state": state,
                    "cause": cause,
                    "started": old.get("started", now),
                    "ended": "" if state == "running" else now,
                    "machine": machine(),
                },
                indent=1,
            ),
        )

    def _check_same(self, recipe: Recipe) -> None:
        old, new = (_leaves(r.model_dump()) for r in (load(self.config), recipe))
        changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and not _MAY_CHANGE(k)]
        if changed:
            raise ConfigError(
                f"--resume with another {', '.join(changed)} than in {self.config} would mix two runs; set it back, "
                "or use another --run-dir"
            )
        done = self.latest_checkpoint() or 0
        if recipe.steps != old["steps"] and recipe.learner.lr_schedule != "constant":
            raise ConfigError(
                f"--resume with steps = {recipe.steps} instead of {old['steps']} would bend the learning rate's "
                f"{recipe.learner.lr_schedule} schedule in its midst; set it back, or use another --run-dir"
            )
        if recipe.steps < done:
            raise ConfigError(
                f"steps = {recipe.steps}, but {self.root} has a checkpoint of {done} steps; raise steps"
            )

    def _resumed(self, asked: Identity) -> Identity:
        """The identity of the run that is here, if what was asked for goes on with it."""
        kept = self.identity
        if kept is None:  # from before it was kept: its weights have no id, and its mode is what it is resumed in
            return asked.model_copy(update={"id": ""})
        if (kept.mode, kept.source) != (asked.mode, asked.source):
            raise ConfigError(
                f"{self.root} was started as {kept.told}; --resume as {asked.told} would mix two runs: resume it as "
                "it was started, or use another --run-dir"
            )
        return kept

    def start(
        self,
        recipe: Recipe,
        *,
        resume: bool,
        restart: bool,
        rollouts_only: bool = False,
        train_from: Path | None = None,
    ) -> None:
        """Claim the folder for `recipe`.

        Raises:
            ConfigError: a run is already here and neither `resume` nor `restart` was asked for; or `resume` with a
                recipe, or in a mode, that changes what was trained so far.
        """
        if restart:
            self.clear()
        if not self.is_empty() and not resume:
            raise ConfigError(f"{self.root} already holds a run; pass --resume to go on, or --restart to discard it")
        identity = _identity(rollouts_only, train_from)
        if not self.is_empty():
            self._check_same(recipe)
            identity = self._resumed(identity)
        # Before the recipe: a kill between the two leaves a folder without a run.
        write_atomic(self.root / IDENTITY_FILE, identity.model_dump_json(indent=1))
        write_atomic(self.config, recipe.to_toml())
        self._drop_unfinished()
        self.write_status("running")


def _identity(rollouts_only: bool, train_from: Path | None) -> Identity:
    new = secrets.token_hex(4)
    if train_from is not None:
        return Identity(id=new, mode="train-from", source=str(train_from.resolve()))
    return Identity(id=new, mode="rollouts-only" if rollouts_only else "train")


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def rollout_file(root: Path, step: int) -> Path:
    """Where a run directory keeps the rollouts of `step`."""
    return root / "rollouts" / f"step_{step:06d}.json"


def load_rollouts(path: Path) -> StepRollouts:
    """Read the saved rollouts of one step.

    Raises:
        ConfigError: missing or not a rollout file.
    """
    try:
        return StepRollouts.model_validate_json(path.read_bytes())
    except OSError as err:
        raise ConfigError(f"cannot read rollouts {path}: {err.strerror}") from err
    except ValueError as err:
        raise ConfigError(f"{path} is not a rollout file of this version: {err}") from err


def machine() -> dict[str, str | int]:
    """What this run ran on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"host": platform.node(), "cpu": cpu, "cores": os.cpu_count() or 1, "python": platform.python_version()}
