"""The controller's view: commands over files, and every way in which ranks or the controller can die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
sys.path.insert(0, str(Path(__file__).parent))

from learner_models import make_batch, make_recipe, torchrun_environment, write_model  # noqa: E402

from m2train.learner.client import LearnerClient, LearnerError, merge_updates  # noqa: E402
from m2train.learner.protocol import Session, current_session, write_json  # noqa: E402
from m2train.learner.worker import _take_session  # noqa: E402

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "llama_tied")


def processes(mark: str) -> dict[int, str]:
    """Live processes whose command line names the run directory."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if mark in command and "learner.worker" in command and state != "Z":
            found[int(name)] = command
    return found


def wait_until_gone(mark: str, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while processes(mark):
        assert time.monotonic() < deadline, processes(mark)
        time.sleep(0.1)


def test_train_save_resume_export(model: Path, tmp_path: Path) -> None:
    """Two ranks: train, save, train on; a second learner resumed from the checkpoint does the same."""
    from safetensors.torch import load_file

    recipe = make_recipe(dp=2)
    client = LearnerClient(recipe, tmp_path, model)
    client.start()
    try:
        before = client.logprobs(make_batch())
        first = client.train(0, [make_batch(0)])
        assert all(torch.equal(a, b) for a, b in zip(before, first.logp, strict=True))
        client.save(tmp_path / "ck")
        batches = [make_batch(1, old=False), make_batch(2, old=False)]
        second = client.train(1, batches)
        assert len(second.logp) == 24 and second.metrics["learner/updates"] == 2.0
        assert second.updates[1]["policy/ratio_max"] > 1.0
        assert client.train(2, []).metrics == {"learner/skipped": 1.0}
        facts = client.export(tmp_path / "w.safetensors", "float32")
        assert facts["export_bytes"] == (tmp_path / "w.safetensors").stat().st_size
        assert "lm_head.weight" not in load_file(tmp_path / "w.safetensors")
    finally:
        client.close()
    wait_until_gone(str(tmp_path), 3.0)
    with pytest.raises(LearnerError, match="closed"):
        client.logprobs(make_batch())
    resumed = LearnerClient(recipe, tmp_path, model)
    resumed.start(tmp_path / "ck")
    try:
        again = resumed.train(1, batches)
    finally:
        resumed.close()
    assert max(float((a - b).abs().max()) for a, b in zip(again.logp, second.logp, strict=True)) < 1e-6


def test_failure_in_a_rank_is_one_line(model: Path, tmp_path: Path) -> None:
    client = LearnerClient(make_recipe(dp=2), tmp_path, model)
    client.start()
    sample = make_batch().samples[0]
    long = replace(
        sample,
        token_ids=torch.zeros(300, dtype=torch.int64),
        rollout_logp=torch.zeros(300 - sample.loss_start),
        old_logp=None,
    )
    started = time.monotonic()
    with pytest.raises(LearnerError) as caught:
        client.train(0, [replace(make_batch(old=False), samples=[long])])
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert "a sample has 300 tokens; learner.micro_batch_tokens = 256" in message and "\n" not in message
    assert "Traceback" in (tmp_path / "logs" / "learner.log").read_text()
    wait_until_gone(str(tmp_path), 3.0)


def test_failure_at_start(model: Path, tmp_path: Path) -> None:
    client = LearnerClient(make_recipe(tp=2, dp=1), tmp_path, tmp_path / "nowhere")
    with pytest.raises(LearnerError, match="cannot read .*nowhere/config.json"):
        client.start()
    wait_until_gone(str(tmp_path), 3.0)


def test_killed_rank_is_named(model: Path, tmp_path: Path) -> None:
    client = LearnerClient(make_recipe(dp=2), tmp_path, model)
    client.start()
    ranks = [pid for pid, command in processes(str(tmp_path)).items() if "torch.distributed.run" not in command]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(LearnerError, match="killed by SIGKILL"):
        client.train(0, [make_batch()])
    assert time.monotonic() - started < 15
    wait_until_gone(str(tmp_path), 3.0)


def test_silent_learner_ends_the_run(model: Path, tmp_path: Path) -> None:
    client = LearnerClient(make_recipe(timeout_s=2.0), tmp_path, model)
    client.start()
    rank = next(pid for pid, command in processes(str(tmp_path)).items() if "torch.distributed.run" not in command)
    os.kill(rank, signal.SIGSTOP)
    with pytest.raises(LearnerError, match="silent for 2 s in train"):
        client.train(0, [make_batch()])
    wait_until_gone(str(tmp_path), 3.0)


def test_killed_controller_leaves_nothing(model: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from learner_models import make_recipe; from m2train.learner.client import LearnerClient\n"
        "client = LearnerClient(make_recipe(dp=2), Path(sys.argv[2]), Path(sys.argv[3])); client.start()\n"
        "client.save(Path(sys.argv[2]) / 'ck'); print('ready', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path), str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as controller:
        assert controller.stdout is not None and controller.stdout.readline() == "ready\n"
        assert len(processes(str(tmp_path))) == 3
        controller.kill()
        wait_until_gone(str(tmp_path), 5.0)


def test_external_ranks(model: Path, tmp_path: Path) -> None:
    """Ranks that something else starts join through the run directory, whoever comes first."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--nnodes=1", "--rdzv-backend=c10d"),
        *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "m2train.learner.worker", str(tmp_path)),
    ]
    log = (tmp_path / "ranks.log").open("wb")
    cluster = subprocess.Popen(command, env=torchrun_environment(), stdout=log, stderr=log, start_new_session=True)
    try:
        client = LearnerClient(make_recipe(launch="external"), tmp_path, model)
        client.start()
        assert len(client.train(0, [make_batch()]).logp) == 12
        client.close()
        assert cluster.wait(15) == 0
    finally:
        if cluster.poll() is None:
            os.killpg(cluster.pid, signal.SIGKILL)
            cluster.wait()


def test_ranks_do_not_take_the_session_of_a_killed_controller(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that came back first wait for the next session, however slowly the old one is removed."""
    old = Session(tmp_path, "old")
    write_json(old.served, {})
    write_json(current_session(tmp_path), {"name": "old", "local": False})
    remove = shutil.rmtree

    def slowly(folder: Path) -> None:
        old.served.unlink()
        time.sleep(0.7)  # ranks look every 0.2 s
        remove(folder)
        time.sleep(0.7)

    monkeypatch.setattr("m2train.learner.client.shutil.rmtree", slowly)
    taken: list[tuple[str, bool]] = []
    rank = threading.Thread(target=lambda: taken.append(_take_session(tmp_path, None)), daemon=True)
    rank.start()
    client = LearnerClient(make_recipe(launch="external"), tmp_path, model)
    controller = threading.Thread(target=lambda: pytest.raises(LearnerError, client.start))
    controller.start()
    try:
        rank.join(20.0)
        named = json.loads(current_session(tmp_path).read_text())["name"]
        assert taken == [(named, False)] and named != "old"
    finally:
        client.close()
        controller.join(20.0)
    assert not controller.is_alive()


def test_client_outlives_the_thread_that_started_it(model: Path, tmp_path: Path) -> None:
    """The kernel ties the children's lives to a thread; it must not be the caller's."""
    client = LearnerClient(make_recipe(), tmp_path, model)
    found: list[Any] = []
    starter = threading.Thread(target=lambda: found.append(client.start()))
    starter.start()
    starter.join()
    try:
        assert found and len(client.logprobs(make_batch())) == 12
    finally:
        client.close()


@pytest.mark.parametrize("launch", ["local", "external"])
def test_closed_while_it_starts(model: Path, tmp_path: Path, launch: str) -> None:
    """The engines did not come up, or Ctrl-C: the thread that waits for the ranks must not outlast the run."""
    client = LearnerClient(make_recipe(launch=launch), tmp_path, model)
    errors: list[LearnerError] = []

    def start() -> None:
        try:
            client.start()
        except LearnerError as err:
            errors.append(err)

    if launch == "local":
        client.close()  # before the start came to it
    starter = threading.Thread(target=start)
    starter.start()
    while not errors and not (tmp_path / "learner" / "session.json").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    client.close()
    starter.join(3.0)
    assert not starter.is_alive() and "closed" in str(errors[0])
    assert not processes(str(tmp_path)) and not (tmp_path / "logs").exists(), "and no rank was started"


def test_merging_updates() -> None:
    updates = [
        {"policy/loss": 1.0, "mismatch/max_abs": 0.5, "tis/min": 0.4, "learner/tokens": 10.0},
        {"policy/loss": 3.0, "mismatch/max_abs": 0.2, "tis/min": 0.6, "learner/tokens": 5.0},
    ]
    merged = merge_updates(updates)
    assert merged == {"policy/loss": 2.0, "mismatch/max_abs": 0.5, "tis/min": 0.4, "learner/tokens": 15.0}
