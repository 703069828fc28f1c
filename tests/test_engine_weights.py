"""Engines that die, against fakes: restarts are counted and logged, and no token of other weights is trained."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import tiny_recipe

from m2train.errors import RunError
from m2train.records import Generation, VersionSpan
from m2train.rollout import engine
from m2train.rollout.client import EngineClient, EngineError, EngineLost
from m2train.rollout.engine import EnginePool
from m2train.rollout.journal import Journal
from m2train.rollout.sampler import Sampler
from m2train.sync import FileSync


class FakeServer:
    """A started server: its weights are called "initial" until someone publishes others. Also its own process.

    With an empty version it does not name the weights of its tokens.
    """

    url = "http://127.0.0.1:1"

    def __init__(self) -> None:
        self.version, self.alive, self.pid = "initial", True, 0
        self.published = asyncio.Event()
        """What an update waits for."""

    async def generate(self, prompt_ids: Any, **_: Any) -> Generation:
        if not self.alive:
            raise EngineLost("gone")
        spans = [VersionSpan(version=self.version, start=0, end=1)] if self.version else []
        return Generation(token_ids=[1], logprobs=[0.0], finish_reason="stop", weight_versions=spans, seed=0)

    async def set_weight_version(self, version: str) -> None:
        self.version = version

    async def weight_version(self) -> str:
        return self.version

    async def call(self, *_: Any) -> None:
        pass

    async def end_abandoned_update(self) -> bool:
        return False

    async def check(self, longest_request: int) -> None:
        pass

    async def healthy(self) -> bool:
        return self.alive

    async def stop(self, *, grace: bool = True) -> None:
        self.alive = False

    async def close(self) -> None:
        pass

    def cause(self) -> str:
        return "killed"


class FakeSync:
    """Renames a server's weights once it may."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server

    async def publish(self, source: Path, version: str) -> dict[str, float]:
        await self._server.published.wait()
        self._server.version = version
        return {"total_s": 0.0}

    def close(self) -> None:
        pass


def test_no_request_reaches_a_restarted_engine_before_its_weights(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    servers: list[FakeServer] = []

    async def start(*_: Any) -> FakeServer:
        servers.append(FakeServer())
        return servers[-1]

    async def scenario() -> list[Generation]:
        pool = EnginePool(tiny_recipe(weight_transfer="file"), tiny_model, tmp_path)
        await pool.start()
        servers[0].published.set()
        await pool.update_weights(tiny_model / "model.safetensors", "step-3")
        servers[0].alive = False
        jobs = [asyncio.ensure_future(pool.generate([1], max_tokens=1, temperature=1.0, seed=0))]
        while len(servers) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # the new server is up, its update is under way
        jobs.append(asyncio.ensure_future(pool.generate([1], max_tokens=1, temperature=1.0, seed=0)))
        await asyncio.sleep(0.05)
        assert servers[1].version == "initial" and not any(job.done() for job in jobs)
        servers[1].published.set()
        return list(await asyncio.gather(*jobs))

    monkeypatch.setattr(engine.ServerProcess, "start", start)
    monkeypatch.setattr(engine, "EngineClient", lambda *_: servers[-1])
    monkeypatch.setattr(engine, "FileSync", FakeSync)
    outs = asyncio.run(scenario())
    assert [out.weight_versions[0].version for out in outs] == ["step-3", "step-3"]


@pytest.fixture
def mortal_pool(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> Iterator[EnginePool]:
    """A pool of one engine that has just died, and dies twice more: before it answers, and while it is checked."""
    servers: list[FakeServer] = []

    async def start(*_: Any) -> FakeServer:
        servers.append(FakeServer())
        if len(servers) == 2:
            raise EngineLost("the vLLM server ended while starting: out of memory")
        return servers[-1]

    async def check(server: FakeServer, longest_request: int) -> None:
        if len(servers) == 3:
            server.alive = False
            raise EngineLost("connection reset")

    monkeypatch.setattr(engine.ServerProcess, "start", start)
    monkeypatch.setattr(engine, "EngineClient", lambda *_: servers[-1])
    monkeypatch.setattr(engine, "FileSync", FakeSync)
    monkeypatch.setattr(FakeServer, "check", check)
    pool = EnginePool(tiny_recipe(weight_transfer="file"), tiny_model, tmp_path)
    asyncio.run(pool.start())
    servers[0].alive = False
    yield pool


def generate(pool: EnginePool) -> Generation:
    return asyncio.run(pool.generate([1], max_tokens=1, temperature=1.0, seed=0))


def test_an_engine_that_dies_again_while_it_starts_is_started_again(
    mortal_pool: EnginePool, caplog: pytest.LogCaptureFixture
) -> None:
    assert mortal_pool.restarts_total == 0
    assert generate(mortal_pool).token_ids == [1]
    assert mortal_pool.restarts_total == 3
    assert [record.getMessage() for record in caplog.records if record.name == engine.__name__] == [
        "engine 0 died: restart 1 of 3; cause: killed",
        "engine 0 died: restart 2 of 3; cause: the vLLM server ended while starting: out of memory",
        "engine 0 died: restart 3 of 3; cause: killed",
    ]


def test_deaths_while_starting_use_up_the_restarts(mortal_pool: EnginePool) -> None:
    rollout = mortal_pool._recipe.rollout.model_copy(update={"max_restarts": 1})
    mortal_pool._recipe = mortal_pool._recipe.model_copy(update={"rollout": rollout})
    with pytest.raises(EngineError, match=r"engine 0 died after 1 restarts .*last cause: .* out of memory"):
        generate(mortal_pool)
    assert mortal_pool.restarts_total == 1


def test_a_closing_pool_starts_nothing(mortal_pool: EnginePool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(*_: Any) -> FakeServer:
        mortal_pool._closing = True  # while the engine was starting
        raise EngineLost("ended by close()")

    monkeypatch.setattr(engine.ServerProcess, "start", start)
    with pytest.raises(EngineLost, match=r"ended by close\(\)"):
        generate(mortal_pool)
    assert mortal_pool.restarts_total == 1


@pytest.fixture
def given_server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """A server of `rollout.urls`."""
    server = FakeServer()
    server.published.set()
    monkeypatch.setattr(engine, "EngineClient", lambda *_: server)
    monkeypatch.setattr(engine, "FileSync", FakeSync)
    monkeypatch.setattr(engine, "_AWAIT_S", 0.02)
    return server


def url_pool(model: Path, run_dir: Path, **rollout: Any) -> EnginePool:
    return EnginePool(tiny_recipe(weight_transfer="file", urls=["http://127.0.0.1:1"], **rollout), model, run_dir)


def test_a_given_server_that_comes_back_gets_the_weights_before_any_request(
    given_server: FakeServer, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, pool, weights = given_server, url_pool(tiny_model, tmp_path), tmp_path / "w.safetensors"
    weights.write_bytes(b"w")

    async def scenario() -> list[Generation]:
        await pool.start()
        await pool.update_weights(weights, "step-1")
        server.alive = False
        asked = [asyncio.create_task(pool.generate([1], max_tokens=1, temperature=1.0, seed=i)) for i in range(5)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in asked)
        server.version, server.alive = "initial", True  # somebody started it again
        return await asyncio.gather(*asked)

    found = asyncio.run(scenario())
    assert [span.version for one in found for span in one.weight_versions] == ["step-1"] * 5
    assert pool.restarts_total == 0
    assert [record.getMessage() for record in caplog.records if record.name == engine.__name__] == [
        "http://127.0.0.1:1 is lost (gone): waiting up to 240 s for it",
        "http://127.0.0.1:1 is back and holds this run's weights again",
    ]


def test_before_the_first_update_a_given_server_must_come_back_with_the_same_weights(
    given_server: FakeServer, tiny_model: Path, tmp_path: Path
) -> None:
    server, pool = given_server, url_pool(tiny_model, tmp_path)

    async def scenario(version: str) -> Generation:
        server.alive = False
        asked = asyncio.create_task(pool.generate([1], max_tokens=1, temperature=1.0, seed=0))
        await asyncio.sleep(0.1)
        server.version, server.alive = version, True
        return await asked

    asyncio.run(pool.start())
    assert asyncio.run(scenario("initial")).token_ids == [1]
    with pytest.raises(EngineError, match="holds weights 'others'; rollout.urls held 'initial' so far"):
        asyncio.run(scenario("others"))


@pytest.mark.parametrize("publishes", [True, False])
def test_given_servers_may_hold_any_weights_if_they_are_to_get_the_same(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path, publishes: bool
) -> None:
    """A run that was killed while it updated its servers left them at two versions."""
    servers = {"http://127.0.0.1:1": FakeServer(), "http://127.0.0.1:2": FakeServer()}
    for number, (url, server) in enumerate(servers.items()):
        server.url, server.version = url, f"run-step-{number}"
        server.published.set()
    monkeypatch.setattr(engine, "EngineClient", lambda url, *_: servers[url])
    monkeypatch.setattr(engine, "FileSync", FakeSync)
    recipe = tiny_recipe(weight_transfer="file", urls=list(servers))
    pool = EnginePool(recipe, tiny_model, tmp_path, publishes=publishes)
    if not publishes:
        with pytest.raises(EngineError, match="start all of them from the same model"):
            asyncio.run(pool.start())
        return
    asyncio.run(pool.start())
    asyncio.run(pool.update_weights(tiny_model / "model.safetensors", "run-step-2"))
    assert [server.version for server in servers.values()] == ["run-step-2"] * 2


def test_a_given_server_that_stays_away_ends_the_run(
    given_server: FakeServer, tiny_model: Path, tmp_path: Path
) -> None:
    pool = url_pool(tiny_model, tmp_path, start_timeout_s=0.2)
    asyncio.run(pool.start())
    given_server.alive = False
    with pytest.raises(
        EngineError, match=r"did not come back within rollout.start_timeout_s = 0.2 s; last cause: gone"
    ):
        generate(pool)


def test_tokens_of_other_weights_end_the_run(tmp_path: Path) -> None:
    server = FakeServer()
    journal = Journal(tmp_path / "journal", "step-3")
    sampler = Sampler(server, tiny_recipe(), journal)
    server.version = "step-3"
    assert asyncio.run(sampler.sample("step3/a", [1], affinity="")).token_ids == [1]
    server.version = "step-9"
    with pytest.raises(RunError, match="step3/b was sampled by weights step-9; expected step-3"):
        asyncio.run(sampler.sample("step3/b", [1], affinity=""))
    assert journal.get("step3/a") is not None and journal.get("step3/b") is None


def test_tokens_of_unnamed_weights_end_the_run(tmp_path: Path) -> None:
    server = FakeServer()
    server.version = ""
    journal = Journal(tmp_path / "journal", "step-3")
    with pytest.raises(RunError, match="does not say which weights the tokens of step3/a come from; expected step-3"):
        asyncio.run(Sampler(server, tiny_recipe(), journal).sample("step3/a", [1], affinity=""))
    journal.put("step3/a", asyncio.run(server.generate([1])))  # as one of an earlier version of m2train may hold
    journal.close()
    assert Journal(tmp_path / "journal", "step-3").get("step3/a") is None, "sampled again, not trusted"


@pytest.mark.parametrize("fails", ["/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_an_engine_whose_update_failed_does_not_go_on(fails: str, tmp_path: Path) -> None:
    """Its layers may be empty: going on with running requests would end it, or give tokens of no weights."""
    called: list[str] = []

    class Server(FakeServer):
        async def call(self, method: str, path: str, **_: Any) -> None:
            called.append(path)
            if path == fails:
                raise EngineLost("gone")

    with pytest.raises(EngineLost):
        asyncio.run(FileSync(Server()).publish(tmp_path / "w", "step-1"))
    assert called[0] == "/pause" and called[-1] == fails and "/resume" not in called


def test_no_connection_in_time_is_a_lost_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        client = EngineClient("http://127.0.0.1:1", 600.0)

        async def request(*_: Any, **__: Any) -> None:
            raise httpx.ConnectTimeout("")

        monkeypatch.setattr(client._http, "request", request)
        try:
            await client.weight_version()
        finally:
            await client.close()

    with pytest.raises(EngineLost, match="no connection within 10 s"):
        asyncio.run(ask())
