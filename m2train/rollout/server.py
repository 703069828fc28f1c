"""One vLLM server as a child process: its flags, its environment, its start, its end, and why it died."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2train.config import ConfigError
from m2train.host import LOOPBACK, free_port, on_cpu
from m2train.rollout.client import EngineClient, EngineError, EngineLost
from m2train.sync import weight_transfer_flags
from m2train.sync.base import SUPERVISED

SERVED_NAME = "policy"
_GRACE_S = 5.0
_PORT_TRIES = 3
_OURS = frozenset(
    "model host port served_model_name dtype tensor_parallel_size logprobs_mode enable_scale_out "
    "weight_transfer_config worker_extension_cls".split()
)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_CAUSE = re.compile(  # the last line of a traceback, behind vLLM's log prefix, or argparse's complaint
    r"^(?:\(\w+ pid=\d+\) )?(?:ERROR \S+ \S+ )?(?:\[[\w.]+:\d+\] )?"
    r"((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt)\b(?:: .+)?$|\S+: error: .+)"
)
_PLACE = re.compile(r'File "(.+)", line (\d+), in (\w+)')
_ECHO = (
    "See root cause above",
    "Engine core initialization failed",
    "EngineDeadError",
    "WorkerProc initialization",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSpec:
    """What a server is started with."""

    model: Path
    log: Path
    max_model_len: int
    max_num_seqs: int
    kv_bytes_per_token: int
    dtype: str = "bfloat16"
    tensor_parallel: int = 1
    threads: int | None = None
    devices: Sequence[str] | None = None
    """CUDA devices of this server; None: no restriction, or no GPU."""
    weight_transfer: str = "file"
    """How weights arrive: file | nccl."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The recipe's `[vllm]` section."""


def server_command(spec: ServerSpec, port: int) -> list[str]:
    """The command line of a server on this machine."""
    options: dict[str, Any] = {"max_model_len": spec.max_model_len, "max_num_seqs": spec.max_num_seqs}
    if on_cpu():
        # Eager: torch.compile takes 55 s on 2 cores and made 135M slower. uni: the worker is in the engine process.
        options |= {"enforce_eager": True}
        # vLLM 0.32 on CPU dies of a prompt that is split over two steps when its request has a seed ("CPU Generator
        # does not use offset"): 64 prompts of 40 tokens were enough. So prompts are never split.
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(2048, spec.max_model_len)}
        if spec.tensor_parallel == 1:
            options |= {"distributed_executor_backend": "uni"}
    options |= spec.options
    command = [sys.executable, "-m", "m2train.rollout.serve"]
    command += ["--model", str(spec.model), "--host", LOOPBACK, "--port", str(port)]
    command += ["--served-model-name", SERVED_NAME, "--dtype", spec.dtype]
    command += ["--tensor-parallel-size", str(spec.tensor_parallel)]
    command += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out", "--disable-uvicorn-access-log"]
    return command + weight_transfer_flags(spec.weight_transfer) + to_flags(options)


def to_flags(options: Mapping[str, Any]) -> list[str]:
    """`max_num_seqs = 64` -> `--max-num-seqs 64`; true and false -> `--x`, `--no-x`; tables -> JSON."""
    flags: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, Mapping):
            flags += [f"--{name}", json.dumps(dict(value))]
        elif isinstance(value, list | tuple):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse `[vllm]` keys that m2train sets itself.

    Raises:
        ConfigError: naming the key.
    """
    for key in options:
        if key.replace("-", "_") in _OURS:
            raise ConfigError(f"[vllm] {key} is set by m2train (see the [model] and [rollout] sections); remove it")


def server_environment(spec: ServerSpec) -> dict[str, str]:
    """The environment of a server; what the user has set stays, except for what the run relies on."""
    env = dict(os.environ)
    for key, value in {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}.items():
        env.setdefault(key, value)
    env["VLLM_SERVER_DEV_MODE"] = "1"
    env["PYTHONUNBUFFERED"] = "1"
    env[SUPERVISED] = "1"
    package_root = str(Path(__file__).resolve().parents[2])  # its processes import m2train
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH")]))
    if spec.devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices)
    if on_cpu():
        env["OMP_NUM_THREADS"] = str(spec.threads or os.cpu_count() or 1)
        # Unpinned and not spinning: engine, learner and patient share the cores in turns. Pinned and spinning, vLLM
        # was seen to stall 10-50x while another process used the same cores.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        env.setdefault("KMP_BLOCKTIME", "1")
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_kv_gib(spec)))
        if spec.tensor_parallel == 1:
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # lets `uni` through; the engine keeps its own process
    return env


def _kv_gib(spec: ServerSpec) -> int:
    wanted = spec.kv_bytes_per_token * spec.max_model_len * spec.max_num_seqs
    return max(1, min(2, wanted >> 30))


class ServerProcess:
    """A server that has been started; `stop` ends it with everything it started."""

    def __init__(self, spec: ServerSpec, port: int) -> None:
        self.spec = spec
        self.url = f"http://{LOOPBACK}:{port}"
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = spec.log.stat().st_size if spec.log.exists() else 0
        supervisor = [sys.executable, "-I", "-S", str(Path(__file__).with_name("supervise.py"))]
        with spec.log.open("ab") as log:
            self._child = subprocess.Popen(
                [*supervisor, str(os.getpid()), str(_GRACE_S), *server_command(spec, port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(spec),
                start_new_session=True,
            )

    @classmethod
    async def start(cls, spec: ServerSpec, deadline: float, timeout_s: float) -> ServerProcess:
        """Start a server and wait until it answers.

        Raises:
            EngineLost: it died (the log's cause); nothing of it is left.
            EngineError: it was not ready in time; nothing of it is left.
        """
        for attempt in range(_PORT_TRIES):
            server = cls(spec, free_port())
            try:
                await server._wait(deadline, timeout_s)
                return server
            except BaseException as err:
                await server.stop(grace=False)
                # Between our look and vLLM's bind, another process took the port: try another one.
                if "address already in use" not in str(err).lower() or attempt == _PORT_TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    @property
    def alive(self) -> bool:
        """Whether the supervisor, and therefore the server, runs."""
        return self._child.poll() is None

    @property
    def pid(self) -> int:
        """Pid of the supervisor: the leader of the session that holds the server."""
        return self._child.pid

    async def _wait(self, deadline: float, timeout_s: float) -> None:
        client = EngineClient(self.url, timeout_s)
        try:
            while not await client.healthy():
                if not self.alive:
                    raise EngineLost(f"the vLLM server ended while starting: {self.cause()}")
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"the vLLM server was not ready in time ({self.cause()}); raise rollout.start_timeout_s; "
                        f"log: {self.spec.log}"
                    )
                await asyncio.sleep(0.1)
        finally:
            await client.close()

    def cause(self) -> str:
        """One line from this server's part of the log: the innermost error, or the last line."""
        with self.spec.log.open("rb") as handle:
            handle.seek(self._log_start)
            lines = _ANSI.sub("", handle.read().decode(errors="replace")).splitlines()
        found = [text for text in _errors(lines) if not any(echo in text for echo in _ECHO)]
        text = found[0] if found else next((line for line in reversed(lines) if line.strip()), "it wrote no log")
        return f"{' '.join(text.split())[:300]} [{self.spec.log}]"

    async def stop(self, *, grace: bool = True) -> None:
        """End the server and all its children; SIGTERM first unless `grace` is False."""
        if grace and self.alive:
            self._child.send_signal(signal.SIGTERM)
            await self._gone(_GRACE_S + 3.0)
        if self.alive or (self._child.returncode or 0) < 0:
            # It would not end, or was killed before it could clear its session: do both.
            _kill_session(self._child.pid)
        await self._gone(10.0)

    async def _gone(self, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while self.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.05)


def _errors(lines: Sequence[str]) -> Iterator[str]:
    """The errors of a log; one without a message gets its place in the code, a pydantic one its first complaint."""
    for i, line in enumerate(lines):
        match = _CAUSE.search(line)
        if match is None:
            continue
        text = match.group(1)
        if ":" not in text:
            places = [place for above in lines[max(0, i - 3) : i] if (place := _PLACE.search(above))]
            text += f" at {Path(places[-1][1]).name}:{places[-1][2]} in {places[-1][3]}" if places else ""
        elif "validation error" in text and i + 1 < len(lines):
            text += f": {lines[i + 1].strip()}"
        yield text


def _kill_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass
