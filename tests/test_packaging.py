"""The scripts of packaging/: gates that shut on bad wheels, steps that are cut off and said to be."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "packaging" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu_check() -> ModuleType:
    return script("gpu_check")


@pytest.fixture
def check_wheel() -> ModuleType:
    return script("check_wheel")


def test_steps_pass_fail_and_are_cut_off(gpu_check: ModuleType, tmp_path: Path) -> None:
    steps = gpu_check.Steps(tmp_path, 60.0, dict(os.environ))
    assert steps.run("good", sys.executable, "-c", "print('seen')")
    assert not steps.run("bad", sys.executable, "-c", "raise SystemExit(3)")
    started = time.monotonic()
    sleeper = f"import subprocess, sys; print('before', flush=True); subprocess.run(['sleep', '{1e3:g}'])"
    assert not steps.run("long", sys.executable, "-c", sleeper, share=0.1)
    assert time.monotonic() - started < 30
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["good"].startswith("ok") and summary["bad"].startswith("FAILED, exit code 3")
    assert summary["long"].startswith("CUT OFF")
    log = (tmp_path / "gpu-check.log").read_text()
    assert "\nseen\n" in log and log.endswith("\nbefore\n"), "what was printed before the cut stays"
    steps.deadline = time.monotonic()
    assert not steps.run("late", "true") and steps.results["late"] == "NOT RUN: no time left"


def test_without_a_gpu_it_says_so(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 1
    assert "no NVIDIA GPU here" in capsys.readouterr().out  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "folder"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A10", "nvidia_a10")])
def test_results_folder_is_named_after_the_gpu(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    done = subprocess.CompletedProcess([], 0, stdout=f"{name}\n")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *args, **kwargs: done)
    assert gpu_check._gpu() == folder


@pytest.mark.parametrize(("dry", "device"), [(True, "cpu"), (False, "cuda")])
def test_the_wheel_of_this_python_is_run_too(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dry: bool, device: str
) -> None:
    said: dict[str, list[str]] = {}

    class Recorder(gpu_check.Steps):  # type: ignore[name-defined,misc]
        def run(self, name: str, *command: object, share: float = 1.0) -> bool:
            said[name] = [str(word) for word in command]
            return bool(name != failing)

    failing = ""
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "SITE", tmp_path)
    (tmp_path / "packaging").mkdir()
    (tmp_path / "packaging" / "build_first.py").touch()
    steps = Recorder(tmp_path, 60.0, {})
    assert gpu_check._steps(steps, None, dry=dry) and "own wheel" not in said
    assert steps.results["own wheel"].startswith("NOT RUN: no dist/m2train-*-cp3"), "and it is said"
    (tmp_path / "dist").mkdir()
    this, other = "cp{}{}".format(*sys.version_info), "cp39"
    for number, tag in enumerate((this, this, other)):
        path = tmp_path / "dist" / f"m2train-0.{number}-{tag}-{tag}-linux_x86_64.whl"
        path.write_bytes(b"")
        os.utime(path, (number, number))
    assert gpu_check._steps(steps, None, dry=dry)
    site = str(gpu_check.WHEEL_SITE)
    assert said["own wheel"][-2:] == [site, str(tmp_path / "dist" / f"m2train-0.1-{this}-{this}-linux_x86_64.whl")]
    assert said["own wheel's ops"][-2:] == [site, device] and f"PYTHONPATH={site}" in said["own wheel's ops"]
    failing = "own wheel's ops"
    assert not gpu_check._steps(steps, None, dry=dry)


def test_the_gpu_tests_are_found_as_gpu_check_runs_them(gpu_check: ModuleType) -> None:
    """Without the configuration of tests/, which is what puts that folder on the path elsewhere."""
    command = [sys.executable, *gpu_check.TESTS, "--collect-only", "-k", "policy_loss_in_a_cuda_graph"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"[{backend}-" in done.stdout or f"-{backend}]" in done.stdout for backend in ("triton", "cuda"))


def test_gpu_check_imports_what_it_built(tmp_path: Path) -> None:
    """Not this checkout, whose editable install and working folder come first elsewhere."""
    shutil.copy(ROOT / "packaging" / "build_first.py", tmp_path / "sitecustomize.py")
    packages = ("m2kernels", "m2train", "m2train.bench")
    for name in packages:
        place = tmp_path.joinpath(*name.split("."))
        place.mkdir()
        (place / "__init__.py").touch()
    code = (
        "import importlib.util, sys; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]));"
        "assert importlib.util.find_spec('m2kernels._ops_cpu') is None, 'of another build'"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *packages, "numpy"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        check=True,
    )
    *ours, numpy = done.stdout.split()
    assert [Path(path).parent for path in ours] == [tmp_path.joinpath(*name.split(".")) for name in packages]
    assert not Path(numpy).is_relative_to(tmp_path)


def test_smoke_runs_the_ops_of_the_given_place(tmp_path: Path) -> None:
    """Of a copy, that is, not of the checkout whose editable install comes first elsewhere."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "kernels" / "m2kernels", site / "m2kernels")
    for name in ("_ops_cpu", "_planner"):
        spec = importlib.util.find_spec(f"m2kernels.{name}")
        assert spec is not None and spec.origin is not None
        shutil.copy(spec.origin, site / "m2kernels")
    for folder, code, said in (
        (site, 0, "cpu: group_advantage and policy_loss are right"),
        (ROOT, 1, "would come from"),
    ):
        command = [sys.executable, "-P", ROOT / "packaging" / "smoke.py", folder, "cpu"]
        env = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
        assert done.returncode == code and said in done.stdout, done.stdout + done.stderr


def unpacked(folder: Path, *names: str, ops: bytes | None = None) -> Path:
    (folder / "m2kernels").mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    if ops is not None:
        (folder / "m2kernels" / "_ops_cuda.so").write_bytes(ops)
    return folder


def test_gates_on_names_contents_and_size(check_wheel: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "m2train-0.1.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("m2kernels/blob", os.urandom(int(check_wheel.BUDGET_MB * 1e6) + 1))
    good = Path("m2train-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl")
    assert check_wheel._tag(wheel, tmp_path) and not check_wheel._tag(good, tmp_path)
    assert "over the budget" in check_wheel._size(wheel, tmp_path)
    licences = [f"m2train-0.1.0.dist-info/licenses/{name}" for name in ("LICENSE", "THIRD_PARTY_NOTICES")]
    native = ["m2kernels/_ops_cpu.so", "m2kernels/_planner.cpython-311-x86_64-linux-gnu.so"]
    whole = unpacked(tmp_path / "a", *native, *licences)
    assert check_wheel._contents(wheel, whole) == ""
    poor = unpacked(tmp_path / "b", "tests/test_x.py")
    assert check_wheel._contents(wheel, poor) == (
        "unexpected tests; missing _ops_cpu.so; missing _planner; missing LICENSE; missing THIRD_PARTY_NOTICES"
    )


def test_gate_on_device_code(check_wheel: ModuleType, tmp_path: Path) -> None:
    wheel = Path("x.whl")
    assert check_wheel._architecture(wheel, unpacked(tmp_path / "a", ops=b"...sm_90a...sm_90a")) == ""
    assert "['80', '90a']" in check_wheel._architecture(wheel, unpacked(tmp_path / "b", ops=b"sm_80 sm_90a"))


def test_gates_on_symbols_and_links(check_wheel: ModuleType, tmp_path: Path) -> None:
    """A library that uses the unstable ABI and Python, linked to a CUDA runtime of its own making."""
    ops = tmp_path / "m2kernels"
    ops.mkdir()
    source = tmp_path / "x.cpp"
    source.write_text(
        'namespace at { void call(); }\nextern "C" { void PyErr_Clear(); void cuda(); }\n'
        'extern "C" void f() { at::call(); PyErr_Clear(); cuda(); }\n'
    )
    runtime = tmp_path / "libcudart.so.13"
    (tmp_path / "r.cpp").write_text('extern "C" void cuda() {}\n')
    subprocess.run(
        ["g++", "-shared", "-fPIC", f"-Wl,-soname,{runtime.name}", "-o", runtime, tmp_path / "r.cpp"], check=True
    )
    subprocess.run(["g++", "-shared", "-fPIC", "-o", ops / "_ops_cpu.so", source, runtime], check=True)
    found = check_wheel._symbols(Path("x.whl"), tmp_path)
    assert "_ops_cpu.so uses at::call()" in found and "_ops_cpu.so uses PyErr_Clear" in found
    assert "libcudart" in check_wheel._linked(Path("x.whl"), tmp_path)
