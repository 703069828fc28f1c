"""Shared by the test files: a tiny model, and one vLLM server for the whole run, started when first asked for."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from m2kernels._triton import interpreting, triton_reason
from m2train.config import Recipe, parse

if interpreting() and triton_reason("cpu") is None:
    import triton_interpreter

    triton_interpreter.mend()

# Under pytest-xdist, which file goes first: one process gets it, the other all the short ones.
LONGEST = "test_train_runs.py"
_LENT = itertools.count()

T = TypeVar("T")
Runner = Callable[[Awaitable[T]], T]


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: one vLLM server a run, and a module's fixtures once."""
    for item in items:
        group = "engine" if "pool" in getattr(item, "fixturenames", ()) else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path.name != LONGEST)


def tiny_recipe(**rollout: Any) -> Recipe:
    """fp32, short contexts, one engine thread."""
    settings = {
        "max_context_tokens": 384,
        "concurrency": 16,
        "dtype": "float32",
        "threads": 1,
        "start_timeout_s": 240.0,
        "request_timeout_s": 120.0,
    }
    return parse({"rollout": settings | rollout, "algo": {"max_new_tokens": 128}, "learner": {"dtype": "float32"}})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with tied embeddings, fp32."""
    from m2train.testing.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def run_async() -> Iterator[Runner[Any]]:
    """One event loop for the session: an engine pool belongs to the loop that it was started in."""
    loop = asyncio.new_event_loop()

    def run(job: Awaitable[Any]) -> Any:
        return loop.run_until_complete(asyncio.wait_for(job, 280))

    yield run
    loop.close()


@pytest.fixture(scope="session")
def pool(tiny_model: Path, run_async: Runner[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The session's engine pool: one vLLM server with the tiny model."""
    pytest.importorskip("vllm")
    from m2train.rollout.engine import EnginePool

    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is not None:  # all processes of a run have this folder in common
        with (tmp_path_factory.getbasetemp().parent / f"engine-{run}").open("x"):
            pass  # exists: a second process of this run wants a server, so the grouping above does not work
    pool = EnginePool(tiny_recipe(), tiny_model, tmp_path_factory.mktemp("pool"))
    run_async(pool.start())
    yield pool
    run_async(pool.close())


@pytest.fixture
def engine_url(pool: Any, tiny_model: Path, run_async: Runner[Any]) -> Iterator[str]:
    """The session's server for a run by URL, which sends it weights: they are put back afterwards."""
    version = f"lent-{next(_LENT)}"
    run_async(pool.update_weights(tiny_model / "model.safetensors", version))
    yield pool.urls[0]
    run_async(pool.update_weights(tiny_model / "model.safetensors", f"{version}-back"))


def session_members(leader: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, _, sid = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == leader and state != "Z":
            found.append(int(name))
    return found
