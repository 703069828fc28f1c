"""Help for tests that start whole runs: synthetic rollouts, subprocesses with a deadline, a search for orphans."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from m2train.config import Recipe
from m2train.records import Dialogue, Generation, Group, Reply, StepRollouts, Turn, VersionSpan
from m2train.run import Run
from m2train.rundir import RunDir, rollout_file

TAG = "M2TRAIN_TEST_TAG"


def write_rollouts(root: Path, *, steps: int, groups: int = 2, group_size: int = 4, vocab: int = 256) -> Path:
    """Rollouts of unequal lengths with advantages that do not vanish; no engine needed."""
    rng = random.Random(0)
    for step in range(steps):
        made = []
        for g in range(groups):
            context = [rng.randrange(vocab) for _ in range(rng.randrange(5, 40))]
            replies = []
            for i in range(group_size):
                length = rng.randrange(3, 24)
                generation = Generation(
                    token_ids=[rng.randrange(vocab) for _ in range(length)],
                    logprobs=[-5.5 + rng.uniform(-0.3, 0.3) for _ in range(length)],
                    finish_reason="stop",
                    weight_versions=[VersionSpan(version=f"step-{step}", start=0, end=length)],
                    seed=i,
                )
                sign = 1.0 if i % 2 else -1.0
                replies.append(
                    Reply(
                        generation=generation, text="x", verdicts=[], rubric_reward=0.5 + 0.3 * sign, advantage=sign
                    )
                )
            turns = [Turn(role="patient", text="x", token_ids=context)]
            made.append(
                Group(
                    uid=f"s{step}g{g}",
                    case_id="c",
                    dialogue_uid="d",
                    num_turns=1,
                    context_ids=context,
                    context=turns,
                    rubrics=[],
                    replies=replies,
                )
            )
        dialogue = Dialogue(uid="d", case_id="c", seed=0, turns=turns, end_reason="max_turns")
        path = rollout_file(root, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = StepRollouts(step=step, weight_version=f"step-{step}", dialogues=[dialogue], groups=made)
        path.write_text(record.model_dump_json())
    return root


def bare_run(run_dir: RunDir, **parts: Any) -> Run:
    """A run of which only the named parts are there."""
    needed = [f.name for f in fields(Run) if f.default is MISSING and f.default_factory is MISSING]
    return Run(**dict.fromkeys(needed) | {"recipe": Recipe(), "dir": run_dir} | parts)


class TaggedRun:
    """A `m2train` process whose whole family can be found by an environment variable.

    Args:
        args: command-line arguments.
        env: more environment.
        under: a command line that runs the command line given to it.
    """

    def __init__(self, *args: str | Path, env: Mapping[str, str] | None = None, under: Sequence[str] = ()) -> None:
        self.tag = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [*under, sys.executable, "-c", "from m2train.cli import main; main()", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {}), TAG: self.tag},
        )

    def wait(self, timeout: float = 180) -> tuple[int, str]:
        """Exit code and output; the process is killed at the deadline."""
        try:
            out, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            out, _ = self.process.communicate()
            raise AssertionError(f"no end within {timeout} s; output so far:\n{out}") from None
        return self.process.returncode, out

    def kill(self) -> None:
        """kill -9, of this process alone: its children have to notice by themselves."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def kill_when(self, condition: Callable[[], bool], timeout: float = 120) -> bool:
        """Kill once `condition` holds; False if the run ended before."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError("the moment to kill at never came")
            time.sleep(0.02)
        self.kill()
        return True

    def survivors(self, patience: float = 10.0) -> list[str]:
        """Command lines of family members that still run after `patience` seconds."""
        deadline = time.monotonic() + patience
        while (left := self._family()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _family(self) -> list[str]:
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            try:
                if f"{TAG}={self.tag}".encode() in (folder / "environ").read_bytes():
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:  # it ended meanwhile
                continue
        return found


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics written so far; a torn last line is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def without_times(row: Mapping[str, Any]) -> dict[str, float]:
    """The part of a row that must not depend on how fast the machine was."""

    def timed(key: str) -> bool:
        return key.startswith(("time/", "sync/")) or key.endswith(("_s", "seconds"))

    return {k: v for k, v in row.items() if isinstance(v, int | float) and not timed(k)}
