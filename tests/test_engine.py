"""EnginePool against a real vLLM server: tokens, seeds, log-probs, updates, death and burial."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import session_members, tiny_recipe

from m2train.config import ConfigError
from m2train.host import free_port
from m2train.records import Generation
from m2train.rollout import client as client_module
from m2train.rollout import placement
from m2train.rollout.client import EngineLost
from m2train.rollout.engine import EngineError, EnginePool
from m2train.rollout.server import ServerProcess, ServerSpec, to_flags

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(280)  # a server start takes 20 s on 2 idle cores, 100 s on busy ones
PROMPT = list(range(20, 60))


def sample(pool: EnginePool, prompt: list[int] = PROMPT, seed: int = 7, **kw: Any) -> Any:
    return pool.generate(prompt, **({"max_tokens": 24, "temperature": 1.0, "top_p": 1.0} | kw), seed=seed)


def test_tokens_in_tokens_out(pool: EnginePool, run_async: Any) -> None:
    out: Generation = run_async(sample(pool))
    assert 0 < len(out.token_ids) <= 24 and len(out.logprobs) == len(out.token_ids)
    assert out.finish_reason == ("length" if len(out.token_ids) == 24 else "stop")
    assert [(s.start, s.end) for s in out.weight_versions] == [(0, len(out.token_ids))]
    assert out.weight_versions[0].version == pool.version
    assert all(0 <= t < 300 for t in out.token_ids) and max(out.logprobs) <= 0 and out.seed == 7


def test_same_seed_same_tokens_alone_and_in_a_batch(pool: EnginePool, run_async: Any) -> None:
    alone: Generation = run_async(sample(pool))
    batch: list[Generation] = run_async(gather(*(sample(pool, seed=s) for s in (7, 8, 7, 9))))
    assert batch[0].token_ids == batch[2].token_ids == alone.token_ids
    assert batch[1].token_ids != batch[0].token_ids != batch[3].token_ids


def test_temperature_zero_is_greedy(pool: EnginePool, run_async: Any) -> None:
    a, b = run_async(gather(sample(pool, seed=1, temperature=0.0), sample(pool, seed=2, temperature=0.0)))
    assert a.token_ids == b.token_ids


def test_stop_ids_end_a_reply_and_are_part_of_it(pool: EnginePool, run_async: Any) -> None:
    free: Generation = run_async(sample(pool))
    client = pool._slots[0].ready()
    try:
        client._stop = [free.token_ids[5]]
        cut: Generation = run_async(sample(pool))
    finally:
        client._stop = []
    first = free.token_ids.index(free.token_ids[5])
    assert cut.token_ids == free.token_ids[: first + 1] and cut.finish_reason == "stop"


def test_more_prompt_tokens_than_a_step_takes(pool: EnginePool, run_async: Any) -> None:
    """A seeded prompt that is split over two steps would kill a CPU engine (chunked prefill must be off)."""
    restarts = pool.restarts_total
    prompts = [[20 + (i * k) % 270 for k in range(300)] for i in range(16)]
    outs = run_async(gather(*(sample(pool, prompt) for prompt in prompts)))
    assert len(outs) == 16 and pool.restarts_total == restarts


def test_refused_request_is_not_retried(pool: EnginePool, run_async: Any) -> None:
    before = pool.restarts_total
    with pytest.raises(EngineError, match=r"HTTP 400"):
        run_async(sample(pool, prompt=[5] * 600))
    assert pool.restarts_total == before


def test_kill_in_the_middle_of_a_batch(pool: EnginePool, run_async: Any, tiny_model: Path) -> None:
    """kill -9 of the server: every request completes, on the current weights; the old processes are gone."""
    leader = pool.pids[0]

    async def scenario() -> tuple[list[Generation], list[Generation]]:
        await pool.update_weights(tiny_model / "model.safetensors", "before-kill")
        jobs = [sample(pool, seed=s, max_tokens=120) for s in range(16)]
        whole = list(await asyncio.gather(*jobs))
        tasks = [asyncio.ensure_future(sample(pool, seed=s, max_tokens=120)) for s in range(16)]
        await asyncio.sleep(0.15)
        assert not all(task.done() for task in tasks), "the batch was over before the kill"
        os.kill(api_server(leader), signal.SIGKILL)
        return whole, list(await asyncio.gather(*tasks))

    restarts = pool.restarts_total
    whole, survived = run_async(scenario())
    assert pool.restarts_total == restarts + 1
    assert [g.token_ids for g in survived] == [g.token_ids for g in whole], "same seeds, same tokens"
    assert {s.version for g in survived for s in g.weight_versions} == {"before-kill"}
    assert session_members(leader) == []


@pytest.mark.slow
def test_killed_supervisor_takes_the_server_along(pool: EnginePool, run_async: Any) -> None:
    """The corner that the supervisor cannot clear itself."""
    leader = pool.pids[0]
    os.kill(leader, signal.SIGKILL)
    until(lambda: session_members(leader) == [])
    assert run_async(sample(pool)).weight_versions[0].version == pool.version, "and the pool goes on"


def test_url_engine_and_its_checks(pool: EnginePool, run_async: Any, tiny_model: Path, tmp_path: Path) -> None:
    async def through_url() -> Generation:
        async with EnginePool(tiny_recipe(urls=pool.urls), tiny_model, tmp_path, version=pool.version) as other:
            return await sample(other)

    assert run_async(through_url()).token_ids == run_async(sample(pool)).token_ids
    assert run_async(pool._slots[0].ready().healthy()), "a server that was given is not ended"


def test_no_server_at_url(run_async: Any, tiny_model: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineError, match="no vLLM server answers at"):
        run_async(EnginePool(tiny_recipe(urls=[url]), tiny_model, tmp_path).start())


@pytest.mark.parametrize(
    ("path", "word"),
    [("/inference/v1/generate", "--enable-scale-out"), ("/weight_info", "VLLM_SERVER_DEV_MODE=1")],
)
def test_missing_route_names_the_flag(run_async: Any, tiny_model: Path, tmp_path: Path, path: str, word: str) -> None:
    with fake_server(missing=path, max_model_len=None) as url, pytest.raises(EngineError, match=word):
        run_async(EnginePool(tiny_recipe(urls=[url]), tiny_model, tmp_path).start())


@pytest.mark.parametrize("versions", [None, [], "absent"])
def test_tokens_without_weight_versions_are_refused(
    run_async: Any, tiny_model: Path, tmp_path: Path, versions: Any
) -> None:
    with fake_server(versions=versions) as url, pytest.raises(EngineError, match="does not say which weights"):
        run_async(EnginePool(tiny_recipe(urls=[url]), tiny_model, tmp_path).start())


def test_a_server_of_too_short_requests_is_refused(run_async: Any, tiny_model: Path, tmp_path: Path) -> None:
    longest = tiny_recipe().longest_request
    with (
        fake_server(max_model_len=longest - 1) as url,
        pytest.raises(EngineError, match=rf"takes {longest - 1} tokens.*--max-model-len {longest}"),
    ):
        run_async(EnginePool(tiny_recipe(urls=[url]), tiny_model, tmp_path).start())


def test_raw_logprobs_are_refused(run_async: Any, tiny_model: Path, tmp_path: Path) -> None:
    with fake_server() as url, pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        run_async(EnginePool(tiny_recipe(urls=[url]), tiny_model, tmp_path).start())


@pytest.mark.slow
def test_server_that_dies_at_start_says_why_and_leaves_nothing(
    run_async: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """The engine core dies after the API server has started it."""
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    weights = load_file(tiny_model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"][:7].clone()
    save_file(weights, tmp_path / "model.safetensors")
    pool = EnginePool(tiny_recipe(), tmp_path, tmp_path)
    with pytest.raises(
        EngineError, match=r"ended while starting: AssertionError at \w+\.py:\d+ in \w+ .*vllm_0\.log"
    ) as caught:
        run_async(pool.start())
    assert "\n" not in str(caught.value)
    assert pool.pids == []


def test_bad_option_says_why(run_async: Any, tiny_model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe().model_copy(update={"vllm": {"no_such_flag": 3}})
    with pytest.raises(EngineError, match="error: unrecognized arguments: --no-such-flag"):
        run_async(EnginePool(recipe, tiny_model, tmp_path).start())


def test_option_that_we_set_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe().model_copy(update={"vllm": {"logprobs_mode": "raw_logprobs"}})
    with pytest.raises(ConfigError, match="logprobs_mode is set by m2train"):
        EnginePool(recipe, tiny_model, tmp_path)


def test_a_taken_port_is_another_try(
    run_async: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM binds its port before it loads the engine, so the race is lost early and cheaply."""
    ports: list[int] = []
    stop = RuntimeError("second port asked for")

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        def ask() -> int:
            if ports:
                raise stop
            ports.append(taken.getsockname()[1])
            return ports[0]

        monkeypatch.setattr("m2train.rollout.server.free_port", ask)
        with pytest.raises(RuntimeError, match="second port asked for"):
            run_async(EnginePool(tiny_recipe(), tiny_model, tmp_path).start())
    assert "address already in use" in (tmp_path / "logs" / "vllm_0.log").read_text().lower()


def test_flags() -> None:
    options = {
        "max_num_seqs": 4,
        "enforce_eager": True,
        "async_scheduling": False,
        "x": None,
        "d": {"a": 1},
        "l": [1, 2],
    }
    assert to_flags(options) == [
        *("--max-num-seqs", "4", "--enforce-eager", "--no-async-scheduling", "--d", '{"a": 1}', "--l", "1", "2")
    ]


def test_engines_take_the_last_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "on_cpu", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    assert placement.devices_of(1, 2) == [["2", "5"]]
    assert placement.devices_of(2, 2) == [["0", "1"], ["2", "5"]]
    with pytest.raises(ConfigError, match=r"rollout.servers = 3 x rollout.tensor_parallel = 2 take 6 GPUs.*shows 4"):
        placement.devices_of(3, 2)


def test_affinity_keeps_a_dialogue_on_one_engine(tiny_model: Path, tmp_path: Path) -> None:
    pool = EnginePool(tiny_recipe(servers=3), tiny_model, tmp_path)
    picks = {key: pool._pick(key).index for key in map(str, range(50))}
    assert set(picks.values()) == {0, 1, 2} and all(pool._pick(k).index == i for k, i in picks.items())
    pool._slots[0].in_flight = pool._slots[1].in_flight = 1
    assert pool._pick("").index == 2


# Processes: the supervisor is tested with a stand-in for vLLM, a parent and a child that sleep.

SLEEPERS = (
    "import subprocess, sys, time;"
    "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']); time.sleep(600)"
)


@pytest.mark.parametrize("how", ["run killed", "server killed", "asked to stop", "supervisor killed"])
def test_nothing_outlives_its_run(tmp_path: Path, how: str) -> None:
    """kill -9 of the run, or of the server, leaves no process behind."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, subprocess, sys, time\n"
        "from m2train.rollout import supervise\n"
        f"cmd = [sys.executable, '-S', '-c', {SLEEPERS!r}]\n"
        "p = subprocess.Popen([sys.executable, '-I', '-S', supervise.__file__, str(os.getpid()), '2', *cmd],"
        " start_new_session=True)\n"
        "print(p.pid, flush=True)\n"
        "p.wait()\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        leader = int(run.stdout.readline())
        try:
            until(lambda: len(session_members(leader)) == 3)
            server = next(p for p in session_members(leader) if parent_of(p) == leader)
            if how == "supervisor killed":
                os.kill(leader, signal.SIGKILL)
                until(lambda: server not in session_members(leader))
                for pid in session_members(
                    leader
                ):  # the stand-in's child does not ask to die with its parent; vLLM's does
                    os.kill(pid, signal.SIGKILL)
            else:
                target = {"run killed": run.pid, "server killed": server, "asked to stop": leader}[how]
                os.kill(target, signal.SIGTERM if how == "asked to stop" else signal.SIGKILL)
            until(lambda: session_members(leader) == [])
        finally:
            run.kill()


def gather(*jobs: Any) -> Any:
    async def together() -> list[Any]:
        return list(await asyncio.gather(*jobs))

    return together()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def api_server(leader: int) -> int:
    return next(pid for pid in session_members(leader) if parent_of(pid) == leader)


def until(condition: Any, wait_s: float = 20.0) -> None:
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


_SPANS = ({"version": "default", "start": 0, "end": 1},)


@contextlib.contextmanager
def fake_server(missing: str = "", versions: Any = _SPANS, max_model_len: int | None = 4096) -> Iterator[str]:
    """Answers like a vLLM server that lacks one thing: a route, weight versions of tokens, or processed log-probs."""
    import json
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    entry = {"token_id": 1, "logprob": -0.7, "rank": 1}
    choice = {"finish_reason": "length", "token_ids": [1], "logprobs": {"content": [entry]}}
    choice |= {"weight_versions": versions} if versions != "absent" else {}
    answers: dict[str, Any] = {
        "/health": {},
        "/v1/models": {"data": [{"id": "m", "max_model_len": max_model_len}]},
        "/resume": {},
        "/weight_info": {"weight_version": "default"},
        "/inference/v1/generate": {"choices": [choice]},
    }
    answers.pop(missing, None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.dumps(answers.get(self.path, {"error": "none"})).encode()
            refused = self.path == "/finish_weight_update"  # no update is open
            self.send_response(500 if refused else 200 if self.path in answers else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_death_while_starting_may_be_cured_by_a_restart(
    run_async: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`EngineLost`, where a server that is only slow is an `EngineError`."""
    spec = ServerSpec(model=tmp_path, log=tmp_path / "log", max_model_len=8, max_num_seqs=1, kv_bytes_per_token=1)
    for command, kind, word in (
        ("raise MemoryError('no room')", EngineLost, "ended while starting: MemoryError: no room"),
        ("import time; time.sleep(600)", EngineError, "was not ready in time"),
    ):
        line = [sys.executable, "-S", "-c", command]
        monkeypatch.setattr("m2train.rollout.server.server_command", lambda *_, line=line: line)
        wait_s = 20.0 if kind is EngineLost else 0.5
        with pytest.raises(EngineError, match=word) as caught:
            run_async(ServerProcess.start(spec, time.monotonic() + wait_s, 1.0))
        assert type(caught.value) is kind


def test_cause_is_the_innermost_error(tmp_path: Path) -> None:
    """vLLM logs a chain of tracebacks; the first error is the cause, the rest echo it."""
    log = tmp_path / "vllm.log"
    log.write_text(
        "(EngineCore pid=2) ERROR 11-22 [core.py:9] Traceback (most recent call last):\n"
        "\x1b[1;36m(EngineCore pid=2)\x1b[0;0m ERROR 11-22 [core.py:9] ValueError: No available memory\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
    )
    server = object.__new__(ServerProcess)
    server.spec = type("Spec", (), {"log": log})()
    server._log_start = 0
    assert server.cause() == f"ValueError: No available memory [{log}]"
    log.write_text(
        "WARNING 11-22 limits can cause errors like `OSError: [Errno 24] Too many open files`\n"
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, max_model_len (9) is greater than 8\n"
    )
    assert "1 validation error for ModelConfig: Value error, max_model_len (9) is greater" in server.cause()
    log.write_text("usage\nserve.py: error: unrecognized arguments: --no-such-flag\n")
    assert server.cause().startswith("serve.py: error: unrecognized arguments: --no-such-flag")
    log.write_text("last words\n\n")
    assert server.cause() == f"last words [{log}]"


@pytest.mark.parametrize("healthy", [True, False])
def test_a_time_out_of_a_server_that_is_not_well_is_a_lost_engine(
    run_async: Any, monkeypatch: pytest.MonkeyPatch, healthy: bool
) -> None:
    """A host that vanished answers nothing, not even by refusing; a busy one is the recipe's matter."""
    monkeypatch.setattr(client_module, "_SHORT_TIMEOUT_S", 0.5)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if healthy and b"/health" in await reader.readline():
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
        await reader.read()

    async def ask() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = client_module.EngineClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 0.5)
        try:
            await client.weight_version()
        finally:
            await client.close()
            server.close()

    with pytest.raises(
        EngineError, match="raise rollout.request_timeout_s" if healthy else "nor does /health"
    ) as caught:
        run_async(ask())
    assert isinstance(caught.value, client_module.EngineLost) is not healthy
