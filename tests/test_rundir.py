"""The run directory: locking, atomic writes, the journal's torn tail."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import bare_run

from m2train.config import ConfigError, Recipe, parse
from m2train.files import write_atomic
from m2train.records import Generation, StepRollouts, VersionSpan
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


def test_files_of_others_stay(tmp_path: Path) -> None:
    """In a folder that holds no run, and beside the files of one that does."""
    theirs = [tmp_path / ".mine.tmp" / "thesis.txt", tmp_path / "logs" / ".other.tmp", tmp_path / ".mine.2.tmp"]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("kept")
    run = RunDir(tmp_path)
    with pytest.raises(ConfigError, match=r"holds none; it holds \.mine"):
        run.start(Recipe(), resume=False, restart=True)
    left = [tmp_path / ".status.json.12.tmp", run.rollouts(0).with_name(".step_000000.json.12.tmp")]
    half = run.checkpoint(3).with_name(".step_000003.tmp")
    half.mkdir()
    for path in left:
        path.touch()
    run.start(Recipe(), resume=False, restart=False)
    assert not half.exists() and not any(path.exists() for path in left), "of a kill in the middle of a write"
    for step in (100, 110, 120):
        run.checkpoint(step).mkdir()
    copy = run.checkpoint(100).with_name("step_000100_best")
    copy.mkdir()
    run.prune_checkpoints(2)
    assert not run.checkpoint(100).exists() and run.checkpoint(110).exists() and run.latest_checkpoint() == 120
    assert copy.exists() and all(path.exists() for path in theirs)


def test_a_temporary_file_alone_does_not_keep_a_restart_off(tmp_path: Path) -> None:
    (tmp_path / ".run.json.12.tmp").touch()
    RunDir(tmp_path).start(Recipe(), resume=False, restart=True)


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"cannot be made: .* is a file"):
            RunDir(path)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_other_steps_must_not_bend_the_learning_rate(schedule: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    recipe = parse({"steps": 4, "learner": {"lr_schedule": schedule}})
    run.start(recipe, resume=False, restart=False)
    more = recipe.model_copy(update={"steps": 8})
    if schedule == "constant":
        run.start(more, resume=True, restart=False)
        return
    with pytest.raises(ConfigError, match=f"steps = 8 instead of 4 would bend the learning rate's {schedule}"):
        run.start(more, resume=True, restart=False)


MODES: dict[str, dict[str, Any]] = {
    "a live run": {},
    "--rollouts-only": {"rollouts_only": True},
    "--train-from /a": {"train_from": Path("/a")},
    "--train-from /b": {"train_from": Path("/b")},
}


@pytest.mark.parametrize("started", MODES)
def test_resume_keeps_the_mode_that_a_run_was_started_in(started: str, tmp_path: Path) -> None:
    """`--rollouts-only --resume` of a trained run dropped all its metrics, and sampled on with the first weights."""
    run = RunDir(tmp_path)
    run.start(Recipe(), resume=False, restart=False, **MODES[started])
    before = (tmp_path / "run.json").read_text()
    run.start(Recipe(), resume=True, restart=False, **MODES[started])
    for mode in MODES.keys() - {started}:
        with pytest.raises(ConfigError, match=f"started as {started}; --resume as {mode} would mix"):
            run.start(Recipe(), resume=True, restart=False, **MODES[mode])
    assert (tmp_path / "run.json").read_text() == before
    run.start(Recipe(), resume=False, restart=True, rollouts_only=True)
    assert run.identity is not None and run.identity.mode == "rollouts-only"


def test_the_source_of_rollouts_is_one_folder_by_any_name(tmp_path: Path) -> None:
    run, source = RunDir(tmp_path / "run"), tmp_path / "source"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    run.start(Recipe(), resume=False, restart=False, train_from=source)
    run.start(Recipe(), resume=True, restart=False, train_from=tmp_path / "link")


def test_weights_are_named_by_run_and_step(tmp_path: Path) -> None:
    """Two runs on one server could not be told apart."""
    runs = [RunDir(tmp_path / name) for name in "ab"]
    for run in runs:
        run.start(Recipe(), resume=False, restart=False)
    names = [run.weight_version(3) for run in runs]
    assert all(re.fullmatch("[0-9a-f]{8}-step-3", name) for name in names) and names[0] != names[1]
    runs[0].close()
    again = RunDir(tmp_path / "a")
    again.start(Recipe(), resume=True, restart=False)
    assert again.weight_version(3) == names[0], "the journal and the rollouts before the kill count"
    again.start(Recipe(), resume=False, restart=True)
    assert again.weight_version(3) != names[0]


class Engine:
    """Notes the version that weights are published under."""

    published = ""

    async def update_weights(self, source: Path, version: str) -> dict[str, float]:
        self.published = version
        return {}


class Learner:
    """Has nothing to export."""

    def export(self, path: Path) -> dict[str, float]:
        return {}


def test_a_run_publishes_under_its_own_name_and_trusts_no_other(tmp_path: Path) -> None:
    run_dir, engine = RunDir(tmp_path), Engine()
    run_dir.start(Recipe(), resume=False, restart=False)
    run = bare_run(run_dir, engines=engine, learner=Learner(), exports=tmp_path)
    asyncio.run(run.publish(3))
    assert engine.published == run_dir.weight_version(3)
    mine, other = (
        StepRollouts(step=3, weight_version=name, dialogues=[], groups=[])
        for name in (engine.published, "0000abcd-step-3")
    )
    assert run.trusted(mine, tmp_path) is mine
    with pytest.raises(ConfigError, match="sampled by weights '0000abcd-step-3'; expected '"):
        run.trusted(other, tmp_path)
    given = bare_run(run_dir, learner=Learner(), source=tmp_path / "source")
    assert given.trusted(other, tmp_path) is other, "--train-from"


def test_a_run_from_before_there_was_an_identity_goes_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.config.write_text(Recipe().to_toml())
    assert run.weight_version(2) == "step-2"
    run.start(Recipe(), resume=True, restart=False)
    assert run.weight_version(2) == "step-2", "its rollouts are named so"
    with pytest.raises(ConfigError, match="started as a live run; --resume as --rollouts-only"):
        run.start(Recipe(), resume=True, restart=False, rollouts_only=True)


def test_an_identity_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.start(Recipe(), resume=False, restart=False)
    (tmp_path / "run.json").write_text('{"id": "x"')
    with pytest.raises(ConfigError, match="run.json does not say what run this is"):
        run.start(Recipe(), resume=True, restart=False)
    run.start(Recipe(), resume=False, restart=True)


def test_latest_checkpoint_ignores_unfinished_ones(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.latest_checkpoint() is None
    for name in ("step_000002", "step_000010", ".step_000012.7.tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert run.latest_checkpoint() == 10
    run.prune_checkpoints(keep=1)
    assert not (tmp_path / "checkpoints" / "step_000002").exists()
    run.start(Recipe(), resume=True, restart=False)
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


def test_restart_discards_a_run_and_nothing_else(tmp_path: Path) -> None:
    """`--run-dir runs --restart` for `--run-dir runs/demo`, or `--run-dir .`."""
    mine = tmp_path / "demo" / "config.toml"
    mine.parent.mkdir()
    mine.write_text("")
    (tmp_path / "demo" / ".draft.tmp").write_text("")
    outer = RunDir(tmp_path)
    with pytest.raises(ConfigError, match=r"holds none; it holds demo: name another --run-dir"):
        outer.start(Recipe(), resume=False, restart=True)
    outer.start(Recipe(), resume=False, restart=False)
    (tmp_path / "notes.txt").write_text("kept")
    outer.rollouts(0).write_text("{}")
    outer.start(Recipe(seed=1), resume=False, restart=True)
    assert not outer.rollouts(0).exists()
    assert mine.exists() and (tmp_path / "notes.txt").exists() and (tmp_path / "demo" / ".draft.tmp").exists()
    outer.close()
