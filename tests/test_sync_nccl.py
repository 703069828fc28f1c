"""The NCCL path without a GPU: vLLM's interfaces by signature, the conversation with servers by fakes."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest

from m2train.config import ConfigError, parse
from m2train.host import free_port
from m2train.rollout import engine, placement
from m2train.rollout.client import EngineError, EngineLost
from m2train.rollout.engine import EnginePool
from m2train.sync import nccl, weight_transfer_flags
from m2train.sync.base import SyncError
from m2train.sync.nccl import FanOutClient, NcclSync, SafetensorsSource

pytest.importorskip("vllm")


class FakeServers(FanOutClient):
    """Records the conversation; server 0 has 2 workers, server 1 has 1."""

    def __init__(self, *, cached: bool = False) -> None:
        self.urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
        self.version = self.refusal = ""
        self.refused: Future[Any] = Future()
        self.log: list[tuple[str, list[Any]]] = []
        self._cached = cached

    def _each(self, method: str, path: str, bodies: Any = None) -> list[dict[str, Any]]:
        name = path.split("?")[0].strip("/")
        self.log.append((name, list(bodies or [])))
        if name == "get_world_size":
            return [{"world_size": 2}, {"world_size": 1}]
        if name == "weight_info":
            return [{"weight_version": self.version}] * 2
        return [{"success": not self._cached}] * 2

    def close(self) -> None:
        pass


def sync_with(servers: FanOutClient) -> NcclSync:
    sync = NcclSync(["http://127.0.0.1:1"], timeout_s=20.0, device="cpu")
    sync._group.client.close()
    sync._group.client = servers
    return sync


def test_installed_vllm_has_the_interface_that_we_call() -> None:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.base import ParamMeta, VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    assert issubclass(FanOutClient, VLLMWeightSyncClient)
    for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        theirs, ours = (
            list(inspect.signature(getattr(c, name)).parameters) for c in (VLLMWeightSyncClient, FanOutClient)
        )
        assert ours == theirs, name
    inspect.signature(WeightTransferTrainerFactory.trainer_init).bind(object(), client=object(), source=object())
    assert {"master_address", "master_port", "world_size", "rank"} <= {f.name for f in fields(NCCLTrainerInitInfo)}
    assert "rank_offset" in {f.name for f in fields(NCCLWeightTransferInitInfo)}
    assert [f.name for f in fields(ParamMeta)] == ["name", "dtype", "shape"]
    assert list(inspect.signature(NCCLTrainerWeightTransferEngine.send_weights).parameters) == ["self"]


def test_servers_expose_the_routes_that_we_call() -> None:
    from vllm.entrypoints.rl.online.api_router import router as rl
    from vllm.entrypoints.serve.dev.cache.api_router import router as cache

    paths = {route.path for router in (rl, cache) for route in router.routes}
    wanted = "pause resume init_weight_transfer_engine start_weight_update update_weights finish_weight_update "
    wanted += "weight_info get_world_size update_weight_version reset_prefix_cache"
    assert {f"/{name}" for name in wanted.split()} <= paths


def test_vllms_trainer_drives_our_client(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real trainer-side class over a fake communicator: what the servers hear, and in which order."""
    from vllm.distributed.weight_transfer import nccl_engine

    sent: list[str] = []
    opened: list[Any] = []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: opened.append(info) or object())
    monkeypatch.setattr(
        nccl_engine,
        "packed_nccl_broadcast_producer",
        lambda iterator, **_: sent.extend(name for name, _ in iterator),
    )
    servers = FakeServers()
    sync = sync_with(servers)
    times = asyncio.run(sync.publish(tiny_model / "model.safetensors", "step-1"))
    assert set(times) == {"transfer_s", "load_s", "total_s"}
    assert opened[0].world_size == 4 and opened[0].master_address
    said = dict(servers.log)
    assert [body["init_info"]["rank_offset"] for body in said["init_weight_transfer_engine"]] == [1, 3]
    assert [name for name, _ in servers.log if name != "get_world_size"] == [
        "init_weight_transfer_engine",
        *("pause", "start_weight_update", "update_weights", "finish_weight_update"),
        *("reset_prefix_cache", "resume", "weight_info"),
    ]
    update = said["update_weights"][0]["update_info"]
    assert update["names"] == sent and set(update["dtype_names"]) == {"float32"}
    assert said["finish_weight_update"] == [{"weight_version": "step-1"}] * 2
    asyncio.run(sync.publish(tiny_model / "model.safetensors", "step-2"))
    assert len(opened) == 1, "the group is formed once"


class FakeTrainer:
    """In the place of vLLM's trainer-side engine."""

    def __init__(self, client: FanOutClient) -> None:
        self.client, self.left = client, False

    def send_weights(self) -> None:
        pass

    def shutdown(self) -> None:
        self.left = True


def test_a_group_that_could_not_be_formed_is_formed_by_the_next_update(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeTrainer] = []

    def connect(group: Any, source: SafetensorsSource) -> FakeTrainer:
        made.append(FakeTrainer(group.client))
        if len(made) == 1:
            raise EngineLost("no rendezvous")
        return made[-1]

    monkeypatch.setattr(nccl._Group, "_connect", connect)
    sync = sync_with(FakeServers())
    with pytest.raises(EngineLost, match="no rendezvous"):
        asyncio.run(sync.publish(Path("w"), "v1"))
    asyncio.run(sync.publish(Path("w"), "v2"))
    asyncio.run(sync.publish(Path("w"), "v3"))
    assert len(made) == 2


def test_an_update_that_hangs_is_given_up_with_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server refuses the broadcast, and NCCL waits for it for ever; the next update has a group of its own."""
    hang, returned, made = threading.Event(), threading.Event(), []

    class Hanging(FakeTrainer):
        def send_weights(self) -> None:
            if len(made) > 1:
                return
            self.client.refusal = "HTTP 400: no"
            hang.wait(60)

        def shutdown(self) -> None:
            super().shutdown()
            returned.set()

    def connect(group: Any, source: SafetensorsSource) -> Hanging:
        made.append(Hanging(group.client))
        return made[-1]

    monkeypatch.setattr(nccl._Group, "_connect", connect)
    monkeypatch.setattr(nccl, "FanOutClient", lambda *_: FakeServers())
    sync = NcclSync(["http://a:1"], timeout_s=0.2)
    with pytest.raises(
        EngineLost,
        match=r"^http://a:1: the update to 'v1' over NCCL was not over in 0.2 s \(HTTP 400: no\).*timeout_s$",
    ):
        asyncio.run(asyncio.wait_for(sync.publish(Path("w"), "v1"), 20))
    first = sync._group
    asyncio.run(sync.publish(Path("w"), "v2"))
    assert len(made) == 2 and made[1].client is first.client is not made[0].client
    assert not made[0].left, "its thread is inside"
    hang.set()
    assert returned.wait(20) and made[0].left and not made[1].left, "the thread that comes back leaves its own group"
    assert [name for name, _ in made[1].client.log] == ["weight_info"], "and says nothing to the servers of the next"


@pytest.mark.parametrize(("answer", "kind"), [(500, EngineLost), (400, SyncError)])
def test_a_server_that_does_not_join_ends_the_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, answer: int, kind: type[Exception]
) -> None:
    """vLLM's trainer waits five minutes for all ranks to meet, and then tells of a bad file descriptor."""
    free = threading.Event()

    def each(client: FanOutClient, method: str, path: str, bodies: Any = None) -> list[dict[str, Any]]:
        if path == "/get_world_size":
            return [{"world_size": 1}]
        raise (EngineLost if answer == 500 else SyncError)(f"http://a:1{path}: HTTP {answer}: Invalid init_info")

    def connect(group: Any, source: SafetensorsSource) -> None:
        threading.Thread(
            target=lambda: pytest.raises(kind, group.client.init_weight_transfer_engine, {"rank_offset": 1})
        ).start()
        free.wait(60)
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(nccl.FanOutClient, "_each", each)
    monkeypatch.setattr(nccl._Group, "_connect", connect)
    sync = NcclSync(["http://a:1"], timeout_s=60)
    first = sync._group
    with pytest.raises(kind, match=rf"HTTP {answer}: Invalid init_info; was it started with .*nccl") as caught:
        asyncio.run(asyncio.wait_for(sync.publish(Path("w"), "v1"), 20))
    assert type(caught.value) is kind and sync._group is not first
    free.set()


@pytest.mark.parametrize(
    "err", [OSError(9, "Bad file descriptor"), RuntimeError("NCCL error: remote process exited")]
)
def test_what_nccl_raises_is_a_lost_engine(monkeypatch: pytest.MonkeyPatch, err: Exception) -> None:
    class Breaking(FakeTrainer):
        def send_weights(self) -> None:
            raise err

    monkeypatch.setattr(nccl._Group, "_connect", lambda group, source: Breaking(group.client))
    monkeypatch.setattr(nccl, "FanOutClient", lambda *_: FakeServers())
    sync = NcclSync(["http://a:1"], timeout_s=20)
    first = sync._group
    with pytest.raises(EngineLost, match=r"^http://a:1: the update to 'v1' failed: .*(descriptor|NCCL error)"):
        asyncio.run(sync.publish(Path("w"), "v1"))
    assert sync._group is not first


@pytest.mark.parametrize(
    ("hosts", "wanted"),
    [
        (["localhost", "node2"], "10.0.0.1"),
        (["127.0.1.1", "node2", "node3"], "10.0.0.1"),
        (["localhost", "127.0.1.1"], "127.0.0.1"),
        (["node2"], "10.0.0.1"),
    ],
)
def test_the_group_meets_where_all_servers_can_come(
    monkeypatch: pytest.MonkeyPatch, hosts: list[str], wanted: str
) -> None:
    monkeypatch.setattr(
        nccl, "address_towards", lambda host, port: "10.0.0.1" if host.startswith("node") else "127.0.0.1"
    )
    assert nccl.meeting_address([f"http://{host}:8000" for host in hosts]) == wanted


HANGING = """
import asyncio, socket, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from m2train.rollout.client import EngineLost
from m2train.sync import nccl

silent = socket.create_server(("127.0.0.1", 0))  # takes connections, answers nothing
url = f"http://127.0.0.1:{silent.getsockname()[1]}"

class Trainer:  # as vLLM's: the call to the servers in an executor's thread, the broadcast in the caller's
    def send_weights(self):
        ThreadPoolExecutor(1).submit(client.update_weights, {})
        time.sleep(600)

nccl._Group._connect = lambda *_: Trainer()
sync = nccl.NcclSync([url], timeout_s=600)
client = sync._group.client
sync._timeout_s = 1.0  # the servers' answers are waited for longer
try:
    asyncio.run(sync.publish(Path("w"), "v"))
except EngineLost:
    print("given up", flush=True)
"""


def test_the_end_of_the_process_does_not_wait_for_a_hanging_update() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "given up\n" and done.stderr == ""


def test_stuck_prefix_cache_is_an_error() -> None:
    with pytest.raises(SyncError, match="prefix-cache blocks of the old weights"):
        FakeServers(cached=True).finish_weight_update("v")


def test_source_declares_what_it_yields(tiny_model: Path) -> None:
    source = SafetensorsSource(tiny_model / "model.safetensors", "cpu")
    declared = [(m.name, m.dtype, m.shape) for m in source.metadata()]
    assert declared == [(name, t.dtype, tuple(t.shape)) for name, t in source] and len(declared) > 10


class Recorder:
    """In NcclSync's place: who was served, and how it fails."""

    made: list[Recorder] = []
    failures = 0

    def __init__(self, urls: list[str], *, timeout_s: float) -> None:
        self.urls, self.published, self.closed = urls, [], False
        Recorder.made.append(self)

    async def publish(self, source: Path, version: str) -> dict[str, float]:
        if Recorder.failures:
            Recorder.failures -= 1
            raise EngineLost("gone")
        self.published.append(version)
        return {"transfer_s": 1.0, "load_s": 0.0, "total_s": 1.0}

    def close(self) -> None:
        self.closed = True


class Healthy:
    """In EngineClient's place: a server that holds the weights that the pool thinks it holds."""

    ended: list[str] = []
    """Servers whose update was ended."""
    hangs = False

    def __init__(self, slot: Any) -> None:
        self._slot, self.url = slot, slot.url

    async def healthy(self) -> bool:
        return True

    async def weight_version(self) -> str:
        return str(self._slot.held)

    async def end_abandoned_update(self) -> bool:
        if self.hangs:
            await asyncio.sleep(60.0)
        Healthy.ended.append(self.url)
        return True


@pytest.fixture
def nccl_pool(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> EnginePool:
    """Two engines by URL on what looks like a GPU machine."""
    monkeypatch.setattr(placement, "on_cpu", lambda: False)
    monkeypatch.setattr("m2train.sync.nccl.NcclSync", Recorder)
    monkeypatch.setattr(engine, "_BACKOFF_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(Recorder, "failures", 0)
    monkeypatch.setattr(Healthy, "ended", [])
    urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    pool = EnginePool(parse({"rollout": {"urls": urls}}), tiny_model, tmp_path)
    for slot in pool._slots:
        slot.client = cast(engine.EngineClient, Healthy(slot))
        slot.sync = pool._make_sync(slot.client)
    return pool


def test_the_pool_updates_all_engines_by_one_broadcast(nccl_pool: EnginePool, tiny_model: Path) -> None:
    times = asyncio.run(nccl_pool.update_weights(tiny_model / "model.safetensors", "v1"))
    asyncio.run(nccl_pool.update_weights(tiny_model / "model.safetensors", "v2"))
    assert times["total_s"] == 1.0 and nccl_pool.version == "v2"
    assert [(one.urls, one.published) for one in Recorder.made if one.published] == [
        (["http://127.0.0.1:1", "http://127.0.0.1:2"], ["v1", "v2"])
    ]


def test_a_lost_engine_means_a_new_group(nccl_pool: EnginePool, tiny_model: Path) -> None:
    Recorder.failures = 1
    asyncio.run(nccl_pool.update_weights(tiny_model / "model.safetensors", "v1"))
    groups = [one for one in Recorder.made if len(one.urls) == 2]
    assert [(one.published, one.closed) for one in groups] == [([], True), (["v1"], False)]
    assert sorted(Healthy.ended) == nccl_pool.urls, "those that lived had the update open"
    Recorder.failures = 9
    with pytest.raises(EngineError, match="kept failing weight updates over NCCL"):
        asyncio.run(nccl_pool.update_weights(tiny_model / "model.safetensors", "v2"))


def test_a_given_server_that_hangs_in_a_broadcast_is_named(
    nccl_pool: EnginePool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_END_UPDATE_S", 0.1)
    nccl_pool._slots[1].ready().hangs = True  # type: ignore[attr-defined]
    Recorder.failures = 1
    with pytest.raises(EngineError, match=r"127.0.0.1:2 hangs in a weight update \(gone\); restart it"):
        asyncio.run(nccl_pool.update_weights(tiny_model / "model.safetensors", "v1"))


def test_an_engine_that_hangs_in_a_broadcast_is_started_again(
    nccl_pool: EnginePool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits in NCCL for one that died, and would for ever; its process is there and its /health answers."""
    restarted: list[int] = []

    async def restart(slot: Any, err: EngineLost) -> None:
        restarted.append(slot.index)
        slot.life += 1

    async def fine(slot: Any) -> bool:
        return True

    monkeypatch.setattr(engine, "_END_UPDATE_S", 0.1)
    monkeypatch.setattr(nccl_pool, "_restart", restart)
    monkeypatch.setattr(nccl_pool, "_transient", fine)
    for slot in nccl_pool._slots:
        slot.spec = cast(Any, "ours")
    nccl_pool._slots[1].ready().hangs = True  # type: ignore[attr-defined]
    Recorder.failures = 1
    asyncio.run(nccl_pool.update_weights(tiny_model / "model.safetensors", "v1"))
    assert restarted == [1] and Healthy.ended == ["http://127.0.0.1:1"]


def test_nccl_needs_a_gpu_and_its_own_flag(tiny_model: Path, tmp_path: Path) -> None:
    if placement.on_cpu():
        with pytest.raises(ConfigError, match="needs a GPU in this machine"):
            EnginePool(parse({"rollout": {"weight_transfer": "nccl"}}), tiny_model, tmp_path)
    assert '{"backend": "nccl"}' in weight_transfer_flags("nccl")
    assert '{"backend": "m2train_file"}' in weight_transfer_flags()


def test_an_unreachable_server_is_a_lost_engine() -> None:
    client = FanOutClient([f"http://127.0.0.1:{free_port()}"], timeout_s=2.0)
    with pytest.raises(EngineLost, match="get_world_size"):
        client.world_sizes()
    client.close()
