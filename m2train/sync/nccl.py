"""GPU to GPU: vLLM's own nccl weight-transfer engine behind `WeightSync`.

NEVER RUN ON A GPU SO FAR: written against vLLM 0.32's interfaces, which `tests/test_sync_nccl.py` compares by
signature and drives with fakes. `rollout.weight_transfer` chooses: "auto" is this on a machine with a GPU. Servers
need `--weight-transfer-config '{"backend": "nccl"}'`. The publisher is the controller, on a GPU that no engine uses
(NCCL refuses two ranks on one GPU): the learner's first.

vLLM's client drives one server. `FanOutClient` drives several as one NCCL group: rank 0 is the publisher, and each
server's workers follow those of the server before it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from m2train.errors import RunError
from m2train.host import address_towards, free_port
from m2train.rollout.client import EngineLost
from m2train.sync.base import SyncError

T = TypeVar("T")


def _in_daemon(call: Callable[..., T], *args: Any) -> Future[T]:
    """Run a call in a thread of its own that may hang: the end of the process waits for an executor's, not for it."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # from here on a cancellation is refused, and the result has a place

    def run() -> None:
        try:
            outcome.set_result(call(*args))
        except BaseException as err:
            outcome.set_exception(err)

    threading.Thread(target=run, name="nccl-sync", daemon=True).start()
    return outcome


class FanOutClient:
    """vLLM's four-call control interface over several servers; pauses, resets caches and resumes around an update."""

    def __init__(self, urls: Sequence[str], timeout_s: float) -> None:
        import httpx

        self.urls = [url.rstrip("/") for url in urls]
        self.version = ""
        """Name for the weights of the update in progress (vLLM's trainer does not pass one)."""
        self._http = httpx.Client(timeout=timeout_s, trust_env=False)
        self.refusal = ""
        """Why a server did not join the group or take a broadcast: NCCL waits for it all the same."""
        self.refused: Future[EngineLost | SyncError] = Future()
        """Done once a server does not join."""
        self._closed: Future[None] = Future()

    def world_sizes(self) -> list[int]:
        """GPU workers of each server."""
        return [int(answer["world_size"]) for answer in self._each("GET", "/get_world_size")]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every server join the NCCL group at its own rank offset; returns when all have joined."""
        offset, bodies = int(init_info["rank_offset"]), []
        for size in self.world_sizes():
            bodies.append({"init_info": {**init_info, "rank_offset": offset}})
            offset += size
        try:
            self._each("POST", "/init_weight_transfer_engine", bodies)
        except (EngineLost, SyncError) as err:
            self.refusal = f'{err}; was it started with --weight-transfer-config \'{{"backend": "nccl"}}\'?'
            if not self.refused.done():
                self.refused.set_result(type(err)(self.refusal))
            raise

    def start_weight_update(self) -> None:
        """Freeze generation and open the update."""
        self._each("POST", "/pause?mode=keep&clear_cache=false")
        self._each("POST", "/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Tell the workers what will be broadcast; returns when they have received it."""
        self.refusal = ""
        try:
            self._each("POST", "/update_weights", [{"update_info": update_info}] * len(self.urls))
        except (EngineLost, SyncError) as err:
            self.refusal = str(err)
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update under its name, drop keys and values of the old weights, go on generating."""
        version = weight_version or self.version
        self._each("POST", "/finish_weight_update", [{"weight_version": version}] * len(self.urls))
        for url, answer in zip(
            self.urls, self._each("POST", "/reset_prefix_cache?reset_running_requests=true"), strict=True
        ):
            if not answer.get("success"):
                raise SyncError(f"{url} kept prefix-cache blocks of the old weights; restart the server")
        self._each("POST", "/resume")

    def versions(self) -> list[str]:
        """The weight version that each server reports."""
        return [str(answer["weight_version"]) for answer in self._each("GET", "/weight_info")]

    def close(self) -> None:
        """Close the connections. A call that waits for an answer, in whatever thread, ends with `EngineLost`."""
        if not self._closed.done():
            self._closed.set_result(None)
        self._http.close()

    def _each(self, method: str, path: str, bodies: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        import httpx

        def one(url: str, body: Any) -> dict[str, Any]:
            try:
                answer = self._http.request(method, url + path, json=body)
            except httpx.HTTPError as err:
                raise EngineLost(f"{url}{path}: {type(err).__name__}: {err}") from err
            if answer.is_server_error:
                raise EngineLost(f"{url}{path}: HTTP {answer.status_code}: {answer.text[:300]}")
            if answer.is_error:
                raise SyncError(f"{url}{path}: HTTP {answer.status_code}: {answer.text[:300]}")
            return dict(answer.json())

        if not self._closed.done():
            pairs = zip(self.urls, bodies or [None] * len(self.urls), strict=True)
            answers = [_in_daemon(one, *pair) for pair in pairs]
            waiting: set[Future[Any]] = set(answers)
            while waiting and not self._closed.done():
                waiting -= wait({*waiting, self._closed}, return_when=FIRST_COMPLETED).done
            if not waiting:
                return [answer.result() for answer in answers]
        raise EngineLost(f"{self.urls[0]}{path}: given up, the connections are closed")


class SafetensorsSource:
    """A weights file as vLLM's `WeightSource`: names, dtypes and shapes first, then the tensors in the same order."""

    def __init__(self, path: Path, device: str = "cuda") -> None:
        self.path = path
        self._device = device

    def metadata(self) -> list[Any]:
        """What iteration will yield, without reading tensors into memory."""
        from safetensors import safe_open
        from vllm.distributed.weight_transfer.base import ParamMeta

        with safe_open(self.path, framework="pt", device="cpu") as file:
            return [ParamMeta(name, t.dtype, tuple(t.shape)) for name in file.keys() for t in [file.get_tensor(name)]]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt", device="cpu") as file:
            for name in file.keys():
                yield name, file.get_tensor(name).to(self._device)


class _Group:
    """One life of the NCCL group: formed by its first update, never used again after it was given up."""

    def __init__(self, client: FanOutClient, device: str) -> None:
        self.client = client
        self._device = device
        self._source: SafetensorsSource | None = None
        self._engine: Any = None
        self._given_up = False

    @property
    def formed(self) -> bool:
        """Whether the servers have joined."""
        return self._source is not None

    def publish(self, source: Path, version: str) -> dict[str, float]:
        """One update, in a thread; forms the group first."""
        try:
            return self._publish(source, version)
        finally:
            if self._given_up:  # the thread came back after all, and no other one uses the communicator
                self._leave()

    def give_up(self) -> None:
        """Free what waits for answers. The communicator is its thread's, which may hang in it: it is left alone."""
        self._given_up = True
        self.client.close()

    def close(self) -> None:
        """Leave the group."""
        self._leave()
        self.client.close()

    def _leave(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _publish(self, source: Path, version: str) -> dict[str, float]:
        started = time.perf_counter()
        if self._source is None:
            first = SafetensorsSource(source, self._device)
            self._engine = self._connect(first)
            self._source = first  # last: a retry after a failure connects again
        self._source.path = source
        self.client.version = version
        self._engine.send_weights()
        found = self.client.versions()
        if set(found) != {version}:
            raise SyncError(f"servers report weight versions {found} after an update to {version!r}")
        total = time.perf_counter() - started
        return {"transfer_s": total, "load_s": 0.0, "total_s": total}

    def _connect(self, source: SafetensorsSource) -> Any:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(
            master_address=meeting_address(self.client.urls),
            master_port=free_port(""),
            world_size=1 + sum(self.client.world_sizes()),
            rank=0,
        )
        factory: Callable[..., Any] = WeightTransferTrainerFactory.trainer_init
        return factory(info, client=self.client, source=source)


def meeting_address(urls: Sequence[str]) -> str:
    """The address at which all servers reach this machine: a loopback one only if all of them are here."""
    parts = [urlsplit(url) for url in urls]
    seen = [address_towards(part.hostname or "localhost", part.port or 80) for part in parts]
    return next((address for address in seen if not ip_address(address).is_loopback), seen[0])


class NcclSync:
    """Broadcasts weights from this process to all servers. The group is formed by the first `publish`.

    Args:
        urls: every server; all take part in every update.
        timeout_s: longest wait for one update.
        device: of the tensors that are broadcast.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout_s: float = 600.0,
        device: str = "cuda",
    ) -> None:
        self._urls = urls
        self._timeout_s = timeout_s
        self._device = device
        self._group = self._new_group()

    async def publish(self, source: Path, version: str) -> dict[str, float]:
        """Broadcast the file's weights under a new name; `load_s` is inside `transfer_s`: vLLM overlaps the two.

        An update that is not over in time, or is cancelled, is given up with its group; the next one forms another.

        Raises:
            EngineLost: a server could not be reached, NCCL failed, or the update was not over in `timeout_s`.
            SyncError: a server refused, or does not report the new version.
        """
        group, over, refusal = self._group, False, ""
        update = asyncio.wrap_future(_in_daemon(group.publish, source, version))
        ends: set[asyncio.Future[Any]] = {update}
        if not group.formed:  # whoever forms it waits for all, minutes longer than for the answer of one
            ends.add(asyncio.wrap_future(group.client.refused))
        try:
            await asyncio.wait(ends, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            over = update.done()
        finally:
            if not over:
                refusal = group.client.refusal  # before closing the connections looks like one
                update.cancel()  # its thread cannot be: see _Group.give_up
                self._replace(group)
        if not over and group.client.refused.done():
            raise group.client.refused.result()
        if not over:
            raise EngineLost(
                f"{', '.join(self._urls)}: the update to {version!r} over NCCL was not over in {self._timeout_s:g} s "
                f"({refusal or 'no server said why'}); see the servers' logs, or raise "
                "rollout.request_timeout_s"
            )
        try:
            return update.result()
        except RunError:
            raise
        except (RuntimeError, OSError) as err:  # NCCL's, or of the store in which its ranks meet
            refusal = group.client.refusal
            self._replace(group)
            cause = refusal or f"{type(err).__name__}: {err}"
            raise EngineLost(f"{', '.join(self._urls)}: the update to {version!r} failed: {cause}") from err

    def _replace(self, group: _Group) -> None:
        group.give_up()
        self._group = self._new_group()

    def close(self) -> None:
        """Leave the group."""
        self._group.close()

    def _new_group(self) -> _Group:
        return _Group(FanOutClient(self._urls, self._timeout_s), self._device)
