"""The rollout engines of a run: started here or given by URL, kept alive, kept at one weight version."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from m2train.concurrency import gather_or_cancel
from m2train.config import Recipe
from m2train.records import Generation
from m2train.rollout.client import EngineClient, EngineError, EngineLost
from m2train.rollout.placement import server_specs, weight_transfer
from m2train.rollout.server import ServerProcess, ServerSpec, check_options
from m2train.sync import FileSync, WeightSync, reset_prefix_cache

__all__ = ["EngineError", "EngineLost", "EnginePool"]

log = logging.getLogger(__name__)
_BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_AWAIT_S = 1.0
"""Between two looks for a given server that is gone."""
_END_UPDATE_S = 60.0
"""An engine that does not close a failed update in this time is taken to hang in it."""


class _Slot:
    """One engine: its client, its process if we started it, and how often it was started again."""

    def __init__(self, index: int, spec: ServerSpec | None, url: str = "") -> None:
        self.index = index
        self.spec = spec
        self.url = url
        self.process: ServerProcess | None = None
        self.client: EngineClient | None = None
        self.sync: WeightSync | None = None
        self.held = ""
        """Version of the weights that it was last known to hold."""
        self.lock = asyncio.Lock()
        self.life = 0
        """Counts starts: a request that failed in an earlier life need not start the engine again."""
        self.in_flight = 0
        self.restarts = 0

    def ready(self) -> EngineClient:
        if self.client is None:
            raise AssertionError("EnginePool.start() must come first")
        return self.client


class EnginePool:
    """All engines as one: `generate` survives a dead engine, `update_weights` reaches every engine.

    Args:
        recipe: its `rollout` and `vllm` sections.
        model: Hugging Face folder that the engines start from.
        run_dir: logs go to `logs/vllm_<i>.log` in it.
        stop_token_ids: ids that end a reply besides the model's own end-of-sequence.
        version: name of the weights in `model`.
        publishes: the caller gives the engines weights before it samples, so that servers of `rollout.urls` may hold
            any at first. Otherwise all must hold the same.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Path,
        run_dir: Path,
        *,
        stop_token_ids: Sequence[int] = (),
        version: str = "initial",
        publishes: bool = False,
    ) -> None:
        check_options(recipe.vllm)
        self._recipe = recipe
        self._stop = tuple(stop_token_ids)
        self._version = version
        self._publishes = publishes
        self._source: tuple[Path, tuple[int, int, int]] | None = None
        self._gate = asyncio.Semaphore(recipe.rollout.concurrency)
        self._closing = False
        self._adopted: str | None = None
        self._transfer = weight_transfer(recipe)
        self._fan_out: WeightSync | None = None
        """All engines as one NCCL group: made by an update, unmade when an engine leaves it by dying."""
        if recipe.rollout.urls:
            self._slots = [_Slot(i, None, url) for i, url in enumerate(recipe.rollout.urls)]
        else:
            specs = server_specs(recipe, model, run_dir)
            self._slots = [_Slot(i, spec) for i, spec in enumerate(specs)]

    @property
    def version(self) -> str:
        """Version of the weights that every engine holds."""
        return self._version

    @property
    def restarts_total(self) -> int:
        """How often a dead engine was started again so far, over the whole pool; each time is a logged warning."""
        return sum(slot.restarts for slot in self._slots)

    @property
    def urls(self) -> list[str]:
        """Base URLs of the engines (after `start`)."""
        return [slot.ready().url for slot in self._slots]

    @property
    def pids(self) -> list[int]:
        """Leaders of the sessions of the started engines."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]

    async def start(self) -> None:
        """Start or reach every engine, and check that each can do what training needs.

        Raises:
            EngineError: one line with the cause; nothing is left running.
        """
        try:
            await gather_or_cancel([self._open(slot) for slot in self._slots])
        except BaseException:
            await self.close()
            raise

    async def __aenter__(self) -> EnginePool:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every engine that was started here, with all its children."""
        self._closing = True
        self._drop_group()
        await asyncio.gather(*(self._shut(slot, grace=True) for slot in self._slots))

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int,
        affinity: str = "",
    ) -> Generation:
        """Sample one continuation; temperature 0 is greedy.

        A request whose engine dies is repeated with the same seed on the restarted engine, which has the current
        weights by then: a run goes on and no dialogue is lost. A server of `rollout.urls` is waited for instead.

        Args:
            prompt_ids: the whole prompt.
            max_tokens: longest continuation.
            temperature: softmax temperature.
            top_p: nucleus.
            seed: of this request.
            affinity: requests with the same key go to the same engine, whose prefix cache holds their past.

        Raises:
            EngineError: refused request, time-out, or an engine that cannot be kept alive.
        """
        slot = self._pick(affinity)
        async with self._gate:
            slot.in_flight += 1
            try:
                for attempt in range(len(_BACKOFF_S) + self._recipe.rollout.max_restarts + 1):
                    async with slot.lock:  # held while a restarted engine is still without this run's weights
                        client, life = slot.ready(), slot.life
                    try:
                        return await client.generate(
                            prompt_ids, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
                        )
                    except EngineLost as err:
                        await self._revive(slot, life, err, attempt)
                raise EngineError(f"{slot.ready().url} kept failing one request; see its log")
            finally:
                slot.in_flight -= 1

    async def update_weights(self, source: Path, version: str) -> dict[str, float]:
        """Load a safetensors file into every engine under a new version name.

        Over NCCL all engines form one group and one broadcast serves them; otherwise each reads the file.

        Args:
            source: readable by the engines; must stay as it is until the next update (a restarted engine reads it).
            version: never used before in this run.

        Returns:
            `transfer_s`, `load_s`, `total_s`: the slowest engine's.

        Raises:
            EngineError: missing file, or an engine that cannot take it.
            SyncError: an engine that took it and does not run on it.
        """
        self._source, self._version = (source, _identity(source)), version
        if self._transfer == "nccl" and len(self._slots) > 1:
            return await self._broadcast()
        times = await asyncio.gather(*(self._push(slot) for slot in self._slots))
        return {name: max(row[name] for row in times) for name in times[0]}

    def _pick(self, affinity: str) -> _Slot:
        if affinity:
            return self._slots[zlib.crc32(affinity.encode()) % len(self._slots)]
        return min(self._slots, key=lambda slot: slot.in_flight)

    async def _open(self, slot: _Slot) -> None:
        """Start (or reach) the engine of a slot and give it the pool's weights."""
        rollout = self._recipe.rollout
        url = slot.url
        if slot.spec is not None:
            deadline = time.monotonic() + rollout.start_timeout_s
            slot.process = await ServerProcess.start(slot.spec, deadline, rollout.request_timeout_s)
            url = slot.process.url
        client = EngineClient(url, rollout.request_timeout_s, self._stop)
        if slot.client is not None:
            await slot.client.close()
        if slot.sync is not None:
            slot.sync.close()
            self._drop_group()
        slot.client, slot.sync = client, self._make_sync(client)
        slot.life += 1
        if slot.spec is None and not await client.healthy():
            raise EngineError(f"no vLLM server answers at {url} (rollout.urls); start it, or correct the URL")
        if slot.spec is None:  # a run that was killed during an update left the server paused, or worse
            if await client.end_abandoned_update():
                log.warning("%s was left in the middle of a weight update; it was ended", url)
                await reset_prefix_cache(client)
            await client.call("POST", "/resume")
        await client.check(self._recipe.longest_request)
        if self._source is not None:
            await self._publish(slot)
            return
        if slot.spec is not None:
            await client.set_weight_version(self._version)
            slot.held = self._version
            return
        slot.held = await client.weight_version()
        if not self._publishes:
            self._adopt(url, slot.held)

    def _adopt(self, url: str, version: str) -> None:
        """Name the pool's weights as a given server does: they may be anyone's until this run sends its own."""
        if self._adopted not in (None, version):
            raise EngineError(
                f"{url} holds weights {version!r}; rollout.urls held {self._adopted!r} so far: start all of them "
                "from the same model"
            )
        self._adopted = self._version = version

    async def _shut(self, slot: _Slot, *, grace: bool) -> None:
        process, slot.process = slot.process, None
        if process is not None:
            await process.stop(grace=grace)
        if slot.client is not None and grace:
            await slot.client.close()
        if slot.sync is not None and grace:
            slot.sync.close()

    async def _push(self, slot: _Slot) -> dict[str, float]:
        for attempt in range(len(_BACKOFF_S)):
            life = slot.life
            try:
                return await self._publish(slot)
            except EngineLost as err:
                await self._recover(slot, life, err, attempt)
                last = err
        raise EngineError(f"{slot.ready().url} kept failing weight updates ({last}); see its log") from last

    async def _broadcast(self) -> dict[str, float]:
        """One update of all engines as a group; after a death the engine is revived and a new group is formed, of
        which those that hang in the broadcast of the old one cannot be."""
        for attempt in range(len(_BACKOFF_S)):
            lives = [slot.life for slot in self._slots]
            try:
                if self._fan_out is None:
                    self._fan_out = self._make_group()
                times = await self._fan_out.publish(self._unchanged_source(), self._version)
                for slot in self._slots:
                    slot.held = self._version
                return times
            except EngineLost as err:
                self._drop_group()
                await asyncio.gather(
                    *(self._recover(s, life, err, attempt) for s, life in zip(self._slots, lives, strict=True))
                )
                last = err
        raise EngineError(f"the engines kept failing weight updates over NCCL ({last}); see their logs") from last

    async def _publish(self, slot: _Slot) -> dict[str, float]:
        if slot.sync is None:
            raise AssertionError("EnginePool.start() must come first")
        times = await slot.sync.publish(self._unchanged_source(), self._version)
        slot.held = self._version
        return times

    def _unchanged_source(self) -> Path:
        if self._source is None:
            raise AssertionError("nothing to publish")
        path, identity = self._source
        if _identity(path) != identity:
            raise EngineError(
                f"{path} changed after the update to {self._version!r}, and an engine needs it again; "
                "write new weights to a temporary file and rename it just before update_weights"
            )
        return path

    def _make_sync(self, client: EngineClient) -> WeightSync:
        if self._transfer == "file":
            return FileSync(client)
        from m2train.sync.nccl import NcclSync

        return NcclSync([client.url], timeout_s=self._recipe.rollout.request_timeout_s)

    def _make_group(self) -> WeightSync:
        from m2train.sync.nccl import NcclSync

        return NcclSync(self.urls, timeout_s=self._recipe.rollout.request_timeout_s)

    def _drop_group(self) -> None:
        if self._fan_out is not None:
            self._fan_out.close()
            self._fan_out = None

    async def _revive(self, slot: _Slot, life: int, err: EngineLost, attempt: int) -> None:
        """Bring an engine back after a lost request: at most one task at a time does it, the others wait for it."""
        async with slot.lock:
            if slot.life != life:
                return
            if self._closing:
                raise err
            if slot.spec is None:
                if await self._rejoin(slot, err):
                    return
            elif not await self._transient(slot):
                await self._restart(slot, err)
                return
            if attempt >= len(_BACKOFF_S):
                raise EngineError(f"engine {slot.index} gave out: {err}") from err
        await asyncio.sleep(_BACKOFF_S[attempt])  # not under the lock: many requests wait side by side

    async def _recover(self, slot: _Slot, life: int, err: EngineLost, attempt: int) -> None:
        """Make an engine ready for another try after an update that failed, on it or on another of its group.

        Raises:
            EngineError: a given server hangs in the update, or as `_revive`.
        """
        await self._revive(slot, life, err, attempt)
        async with slot.lock:
            if slot.life != life:  # started again, or given the weights as it came back
                return
            try:
                await asyncio.wait_for(slot.ready().end_abandoned_update(), _END_UPDATE_S)
            except TimeoutError:
                if slot.spec is None:
                    raise EngineError(f"{slot.ready().url} hangs in a weight update ({err}); restart it") from err
                await self._restart(slot, err)

    async def _rejoin(self, slot: _Slot, err: EngineLost) -> bool:
        """Wait until a given server answers; whether it had lost its weights and was given the pool's.

        Whoever runs the servers of `rollout.urls` restarts them too (Slurm, Kubernetes); one that is back holds the
        weights that it was started from.

        Raises:
            EngineError: it does not come back within `rollout.start_timeout_s`, or not as one that fits the run.
        """
        limit = self._recipe.rollout.start_timeout_s
        deadline = time.monotonic() + limit
        told = False
        while not self._closing:
            client = slot.ready()
            try:
                if await client.healthy():
                    if await client.weight_version() in (slot.held, self._version):
                        return False
                    await self._open(slot)
                    log.warning("%s is back and holds this run's weights again", client.url)
                    return True
            except EngineLost as again:
                err = again
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{client.url} (rollout.urls) did not come back within rollout.start_timeout_s = {limit:g} s; "
                    f"last cause: {err}"
                ) from err
            if not told:
                log.warning("%s is lost (%s): waiting up to %g s for it", client.url, err, limit)
                told = True
            await asyncio.sleep(_AWAIT_S)
        raise err

    async def _restart(self, slot: _Slot, err: EngineLost) -> None:
        """Start a dead engine again; one that dies while it starts too, as long as there are restarts left.

        Raises:
            EngineError: no restarts left, or an engine that starts and does not fit the run.
        """
        limit = self._recipe.rollout.max_restarts
        while not self._closing:
            cause = str(err) if slot.process is None else slot.process.cause()
            await self._shut(slot, grace=False)
            if self.restarts_total >= limit:
                raise EngineError(
                    f"engine {slot.index} died after {self.restarts_total} restarts (rollout.max_restarts); "
                    f"last cause: {cause}"
                ) from err
            slot.restarts += 1
            log.warning("engine %d died: restart %d of %d; cause: %s", slot.index, self.restarts_total, limit, cause)
            try:
                await self._open(slot)
                return
            except EngineLost as again:
                err = again
        raise err

    async def _transient(self, slot: _Slot) -> bool:
        """Whether a lost request's engine is fine: its process runs and its engine core answers."""
        for _ in range(5):  # a dying server needs a moment to be seen as dead
            await asyncio.sleep(0.1)
            if slot.process is None or not slot.process.alive:
                return False
        for pause in (1.0, 5.0):  # one that is only busy, or this process out of sockets
            if await slot.ready().healthy():
                return True
            await asyncio.sleep(pause)
        return await slot.ready().healthy()


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as err:
        raise EngineError(f"weights file {path}: {err.strerror}; it must stay until the next update") from err
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
