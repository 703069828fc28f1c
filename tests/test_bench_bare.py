"""m2bench on a machine that has torch, typer, rich and jinja2 and nothing else of what the trainer needs.

Every process gets an import hook that finds only what such a machine has: no pydantic, no nvtx, no safetensors.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_rows import CASE_FILE

from m2train.bench.rows import read_rows

ROOT = Path(__file__).parents[1]
HOOK = """
import builtins
import sys

THERE = {
    "torch", "torchgen", "functorch", "triton", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
    "filelock", "fsspec", "typing_extensions", "setuptools", "typer", "click", "rich", "markdown_it", "mdurl",
    "pygments", "shellingham", "annotated_doc", "m2kernels", "m2train", "m2bench_cases", "usercustomize",
} | set(sys.stdlib_module_names)


class Bare:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        # Case files may import one another, and what they share.
        if top not in THERE and not top.startswith(("bench_", "head_common", "_sysconfigdata")):
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)


sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]

# Recent versions of typer are made of pydantic, the one on such machines is not: it may import it, we may not.
TYPERS = {"pydantic", "pydantic_core", "annotated_types", "typing_inspection"}
THERE |= TYPERS
plain_import = builtins.__import__


def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = ((globals or {}).get("__name__") or "").partition(".")[0]
    if level == 0 and name.partition(".")[0] in TYPERS and importer not in TYPERS | {"typer"}:
        raise ModuleNotFoundError(f"{importer} imports {name}, which is not there", name=name)
    return plain_import(name, globals, locals, fromlist, level)


builtins.__import__ = guarded
"""


@pytest.fixture
def bare(tmp_path):
    """Runs a Python with the hook; children inherit it."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "bench_tiny.py").write_text(CASE_FILE)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "hook"), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env.pop("M2BENCH_PEERS", None)

    def run(*words, code=0, **more):
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env | more)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


M2BENCH = ("-m", "m2train.bench.cli")


def test_the_hook_refuses(bare):
    tries = "".join(f"\ntry:\n import {n}\nexcept ImportError:\n print({n!r})" for n in ("pydantic", "nvtx", "httpx"))
    found = bare(
        "-c", f"import torch, typer, rich, jinja2, m2kernels, m2train.bench.report, m2train.bench.cli{tries}"
    )
    assert found.split() == ["pydantic", "nvtx", "httpx"]


@pytest.mark.timeout(280)
def test_list_env_and_report(bare, tmp_path):
    found = json.loads(bare(*M2BENCH, "list", "--json", "--device", "cpu"))
    reasons = {name: case["unsupported_reason"] for name, case in found["cases"].items()}
    assert reasons["policy_loss"] is None and reasons["group_advantage"] is None and reasons["lm_head"] is None
    assert "is not installed" in reasons["learner_step"] and "safetensors" in reasons["weight_sync"]
    env = json.loads(bare(*M2BENCH, "env", "--device", "cpu"))
    assert env["build"]["nvtx"].startswith("not installed")
    bare(*M2BENCH, "run", "tiny/m2/small/fwd", "--once", "--cases", tmp_path / "cases", "--device", "cpu")


@pytest.mark.timeout(280)
def test_run_writes_rows(bare, tmp_path):
    out = tmp_path / "rows.jsonl"
    words = ("--device", "cpu", "-s", "smoke", "--processes", 1, "--seconds", "0.02", "--no-calibrate", "-o", out)
    bare(*M2BENCH, "run", "group_advantage/m2/128/fwd", *words)
    rows = read_rows([out])
    assert [row.identity.impl for row in rows] == ["m2", "torch"] and {row.status for row in rows} == {"ok"}
    bare(*M2BENCH, "report", out, "-o", tmp_path / "report")
    assert rows[0].id in (tmp_path / "report" / "report.html").read_text()
    assert "time of B / time of A" in bare(*M2BENCH, "compare", out, out)
    bare(*M2BENCH, "repro", rows[0].id, out)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_peers_folder_reaches_the_workers(bare, tmp_path):
    """A peer that was installed with `pip --target` runs, and its version is in the row."""
    folder = tmp_path / "peers"
    (folder / "cut_cross_entropy").mkdir(parents=True)
    (folder / "cut_cross_entropy" / "__init__.py").write_text("def twice(x):\n    return 2 * x\n")
    (folder / "cut_cross_entropy-9.9.dist-info").mkdir()
    (folder / "cut_cross_entropy-9.9.dist-info" / "METADATA").write_text("Name: cut-cross-entropy\nVersion: 9.9\n")
    (tmp_path / "cases" / "bench_tiny.py").write_text(
        CASE_FILE.replace('"gone": Skip("not installed")', '"gone": peers.PEER')
        .replace("from m2train.bench.case", "import importlib\nfrom m2train.bench.case")
        .replace("peers.PEER", 'importlib.import_module("cut_cross_entropy").twice')
    )
    out = tmp_path / "rows.jsonl"
    words = ("--device", "cpu", "-s", "smoke", "--processes", 1, "--seconds", "0.02", "--no-calibrate", "-o", out)
    hook = (
        (tmp_path / "hook" / "sitecustomize.py").read_text().replace('"torchgen"', '"torchgen", "cut_cross_entropy"')
    )
    (tmp_path / "hook" / "sitecustomize.py").write_text(hook)
    run = (*M2BENCH, "run", "tiny/gone/small/fwd", "--cases", tmp_path / "cases", *words)
    bare(*run, code=1)
    bare(*run, M2BENCH_PEERS=str(tmp_path / "nowhere"), code=64)
    bare(*run, M2BENCH_PEERS=str(folder))
    good = [row for row in read_rows([out]) if row.status == "ok"]
    assert len(good) == 2 and {row.build["packages"]["cut-cross-entropy"] for row in good} == {"9.9"}
