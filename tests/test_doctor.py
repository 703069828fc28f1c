"""`m2train doctor`: every op is accounted for, and a recipe that cannot run is named with its cause."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import m2kernels as mk
from m2train.doctor import diagnose, render


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
