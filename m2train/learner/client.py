"""The controller's side of the learner: starts the ranks, sends commands, notices when they die.

All methods block; an asyncio controller calls them in a thread. They may be called from different threads, one at a
time. No method waits for ever: each has a limit from the recipe, and a dead torchrun is noticed within a second.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from m2train.config import Recipe
from m2train.errors import RunError
from m2train.host import die_with_parent
from m2train.learner import protocol
from m2train.learner.protocol import Session, read_json, write_json

if TYPE_CHECKING:
    import torch

    from m2train.learner.batch import TrainBatch

_CLOSE_S = 10.0
# For ranks on a CPU, unless the user's environment says otherwise.
_CPU_DEFAULTS = {
    # glibc gives large blocks back to the kernel when they are freed, and page faults then take two thirds of an
    # elementwise op on [4800, 3072] bf16 (100 ops: 0.39 s user + 0.71 s system; so 0.33 + 0.00; one AMD EPYC).
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000"
    ":glibc.malloc.top_pad=67108864",
    # Threads that spin at a barrier keep the one they wait for from running as soon as anything else wants a core: a
    # step of 8 layers beside one busy process took 8 to 35 s, so 6 to 10.
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Metrics of several updates of a step are averaged, except these.
_SUMMED = (
    *("learner/forward_backward_s", "learner/optimizer_s", "learner/micro_batches"),
    *("learner/tokens", "learner/unique_tokens", "learner/duplicate_tokens", "learner/loss_tokens"),
    *("learner/samples", "learner/plan_s", "learner/plan_wait_s", "policy/num_bad_seq"),
)
_WORST = ("mismatch/max_abs", "policy/ratio_max", "tis/max")
_LEAST = ("tis/min",)


class LearnerError(RunError):
    """The learner failed; the message is the cause on one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What `LearnerClient.train` hands back."""

    metrics: dict[str, float]
    """Of the step: mean over its updates, sums for times and counts, the worst for extremes."""
    updates: list[dict[str, float]]
    """Of each update."""
    logp: list[torch.Tensor]
    """f32[reply] of each sample of each batch, in order, before the update that used it"""


class LearnerClient:
    """A learner of tp x pp x dp ranks.

    Args:
        recipe: the run's recipe.
        run_dir: commands, replies and the log go here.
        model_dir: Hugging Face folder of the initial weights.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, model_dir: Path) -> None:
        self._recipe = recipe
        self._run_dir = run_dir.absolute()
        self._model_dir = model_dir.absolute()
        self._name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        self._session = Session(self._run_dir, self._name)
        self._log = self._run_dir / "logs" / "learner.log"
        self._number = 0
        self._ranks: _Ranks | None = None
        self._heart: _Heart | None = None
        self._failed: LearnerError | None = None
        self._closed = False
        self._starting = threading.Lock()

    def start(self, checkpoint: Path | None = None) -> float:
        """Start the ranks (or wait for those that the cluster starts) and build the learner.

        Args:
            checkpoint: a folder that `save` wrote, to go on from.

        Returns:
            Seconds it took.

        Raises:
            LearnerError: it failed, or was not ready within `learner.start_timeout_s`.
        """
        started = time.monotonic()
        learner = self._recipe.learner
        local = learner.launch == "local"
        setup = {
            "recipe": self._recipe.model_dump(mode="json"),
            "model_dir": str(self._model_dir),
            "checkpoint": str(checkpoint.absolute()) if checkpoint else None,
        }
        # First the name: ranks that wait for a session must not find that of an earlier process, which goes now.
        protocol.current_session(self._run_dir).unlink(missing_ok=True)
        for old in (self._run_dir / "learner").glob("*/"):
            shutil.rmtree(old)
        write_json(self._session.recipe, setup)
        write_json(protocol.current_session(self._run_dir), {"name": self._name, "local": local})
        with self._starting:
            if self._closed:
                raise LearnerError("the learner was closed before it started")
            self._heart = _Heart(self._session.alive)
            if local:
                self._ranks = _Ranks(self._torchrun(), self._environment(), self._log)
                atexit.register(self.close)
        self._wait(0, learner.start_timeout_s, "start")
        return time.monotonic() - started

    def train(self, step: int, batches: Sequence[TrainBatch]) -> TrainResult:
        """One optimizer step per batch, all on rollouts of the present weights.

        Args:
            step: of the run; for the log only.
            batches: none: nothing is trained, and `learner/skipped` says so.

        Raises:
            LearnerError: a rank failed, or was silent for `learner.timeout_s`.
        """
        if not batches:
            return TrainResult(metrics={"learner/skipped": 1.0}, updates=[], logp=[])
        reply = self._call({"op": "train", "step": step, "batches": len(batches)}, batches)
        updates = reply["metrics"]
        metrics = merge_updates(updates) | {"learner/skipped": 0.0, "learner/updates": float(len(updates))}
        return TrainResult(metrics=metrics, updates=updates, logp=self._logp(self._number))

    def logprobs(self, batch: TrainBatch) -> list[torch.Tensor]:
        """f32[reply] per sample under the present weights.

        Raises:
            LearnerError: as `train`.
        """
        self._call({"op": "logprobs", "batches": 1}, [batch])
        return self._logp(self._number)

    def export(self, path: Path, dtype: str | None = None) -> dict[str, float]:
        """Write the weights as one safetensors file with Hugging Face names (a tied lm_head once), atomically.

        Args:
            path: for speed, in /dev/shm.
            dtype: float32 | bfloat16; None: the recipe's `export_dtype`.

        Returns:
            `export_s` and `export_bytes`.

        Raises:
            LearnerError: as `train`.
        """
        dtype = dtype or self._recipe.export_dtype
        facts = self._call({"op": "export", "path": str(path.absolute()), "dtype": dtype})["facts"]
        return {"export_s": facts["seconds"], "export_bytes": facts["bytes"]}

    def save(self, path: Path) -> float:
        """Write a checkpoint folder, atomically; the seconds it took.

        Raises:
            LearnerError: as `train`.
        """
        return float(self._call({"op": "save", "path": str(path.absolute())})["seconds"])

    def close(self) -> None:
        """End the ranks: politely if they are well, else by force. Never raises, may be called twice."""
        atexit.unregister(self.close)
        with self._starting:  # in another thread: what it starts is ended here, or it starts nothing
            self._closed = True
        ranks = self._ranks
        if self._failed is None and self._heart is not None and (ranks is None or ranks.exit_code is None):
            self._failed = LearnerError("the learner was closed")
            with contextlib.suppress(OSError):  # a full disk: the ranks are killed below all the same
                write_json(self._session.command(self._number + 1), {"op": "close"})
            deadline = time.monotonic() + _CLOSE_S
            while ranks is not None and ranks.exit_code is None and time.monotonic() < deadline:
                if self._session.reply(self._number + 1).exists():
                    break  # nothing is left to do; torchrun's own way out takes seconds
                time.sleep(protocol.POLL_S)
        if ranks is not None:
            ranks.kill()
        if self._heart is not None:
            self._heart.stop()

    def _call(self, command: dict[str, Any], batches: Sequence[TrainBatch] = ()) -> dict[str, Any]:
        if self._failed is not None:
            raise LearnerError(str(self._failed))
        if self._heart is None:
            raise LearnerError("the learner was not started")
        self._number += 1
        if batches:
            from m2train.learner.batch import save_batch

            for index, batch in enumerate(batches):
                save_batch(self._session.batch(self._number, index), batch)
        write_json(self._session.command(self._number), command)
        reply = self._wait(self._number, self._recipe.learner.timeout_s, command["op"])
        for index in range(len(batches)):
            self._session.batch(self._number, index).unlink()
        self._session.command(self._number).unlink()
        self._session.reply(self._number).unlink()
        return reply

    def _wait(self, number: int, limit_s: float, what: str) -> dict[str, Any]:
        deadline = time.monotonic() + limit_s
        try:
            while True:
                reply = read_json(self._session.reply(number))
                if reply is not None:
                    return reply
                error = read_json(self._session.error)
                if error is not None:
                    raise LearnerError(f"learner rank {error['rank']} failed in {what}: {error['cause']}")
                if self._ranks is not None and self._ranks.exit_code is not None:
                    # The cause may have been written between the two looks.
                    error = read_json(self._session.error)
                    if error is None and read_json(self._session.reply(number)) is None:
                        raise LearnerError(self._death(what))
                    continue
                if self._closed and self._ranks is None:  # ranks that others start: no end of theirs tells us
                    raise LearnerError(f"the learner was closed in {what}")
                if time.monotonic() > deadline:
                    raise LearnerError(
                        f"the learner was silent for {limit_s:g} s in {what}; see {self._log} (limit: learner."
                        f"{'start_' if number == 0 else ''}timeout_s)"
                    )
                time.sleep(protocol.POLL_S)
        except LearnerError as err:
            self._failed = err
            self.close()
            raise

    def _death(self, what: str) -> str:
        """What killed torchrun's ranks, as far as its log tells."""
        assert self._ranks is not None
        try:
            tail = self._log.read_bytes()[-20000:].decode(errors="replace")
        except OSError:
            tail = ""
        codes = re.findall(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-?\d+)", tail)
        for rank, code in codes:
            if int(code) < 0 and -int(code) != signal.SIGTERM:  # SIGTERM: torchrun ending the others
                name = signal.Signals(-int(code)).name
                hint = " (out of memory?)" if name == "SIGKILL" else ""
                return f"learner rank {rank} was killed by {name}{hint} in {what}; see {self._log}"
        return f"the learner ended with exit code {self._ranks.exit_code} in {what}; see {self._log}"

    def _logp(self, number: int) -> list[torch.Tensor]:
        from safetensors.torch import load_file

        path = self._session.tensors(number)
        found = load_file(path)
        path.unlink()
        return list(found["logp"].split(found["lengths"].tolist()))

    def _torchrun(self) -> list[str]:
        learner = self._recipe.learner
        ranks = learner.tp * learner.pp * learner.dp
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={ranks}"),
            # Port 0: torchrun's own store takes a free one, so there is no race for it.
            *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
            *("-m", "m2train.learner.worker", str(self._run_dir), "--session", self._name),
        ]

    def _environment(self) -> dict[str, str]:
        import torch

        learner = self._recipe.learner
        ranks = learner.tp * learner.pp * learner.dp
        threads = learner.threads or max(1, len(os.sched_getaffinity(0)) // ranks)
        extra = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", protocol.CONTROLLER: str(os.getpid())}
        if torch.cuda.is_available():
            extra["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron orders TP communication before compute by it
        else:
            extra["TORCHDYNAMO_DISABLE"] = (
                "1"  # Megatron's jit_fuser is torch.compile, which needs a C++ compiler here
            )
            for name, value in _CPU_DEFAULTS.items():
                if name not in os.environ:
                    extra[name] = value
        return os.environ | extra


def merge_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """One row for a step of several updates."""
    merged: dict[str, float] = {}
    for name in updates[0]:
        values = [update[name] for update in updates]
        if name in _SUMMED:
            merged[name] = sum(values)
        elif name in _WORST:
            merged[name] = max(values)
        elif name in _LEAST:
            merged[name] = min(values)
        else:
            merged[name] = sum(values) / len(values)
    return merged


class _Ranks:
    """torchrun as a child in a process group of its own, which the kernel kills if this process dies.

    The kernel's signal is tied to the thread that forked, not to the process: a thread that lives as long as the
    child does it, and learns of its end at once.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.exit_code: int | None = None
        self._command, self._environment = command, environment
        log.parent.mkdir(parents=True, exist_ok=True)
        self._started, self._ended = threading.Event(), threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._fault: OSError | None = None
        self._file: IO[bytes] = log.open("ab")
        threading.Thread(target=self._watch, name="learner-watch", daemon=True).start()
        self._started.wait()
        if self._fault is not None:
            raise LearnerError(f"cannot start the learner: {self._fault}")

    def _watch(self) -> None:
        try:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=self._file,
                stderr=self._file,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as err:
            self._fault = err
            self._started.set()
            return
        finally:
            self._file.close()
        self._started.set()
        self.exit_code = self._process.wait()
        self._ended.set()

    def kill(self) -> None:
        """End the whole process group."""
        assert self._process is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._ended.wait(5.0)


class _Heart:
    """Changes a file every few seconds, for ranks on other machines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        threading.Thread(target=self._beat, name="learner-heart", daemon=True).start()

    def _beat(self) -> None:
        count = 0
        while True:
            try:
                self._path.write_text(str(count))
            except OSError:
                pass  # a full or absent disk shows elsewhere; the next beat tries again
            count += 1
            if self._stop.wait(protocol.HEARTBEAT_S):
                return

    def stop(self) -> None:
        """Beat no more."""
        self._stop.set()
