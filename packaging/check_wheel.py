"""Release gates of a wheel; none needs a GPU.

    python packaging/check_wheel.py dist/*.whl

For each wheel: torch-abi-audit finds the ops stable from torch 2.10 on; no unstable symbol, no Python and no shared
CUDA runtime in them; machine code for sm_90a alone; a manylinux tag; a size budget; nothing but the two packages
and their licences inside. The wheel of this Python is then installed into an empty venv where only torch and its
needs can be imported, and its ops are run there without nvcc on PATH; of another Python's wheel the planner is
loaded, which needs no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET_MB = 6.0
TORCH_FLOOR = (2, 10)
SMOKE = ROOT / "packaging" / "smoke.py"


def main() -> int:
    """Check every wheel named; 1 if a gate is shut."""
    wheels = [Path(arg) for arg in sys.argv[1:]]
    if not wheels:
        raise SystemExit("check_wheel: got no wheel; run `make wheel` first, then pass dist/*.whl")
    failed = 0
    for wheel in wheels:
        print(wheel.name)
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            for name, gate in GATES.items():
                problem = gate(wheel, Path(folder))
                print(f"  {'FAIL' if problem else 'ok  '} {name}{': ' + problem if problem else ''}", flush=True)
                failed += bool(problem)
    return 1 if failed else 0


def _ops(folder: Path) -> list[Path]:
    return sorted((folder / "m2kernels").glob("_ops_*.so"))


def _tag(wheel: Path, folder: Path) -> str:
    return "" if re.search(r"-manylinux_2_\d+_x86_64\.whl$", wheel.name) else "no manylinux tag in the name"


def _size(wheel: Path, folder: Path) -> str:
    size = wheel.stat().st_size / 1e6
    return "" if size <= BUDGET_MB else f"{size:.2f} MB is over the budget of {BUDGET_MB} MB"


def _contents(wheel: Path, folder: Path) -> str:
    allowed = {"m2kernels", "m2train"}
    extra = [p.name for p in folder.iterdir() if p.name not in allowed and not p.name.endswith(".dist-info")]
    missing = [name for name in ("_ops_cpu.so",) if not (folder / "m2kernels" / name).exists()]
    missing += [] if list((folder / "m2kernels").glob("_planner.*.so")) else ["_planner"]
    licenses = {p.name for p in folder.glob("*.dist-info/licenses/*")}
    missing += sorted({"LICENSE", "THIRD_PARTY_NOTICES"} - licenses)
    return "; ".join([f"unexpected {name}" for name in extra] + [f"missing {name}" for name in missing])


def _stable(wheel: Path, folder: Path) -> str:
    """Every library of ops passes the audit of torch's stable ABI, at the floor or below."""
    problems = []
    for library in _ops(folder):
        command = [sys.executable, "-m", "torch_abi_audit.cli", "--json", "--check", "torch", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            return f"torch-abi-audit failed on {library.name}: {done.stderr.strip()[:300]}"
        found = json.loads(done.stdout)["bundled_libs"][0]["torch"]
        floor = tuple(map(int, (found["min_torch_version"] or "0").split(".")[:2]))
        if not found["uses_torch"] or not found["stable"]:
            problems.append(f"{library.name} is not stable: {found['unstable_symbols'][:3]}")
        elif floor > TORCH_FLOOR:
            problems.append(f"{library.name} needs torch {found['min_torch_version']}")
    return "; ".join(problems)


def _symbols(wheel: Path, folder: Path) -> str:
    problems = []
    for library in _ops(folder):
        listed = subprocess.run(["nm", "-DC", library], capture_output=True, text=True, check=True).stdout
        undefined = [line.split(" U ")[1] for line in listed.splitlines() if " U " in line]
        bad = [s for s in undefined if s.startswith(("at::", "c10::", "torch::", "Py", "_Py"))]
        problems += [f"{library.name} uses {name}" for name in bad[:3]]
    return "; ".join(problems)


def _linked(wheel: Path, folder: Path) -> str:
    problems = []
    for library in folder.rglob("*.so*"):
        listed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listed)
        bad = [name for name in needed if re.match(r"lib(cudart|cublas|python|mkl|iomp|omp)", name)]
        problems += [f"{library.name} is linked to {name}" for name in bad]
    return "; ".join(problems)


def _architecture(wheel: Path, folder: Path) -> str:
    """Device code for sm_90a and nothing else: each extra architecture is as large again."""
    library = folder / "m2kernels" / "_ops_cuda.so"
    if not library.exists():
        return "" if shutil.which("nvcc") is None else "nvcc is here, but the wheel has no _ops_cuda.so"
    names = set(re.findall(rb"sm_(\d+[af]?)", library.read_bytes()))
    found = {name.decode() for name in names}
    return "" if found == {"90a"} else f"architectures named in _ops_cuda.so: {sorted(found)}; expected 90a"


def _runs(wheel: Path, folder: Path) -> str:
    """In an empty venv where only torch and what torch needs can be imported; another Python's: its planner loads."""
    version = re.search(r"-cp(\d)(\d+)-", wheel.name)
    assert version is not None, wheel.name
    if version.groups() != tuple(map(str, sys.version_info[:2])):
        return _planner_loads(".".join(version.groups()), folder)
    with tempfile.TemporaryDirectory() as place:
        venv = Path(place) / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        site = next(venv.glob("lib/python*/site-packages"))
        command = [sys.executable, "-m", "pip", "-q", "--python", venv, "install", "--no-deps", "--no-index", wheel]
        subprocess.run(command, check=True)
        _lend_torch(site)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "M2"))}
        clean["PATH"] = "/usr/bin:/bin"
        done = subprocess.run(
            [venv / "bin" / "python", "-P", SMOKE, site, "cpu"],
            capture_output=True, text=True, cwd=place, env=clean, timeout=300,
        )  # fmt: skip
    print("       " + done.stdout.strip().replace("\n", "\n       "))
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip().splitlines()[-1]


def _planner_loads(version: str, folder: Path) -> str:
    """The one part that depends on Python is imported by that Python; the ops are not run, it has no torch here."""
    python = ROOT / "build" / f"venv-{version}" / "bin" / "python"
    if not python.exists():
        print(f"       NOT RUN: no Python {version} here")
        return ""
    code = f"import sys; sys.path.insert(0, {str(folder / 'm2kernels')!r}); import _planner; _planner.pack"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    print(f"       Python {version}: the planner loads; the ops were NOT RUN, there is no torch for it here")
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def _lend_torch(site: Path) -> None:
    """Link torch and its declared needs, and nothing else, out of this environment."""
    from importlib.metadata import PackageNotFoundError, distribution

    wanted, seen = ["torch", "numpy"], set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen or name == "triton":
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        roots = {Path(file).parts[0] for file in found.files or [] if not str(file).startswith("..")}
        for root in roots:
            target = Path(str(found.locate_file(root)))
            if target.exists() and not (site / root).exists() and root != "__pycache__":
                (site / root).symlink_to(target)
        for need in found.requires or []:
            if "extra ==" not in need:
                wanted.append(re.split(r"[^A-Za-z0-9._-]", need)[0])


GATES: dict[str, Callable[[Path, Path], str]] = {
    "manylinux tag": _tag,
    f"at most {BUDGET_MB} MB": _size,
    "two packages, planner and CPU ops inside": _contents,
    f"stable ABI from torch {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]} on (torch-abi-audit)": _stable,
    "no at::, c10::, torch:: or Python symbol in the ops": _symbols,
    "no shared CUDA runtime, BLAS or libpython": _linked,
    "device code for sm_90a alone": _architecture,
    "runs in an empty venv": _runs,
}

if __name__ == "__main__":
    raise SystemExit(main())
