"""The weight-update sequence of one engine.

    pause(keep) -> start -> update -> finish(version) -> reset prefix cache -> resume -> report -> version

vLLM keeps its prefix cache across an update: a prompt that shares a block (128 tokens on CPU) with an earlier one
would be continued on keys and values of the old weights, silently. So the cache is dropped while the engine is
paused; running requests are recomputed under the new weights, and their `weight_versions` spans say where the change
fell. (`/pause` can drop the cache too, but by a parameter that vLLM calls deprecated, and without telling whether it
did.) The report and the version then make the engine itself prove that it runs on the new weights. An update that
fails leaves the engine paused, for its layers may be empty.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

from m2train.errors import RunError

FILE_BACKEND = "m2train_file"
WORKER_EXTENSION = "m2train.sync.file_engine.WorkerExtension"
REPORT_METHOD = "m2train_weight_report"
SUPERVISED = "M2TRAIN_SUPERVISED"
"""Set in the environment of servers that m2train starts: their engine processes must not outlive their parent."""


class WeightSync(Protocol):
    """Gives the engines it serves the weights of a file, under a name."""

    async def publish(self, source: Path, version: str) -> dict[str, float]:
        """Transfer and activate; returns `transfer_s`, `load_s` and `total_s` of the slowest engine."""
        ...

    def close(self) -> None:
        """Release what the transfers held."""
        ...


class Engine(Protocol):
    """The two calls that an update needs of an HTTP client."""

    url: str

    async def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """One HTTP call; the decoded JSON answer, or an exception that names the cause."""
        ...


class SyncError(RunError):
    """The engine took an update but does not run on the new weights."""


def weight_transfer_flags(kind: str = "file") -> list[str]:
    """The flags that a vLLM server needs for updates by `kind`, file or nccl (a user-started server too).

    The extension registers the file engine; it also ends the engine processes of a server that m2train started.
    """
    backend = {"file": FILE_BACKEND, "nccl": "nccl"}[kind]
    config = json.dumps({"backend": backend})
    return ["--weight-transfer-config", config, "--worker-extension-cls", WORKER_EXTENSION]


async def reset_prefix_cache(engine: Engine) -> None:
    """Drop all cached keys and values; running requests are recomputed.

    Raises:
        SyncError: blocks stayed in use.
    """
    answer = await engine.call("POST", "/reset_prefix_cache", params={"reset_running_requests": True})
    if not answer.get("success"):
        raise SyncError(f"{engine.url} kept prefix-cache blocks of the old weights; restart the server")


class FileSync:
    """Updates one engine from a safetensors file that its workers can read (shared memory, or a shared disk).

    Args:
        engine: the HTTP client of the server.
        check: compare every linear layer of a CPU engine with the file after each update (a few columns of each).
    """

    def __init__(self, engine: Engine, *, check: bool = True) -> None:
        self._engine = engine
        self._check = check
        self._ready = False

    async def publish(self, source: Path, version: str) -> dict[str, float]:
        """Load the file and name the weights `version`.

        Raises:
            SyncError: the engine reports another version, or layers that still hold older weights.
            EngineError: the engine refused or was lost (raised by its client).
        """
        started = time.perf_counter()
        call = self._engine.call
        await call("POST", "/pause", params={"mode": "keep", "clear_cache": False})
        if not self._ready:
            await call("POST", "/init_weight_transfer_engine", json={"init_info": {}})
            self._ready = True
        await call("POST", "/start_weight_update")
        update = {"path": str(source.resolve()), "check": self._check}
        await call("POST", "/update_weights", json={"update_info": update})
        await call("POST", "/finish_weight_update", json={"weight_version": version})
        await reset_prefix_cache(self._engine)
        await call("POST", "/resume")
        reports = await self._reports()
        for report in reports:
            if report["stale"]:
                raise SyncError(
                    f"{self._engine.url} does not run on the weights of {source.name} in "
                    f"{len(report['stale'])} layers ({', '.join(report['stale'][:3])}); "
                    "this vLLM version is not supported on CPU"
                )
        await self._check_version(version)
        total = time.perf_counter() - started
        load = max(report["load_s"] for report in reports)
        return {"transfer_s": total - load, "load_s": load, "total_s": total}

    def close(self) -> None:
        """Nothing is held."""

    async def _reports(self) -> list[dict[str, Any]]:
        answer = await self._engine.call("POST", "/collective_rpc", json={"method": REPORT_METHOD})
        reports: list[dict[str, Any]] = answer["results"]
        return reports

    async def _check_version(self, version: str) -> None:
        found = str((await self._engine.call("GET", "/weight_info"))["weight_version"])
        if found != version:
            raise SyncError(f"{self._engine.url} reports weight version {found!r} after an update to {version!r}")
