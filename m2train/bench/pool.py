"""Starts measuring processes and talks to them. They end when their stdin does, so none outlives its parent."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from m2train.bench import callgrind

HOST = Path(__file__).with_name("host.py")
_LIMIT_S = 1800.0


class WorkerError(RuntimeError):
    """A measuring process failed; the message is its cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """What a worker measures with.

    Attributes:
        cases: folder of the case files.
        device: cpu | cuda.
        timer: its clock.
        threads: CPU threads.
        workload: recorded rollouts, or None.
        site: a build to measure instead of what is installed here.
        neighbours: processes on the GPU before ours; None: not asked.
    """

    cases: Path
    device: str
    timer: str
    threads: int
    workload: Path | None = None
    site: Path | None = None
    neighbours: int | None = None


class Worker:
    """One measuring process."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self._scratch = tempfile.TemporaryDirectory(prefix="m2bench-")
        log = Path(self._scratch.name) / "stderr"
        self._log = log
        command = [sys.executable, "-P", str(HOST)]
        if config.site is not None:
            command.append(str(config.site))
        environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "PYTHONHASHSEED": "0"}
        if config.timer == "callgrind":
            prefix = Path(self._scratch.name) / "callgrind"
            command = callgrind.command(prefix) + command
            environment[callgrind.OUT_ENV] = str(prefix)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
        self._buffer = b""
        self.facts: dict[str, Any] = {}

    def start(self) -> None:
        """Ask for its first answer; several workers may be starting at once."""
        config = self.config
        self._send(
            {
                "op": "start",
                "cases": str(config.cases),
                "device": config.device,
                "timer": config.timer,
                "threads": config.threads,
                "workload": str(config.workload) if config.workload else None,
                "neighbours": config.neighbours,
            }
        )

    def ready(self) -> None:
        """Wait for it."""
        self.facts = self._receive("start")

    def ask(self, op: str, **request: Any) -> Any:
        """Send a request and wait for its answer.

        Raises:
            ValueError: the request was wrong (a user's mistake).
            WorkerError: it failed, died, or took too long.
        """
        self.post(op, **request)
        return self.answer(op)

    def post(self, op: str, **request: Any) -> None:
        """Send a request; `answer` waits for what comes of it."""
        self._send({"op": op, **request})

    def answer(self, op: str) -> Any:
        """Wait for the answer to the last request; raises as `ask`."""
        return self._receive(op)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as err:
            raise WorkerError(f"a measuring process died: {self._tail()}") from err

    def _receive(self, op: str) -> Any:
        assert self._process.stdout is not None
        deadline = time.monotonic() + _LIMIT_S
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise WorkerError(f"a measuring process gave no answer to {op!r} within {_LIMIT_S:g} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                code = self._process.wait()
                raise WorkerError(f"a measuring process ended with {code} in {op!r}: {self._tail()}")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "value" in answer:
            raise ValueError(answer["value"].partition(": ")[2])
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._scratch.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def workers(configs: Sequence[WorkerConfig]) -> Iterator[list[Worker]]:
    """Start some workers side by side; all are closed at the end."""
    with ExitStack() as stack:
        found = [stack.enter_context(Worker(config)) for config in configs]
        for worker in found:
            worker.start()
        for worker in found:
            worker.ready()
        yield found


class Pool:
    """Some workers alike, which are replaced together when one of them breaks."""

    def __init__(self, config: WorkerConfig, number: int) -> None:
        self._configs = [config] * number
        self._running = ExitStack()
        self.workers: list[Worker] = []

    def __enter__(self) -> Pool:
        self.workers = self._running.enter_context(workers(self._configs))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, where: TracebackType | None
    ) -> None:
        self._running.close()

    def restart(self) -> None:
        """End all processes and start others.

        Raises:
            WorkerError: they do not start either.
        """
        self._running.close()
        self.__enter__()

    def ask(self, op: str, **request: Any) -> list[Any]:
        """Ask all of them at once; the answers in their order. Raises as `Worker.ask`, when all have answered."""
        for worker in self.workers:
            worker.post(op, **request)
        answers, errors = [], []
        for worker in self.workers:
            try:
                answers.append(worker.answer(op))
            except (ValueError, WorkerError) as err:
                errors.append(err)
        if errors:
            raise errors[0]
        return answers
