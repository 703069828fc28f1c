"""Whole runs as a user starts them: killed at any moment, resumed, taken apart.

Runs on saved rollouts need no engine, so they are exact: a resumed run must repeat an unbroken one to 1e-6. Runs with
live rollouts share the session's vLLM server by URL.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from runs import TaggedRun, rows, without_times, write_rollouts

from m2train.rollout.sampler import derive_seed
from m2train.rundir import load_rollouts
from m2train.verifier import CaseSampler, load_cases, split_cases

STEPS = 6
MOST_RENAMES = 50  # more than a run of RECIPE makes
RECIPE = """
steps = 6
[model]
path = "{model}"
[algo]
group_size = 4
max_new_tokens = 24
[rollout]
system_prompt = "You are a doctor."
cases_per_step = 2
max_turns = 2
max_context_tokens = 400
dtype = "float32"
threads = 1
[learner]
dtype = "{dtype}"
lr = 1e-3
micro_batch_tokens = 1024
threads = 1
[eval]
cases = 0
[checkpoint]
every = 2
"""


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(model=tiny_model, dtype="float32"))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rollouts(tmp_path_factory.mktemp("saved"), steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(
    tiny_model: Path, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], float]:
    """Rows of a run on the saved rollouts that nothing disturbed, and the seconds that it took."""
    root = tmp_path_factory.mktemp("unbroken")
    path = root / "tiny.toml"
    path.write_text(RECIPE.format(model=tiny_model, dtype="float32"))
    began = time.monotonic()
    run = TaggedRun("train", path, "--train-from", saved, "--run-dir", root / "run")
    code, out = run.wait()
    took = time.monotonic() - began
    assert code == 0, out
    assert run.survivors() == []
    found = rows(root / "run")
    assert [row["step"] for row in found] == list(range(STEPS))
    assert all(abs(row["policy/loss"]) > 1e-3 for row in found), "the loss must be far from 0 to prove anything"
    return found, took


@pytest.fixture(scope="module")
def unbroken(undisturbed: tuple[list[dict[str, Any]], float]) -> list[dict[str, Any]]:
    """The rows of the undisturbed run."""
    return undisturbed[0]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        a, b = without_times(one), without_times(other)
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == pytest.approx(b[key], rel=1e-6, abs=1e-6), (one["step"], key)


def resume(recipe: Path, run_dir: Path, *args: str | Path) -> None:
    again = TaggedRun("train", recipe, *args, "--run-dir", run_dir, "--resume")
    code, out = again.wait()
    assert code == 0, out
    assert again.survivors() == []


@pytest.mark.timeout(400)
def test_a_run_killed_in_step_3_ends_like_an_unbroken_one(
    recipe: Path, saved: Path, unbroken: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = TaggedRun("train", recipe, "--train-from", saved, "--run-dir", tmp_path / "run")
    assert run.kill_when(lambda: len(rows(tmp_path / "run")) >= 3)
    assert run.survivors() == [], "the learner outlived its killed controller"
    resume(recipe, tmp_path / "run", "--train-from", saved)
    assert_same(rows(tmp_path / "run"), unbroken)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.timeout(200)
def test_a_scheduler_s_sigterm_ends_the_run_cleanly(recipe: Path, saved: Path, tmp_path: Path) -> None:
    run = TaggedRun("train", recipe, "--train-from", saved, "--run-dir", tmp_path / "run")
    deadline = time.monotonic() + 120
    while not rows(tmp_path / "run"):
        assert run.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.process.send_signal(signal.SIGTERM)
    code, out = run.wait()
    assert code != 0, out
    assert "Traceback" not in out
    assert run.survivors() == []
    assert json.loads((tmp_path / "run" / "status.json").read_text())["cause"] == "interrupted"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("moment", range(20))
def test_a_kill_at_a_random_moment(
    moment: int, recipe: Path, saved: Path, undisturbed: tuple[list[dict[str, Any]], float], tmp_path: Path
) -> None:
    """One kill at a random time of a run's life, then a resume."""
    expected, lifetime = undisturbed
    delay = random.Random(moment).uniform(0.05, 0.95) * lifetime
    killed = False
    for attempt in range(3):  # under changing load a run may end before its moment comes
        run_dir = tmp_path / f"run-{attempt}"
        run = TaggedRun("train", recipe, "--train-from", saved, "--run-dir", run_dir)
        end = time.monotonic() + delay / 2**attempt
        killed = run.kill_when(lambda end=end: time.monotonic() > end)
        assert run.survivors() == []
        if killed:
            break
    assert killed, f"three runs ended within {delay:.1f} s"
    resume(recipe, run_dir, "--train-from", saved)
    assert_same(rows(run_dir), expected)


# Every process of the run counts renames below the run directory in one file; the one that makes the n-th kills the
# controller right after it (or right before it, for odd n).
HOOK = """
import os, signal
_rename, _replace = os.rename, os.replace
def _hooked(real):
    def call(src, dst, *args, **kwargs):
        root = os.environ.get("RENAME_ROOT")
        if not root or not str(dst).startswith(root):
            return real(src, dst, *args, **kwargs)
        with open(os.environ["RENAME_COUNT"], "ab") as count:
            count.write(b"x")
            count.flush()
            n = count.tell()
        if n == int(os.environ["RENAME_KILL"]):
            if n % 2:
                os.kill(int(open(os.environ["RENAME_PID"]).read()), signal.SIGKILL)
            result = real(src, dst, *args, **kwargs)
            os.kill(int(open(os.environ["RENAME_PID"]).read()), signal.SIGKILL)
            return result
        return real(src, dst, *args, **kwargs)
    return call
os.rename, os.replace = _hooked(_rename), _hooked(_replace)
if os.environ.get("RENAME_ROOT") and not os.path.exists(os.environ["RENAME_PID"]):
    open(os.environ["RENAME_PID"], "w").write(str(os.getpid()))
"""


def rename_environment(tmp_path: Path, kill_at: int) -> dict[str, str]:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    return {
        "PYTHONPATH": f"{hook}:{os.environ.get('PYTHONPATH', '')}",
        "RENAME_ROOT": str(tmp_path / "run"),
        "RENAME_COUNT": str(tmp_path / "renames"),
        "RENAME_PID": str(tmp_path / "controller.pid"),
        "RENAME_KILL": str(kill_at),
    }


def killed_at_rename(number: int, recipe: Path, saved: Path, unbroken: list[dict[str, Any]], tmp_path: Path) -> bool:
    env = rename_environment(tmp_path, number)
    run = TaggedRun("train", recipe, "--train-from", saved, "--run-dir", tmp_path / "run", env=env)
    code, _ = run.wait()
    if code == 0:
        return False  # the run has fewer renames than that
    assert code == -9
    assert run.survivors() == []
    resume(recipe, tmp_path / "run", "--train-from", saved)
    assert_same(rows(tmp_path / "run"), unbroken)
    return True


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [14])
def test_a_kill_at_a_rename(
    number: int, recipe: Path, saved: Path, unbroken: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert killed_at_rename(number, recipe, saved, unbroken, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", range(1, MOST_RENAMES + 1))
def test_a_kill_at_every_rename(
    number: int, recipe: Path, saved: Path, unbroken: list[dict[str, Any]], tmp_path: Path
) -> None:
    killed = killed_at_rename(number, recipe, saved, unbroken, tmp_path)
    assert not killed or number < MOST_RENAMES, "there may be more renames: raise MOST_RENAMES"
    if not killed:
        pytest.skip(f"a run makes fewer than {number} renames")


# ------------------------------------------------------------------------------------------------- live rollouts


@pytest.mark.timeout(400)
def test_a_live_run_killed_in_step_3_trains_each_case_once(engine_url: str, recipe: Path, tmp_path: Path) -> None:
    """Sampling and training with one engine: the same cases and seeds as without the kill, by the right weights."""
    run_dir = tmp_path / "run"
    live = ["--set", f"rollout.urls=['{engine_url}']", "--set", "mismatch_limit=1e-4"]
    run = TaggedRun("train", recipe, "--run-dir", run_dir, *live)
    journal = run_dir / "rollouts" / "step_000003.journal.jsonl"
    assert run.kill_when(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3)
    assert run.survivors() == []
    kept = [json.loads(line) for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
    resume(recipe, run_dir, *live)

    found = rows(run_dir)
    assert [row["step"] for row in found] == list(range(STEPS))
    assert all(row["mismatch/max_abs"] <= 1e-4 for row in found), "the learner and the engine have the same weights"
    order = CaseSampler(split_cases(load_cases()).train, seed=0)
    identity = json.loads((run_dir / "run.json").read_text())["id"]
    for step in range(STEPS):
        rollouts = load_rollouts(run_dir / "rollouts" / f"step_{step:06d}.json")
        assert [d.case_id for d in rollouts.dialogues] == [case.id for case in order.draw(step, 2)]
        replies = [(f"{g.uid}/reply{i}", r.generation) for g in rollouts.groups for i, r in enumerate(g.replies)]
        assert [x.seed for _, x in replies] == [derive_seed(0, key) for key, _ in replies]
        versions = {span.version for _, x in replies for span in x.weight_versions}
        assert versions == {f"{identity}-step-{step}"}, "every token names the weights it came from"
    reread = (run_dir / "rollouts" / "step_000003.json").read_text()
    for entry in kept:
        assert json.dumps(entry["generation"]["token_ids"], separators=(",", ":")) in reread, "made twice"
    assert (run_dir / "report.html").exists()


@pytest.mark.timeout(400)
def test_bf16_reports_its_mismatch_and_weights(engine_url: str, tiny_model: Path, tmp_path: Path) -> None:
    """And evaluates before the first step and after the last one; what it evaluated is not done again."""
    path, run_dir = tmp_path / "bf16.toml", tmp_path / "run"
    path.write_text(RECIPE.format(model=tiny_model, dtype="bfloat16"))
    live = ["--set", f"rollout.urls=['{engine_url}']", "--set", "steps=2", "--set", "eval.cases=3"]
    code, out = TaggedRun("train", path, "--run-dir", run_dir, *live).wait()
    assert code == 0, out
    found = rows(run_dir)
    scores = {row["step"]: row["heldout/reward"] for row in found if "heldout/reward" in row}
    assert scores.keys() == {0, 2} and all(0 <= score <= 1 for score in scores.values())
    kept = {path: path.read_bytes() for path in (run_dir / "eval").iterdir()}
    assert sorted(path.name for path in kept) == ["step_000000.json", "step_000002.json"]
    resume(path, run_dir, *live)
    assert {path: path.read_bytes() for path in kept} == kept
    for row in found[:2]:
        assert 1e-6 < row["mismatch/max_abs"] < 1.0
        assert row["tis/min"] < 1.0 < row["tis/max"] <= 2.0
        assert 0.9 < row["tis/mean"] < 1.1


@pytest.mark.timeout(400)
def test_a_run_stops_trusting_rollouts_and_says_why(engine_url: str, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bf16.toml"
    path.write_text(RECIPE.format(model=tiny_model, dtype="bfloat16"))
    live = ["--set", f"rollout.urls=['{engine_url}']", "--set", "mismatch_limit=1e-7"]
    run = TaggedRun("train", path, "--run-dir", tmp_path / "run", *live)
    code, out = run.wait()
    assert code == 1
    assert "mismatch_limit" in out.splitlines()[-1]
    assert run.survivors() == []
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "mismatch_limit" in status["cause"]


@pytest.mark.timeout(500)
def test_rollouts_apart_from_training_and_a_kill_between(
    pool: Any, engine_url: str, recipe: Path, tmp_path: Path
) -> None:
    live = ["--set", f"rollout.urls=['{engine_url}']", "--set", "steps=2"]
    live += ["--set", "rollout.concurrency=1"]  # replies come one by one: there is time to kill between them
    first, second = tmp_path / "a", tmp_path / "b"
    code, out = TaggedRun("train", recipe, "--run-dir", first, "--rollouts-only", *live).wait()
    assert code == 0, out
    run = TaggedRun("train", recipe, "--run-dir", second, "--rollouts-only", *live)
    journal = second / "rollouts" / "step_000001.journal.jsonl"
    assert run.kill_when(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3)
    kept = [json.loads(line) for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
    resume(recipe, second, "--rollouts-only", *live)
    assert load_rollouts(first / "rollouts" / "step_000000.json").weight_version == pool.version
    for step in range(2):
        one, other = (load_rollouts(root / "rollouts" / f"step_00000{step}.json") for root in (first, second))
        assert [d.uid for d in one.dialogues] == [d.uid for d in other.dialogues]
        assert [g.uid for g in one.groups] == [g.uid for g in other.groups]
        seeds = [[r.generation.seed for r in g.replies] for g in one.groups]
        assert seeds == [[r.generation.seed for r in g.replies] for g in other.groups]
    reread = load_rollouts(second / "rollouts" / "step_000001.json").model_dump_json()
    for entry in kept:
        assert json.dumps(entry["generation"]["token_ids"], separators=(",", ":")) in reread, "made twice"
    assert not journal.exists()
    code, out = TaggedRun("train", recipe, "--run-dir", tmp_path / "c", "--train-from", first, *live[2:]).wait()
    assert code == 0, out
    assert rows(tmp_path / "c")[0]["mismatch/max_abs"] <= 1e-4


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--set", "learner.tpx=2"], 2, "did you mean learner.tp?"),
        (["--set", "learner.tp=3"], 2, "learner.tp = 3 does not divide the 4 heads and 2 KV heads"),
        (["--set", "model.path=/nowhere"], 2, "/nowhere"),
        (["--set", "eval.cases=33"], 2, "there are 32 held-out cases"),
        (["--rollouts-only", "--train-from", "x"], 2, "exclude each other"),
        (["--train-from", "/nowhere"], 2, "rollouts of 0 consecutive steps"),
    ],
)
def test_mistakes_end_in_one_line(args: list[str], code: int, words: str, recipe: Path, tmp_path: Path) -> None:
    found, out = TaggedRun("train", recipe, "--run-dir", tmp_path / "run", *args).wait()
    assert found == code
    assert words in out.splitlines()[-1]
    assert "Traceback" not in out


@pytest.mark.parametrize("size", ["100k", pytest.param("1m", marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_with_its_cause(recipe: Path, saved: Path, tmp_path: Path, size: str) -> None:
    """A disk that fills up in Megatron's writer, in its first bytes and later."""
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(parents=True)
    script = f'mount -t tmpfs -o size={size} none "{checkpoints}" && exec "$@"'
    under = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*under, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no small disk to be had: this machine lets no process make a mount namespace (unshare --mount)")
    run = TaggedRun("train", recipe, "--train-from", saved, "--run-dir", run_dir, under=under)
    code, out = run.wait()
    assert code == 1, out
    assert "No space left on device: writing a checkpoint" in out.splitlines()[-1]
    assert str(checkpoints) in out.splitlines()[-1]
    assert run.survivors() == []


def test_a_failed_flush_ends_the_run_with_its_cause(recipe: Path, saved: Path, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os\n_real = os.fsync\n"
        "def full(fd):\n"
        "    if 'checkpoints' in os.readlink(f'/proc/self/fd/{fd}'):\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    return _real(fd)\nos.fsync = full\n"
    )
    env = {"PYTHONPATH": f"{hook}:{os.environ.get('PYTHONPATH', '')}"}
    run = TaggedRun("train", recipe, "--train-from", saved, "--run-dir", tmp_path / "run", env=env)
    code, out = run.wait()
    assert code == 1
    assert "No space left on device" in out.splitlines()[-1]
    assert run.survivors() == []
