"""`m2train doctor`: every op is accounted for, and a recipe that cannot run is named with its cause."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import m2kernels as mk
from m2train import doctor as doctor_module
from m2train import preflight
from m2train.config import parse
from m2train.doctor import diagnose, missing_routes, render
from m2train.host import free_port
from m2train.rollout import placement


def doctor(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from m2train.cli import main; main()", "doctor", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_every_op_and_backend_has_a_line() -> None:
    findings = diagnose()
    text = render(findings)
    for op, backends in mk.doctor().items():
        if op != "environment":
            assert findings["ops"][op] == backends
            assert all(f"{op} [{backend}]: {reason or 'available'}" in text for backend, reason in backends.items())
    json.dumps(findings)


def test_a_recipe_that_cannot_run_exits_1_with_the_cause(tiny_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[model]\npath = "{tiny_model}"\n[rollout]\nmax_context_tokens = 128\n[algo]\nmax_new_tokens = 64\n'
    )
    good = doctor(recipe, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["recipe"]["problems"] == []
    bad = doctor(recipe, "--set", "learner.tp=4")
    assert bad.returncode == 1
    assert "learner.tp = 4" in bad.stdout


def test_machine_facts_that_a_bug_report_needs() -> None:
    findings = diagnose()
    text = render(findings)
    for word in ("limit_open_files", "limit_processes", "shared_memory_free_gib", "loopback_port", "python"):
        assert word in findings["machine"] and word in text
    assert findings["cuda"]["devices"].isdigit() and "cuda " in text


def test_routes_of_the_installed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    assert missing_routes() == []
    monkeypatch.setattr(doctor_module, "ROUTES", ("/pause", "/never_there"))
    assert missing_routes() == ["/never_there"]
    assert "routes    missing /never_there" in render(diagnose())


def test_a_server_that_does_not_answer_and_too_few_files(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    recipe = {"model": {"path": str(tiny_model)}, "rollout": {"urls": [url], "max_context_tokens": 128}}
    recipe["algo"] = {"max_new_tokens": 64}
    silent = f"no vLLM server answers at {url} (rollout.urls); start it, or correct the URL"
    assert diagnose(parse(recipe))["recipe"]["problems"] == [silent]
    monkeypatch.setattr(preflight, "open_files_limit", lambda: 300)
    problems = diagnose(parse(recipe))["recipe"]["problems"]
    assert any("rollout.concurrency = 64 needs 384 open files; the hard limit is 300" in line for line in problems)


def test_a_driver_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor_module, "_SMI_S", 0.2)
    assert doctor_module._gpu() == "nvidia-smi did not answer in 0.2 s: the driver hangs"
    tool.write_text("")
    assert doctor_module._gpu().startswith("nvidia-smi failed")


def test_more_ranks_and_engines_than_gpus(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    for module in (placement, preflight):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    recipe = parse({"model": {"path": str(tiny_model)}, "learner": {"dp": 2}, "rollout": {"servers": 1}})
    problems = diagnose(recipe)["recipe"]["problems"]
    found = [line for line in problems if "learner.dp = 2 take 2 GPUs and rollout.servers = 1" in line]
    assert len(found) == 1 and "this machine shows 2 (0, 1)" in found[0] and "rollout.urls" in found[0]
