"""The run directory: locking, atomic writes, the journal's torn tail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from m2train.config import ConfigError, Recipe, parse
from m2train.files import write_atomic
from m2train.records import Generation, VersionSpan
from m2train.rollout.journal import Journal
from m2train.rollout.sampler import derive_seed
from m2train.rundir import RunDir, load_rollouts


def generation(token: int, version: str = "step-1") -> Generation:
    return Generation(
        token_ids=[token],
        logprobs=[-0.1234567],
        finish_reason="stop",
        weight_versions=[VersionSpan(version=version, start=0, end=1)],
        seed=token,
    )


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    first = RunDir(tmp_path)
    with pytest.raises(ConfigError, match="in use by another run"):
        RunDir(tmp_path)
    first.close()
    RunDir(tmp_path).close()


def test_an_existing_run_needs_resume_or_restart(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.start(Recipe(), resume=False, restart=False)
    with pytest.raises(ConfigError, match="--resume"):
        run.start(Recipe(), resume=False, restart=False)
    run.rollouts(0).write_text("{}")
    run.start(Recipe(), resume=True, restart=False)
    assert run.rollouts(0).exists()
    run.start(Recipe(), resume=False, restart=True)
    assert not run.rollouts(0).exists()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"


def test_a_kill_in_the_middle_of_restart_leaves_a_run_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next run would train on the rollouts of the one that was to be discarded."""
    run = RunDir(tmp_path)
    run.start(Recipe(), resume=False, restart=False)
    run.rollouts(0).write_text("{}")

    def killed(path: Path) -> None:
        if path.name == "rollouts":
            raise KeyboardInterrupt
        real(path)

    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.start(Recipe(seed=1), resume=False, restart=True)
    assert run.rollouts(0).exists()
    with pytest.raises(ConfigError, match="already holds a run"):
        run.start(Recipe(seed=1), resume=False, restart=False)


def test_latest_checkpoint_ignores_unfinished_ones(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.latest_checkpoint() is None
    for name in ("step_000002", "step_000010", ".step_000012.7.tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert run.latest_checkpoint() == 10
    run.prune_checkpoints(keep=1)
    assert not (tmp_path / "checkpoints" / "step_000002").exists()
    run.close()
    RunDir(tmp_path)
    assert not (tmp_path / "checkpoints" / ".step_000012.7.tmp").exists(), "leftovers of a kill are removed"


def test_write_atomic_keeps_the_old_content_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "the temporary file is gone"


def test_rollout_files_that_are_missing_or_foreign(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read rollouts"):
        load_rollouts(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"step": 1, "who": 2}')
    with pytest.raises(ConfigError, match="not a rollout file"):
        load_rollouts(tmp_path / "x.json")


def test_journal_survives_being_cut_at_every_byte(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    journal = Journal(whole, "step-1")
    for token in range(3):
        journal.put(f"k{token}", generation(token))
    journal.close()
    raw = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == 10]
    for cut in range(len(raw) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(raw[:cut])
        again = Journal(path, "step-1")
        assert again.num_recovered == sum(end <= cut for end in ends)
        again.put("k9", generation(9))
        again.close()
        reread = Journal(path, "step-1")
        assert reread.get("k9") == generation(9)
        assert reread.num_recovered == again.num_recovered + 1
        reread.close()


def test_journal_ignores_tokens_of_other_weights(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", "step-1")
    journal.put("k", generation(1, "step-1"))
    journal.close()
    assert Journal(tmp_path / "j", "step-2").get("k") is None
    assert Journal(tmp_path / "j", "step-1").get("k") == generation(1, "step-1")


def test_seeds_depend_on_the_run_and_the_name_only() -> None:
    assert derive_seed(0, "a") == derive_seed(0, "a")
    assert len({derive_seed(seed, key) for seed in range(50) for key in "abcdefgh"}) == 400
    assert 0 <= derive_seed(3, "x") < 2**31


def test_resume_refuses_what_would_mix_two_runs(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.start(Recipe(), resume=False, restart=False)
    run.start(parse({"steps": 200, "learner": {"pp": 2}}), resume=True, restart=False)
    for change, name in (({"seed": 7}, "seed"), ({"rollout": {"temperature": 0.5}}, "rollout.temperature")):
        with pytest.raises(ConfigError, match=name):
            run.start(parse(change), resume=True, restart=False)
    run.checkpoint(50).mkdir()
    with pytest.raises(ConfigError, match="checkpoint of 50 steps"):
        run.start(parse({"steps": 40}), resume=True, restart=False)
