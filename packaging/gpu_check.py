"""Everything that a GPU has to say, in one command: build, GPU tests, benchmark rows, a report of them.

    python packaging/gpu_check.py [--wheels DIR] [--out DIR] [--minutes 8] [--dry-run]

For a machine with an H100, torch 2.11 or newer, its Triton, nvcc, typer, rich, jinja2, numpy, pytest and no network.
This file uses the standard library alone; what more is wanted (other projects' kernels, megatron-core) comes as
wheels from a folder (`make gpu-wheels` fills one). The ops are built from source; a wheel of this Python in dist/ is
installed beside that, and its ops are run as well. Steps end at the time limit, and rows are written as they are
measured: whenever the run is cut off, --out has what there is by then. What was not run is said.

Without a GPU only `--dry-run` works: it builds, has the sm_90a compile gate stand in for the device, and prints the
commands that would have run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu-site"
WHEEL_SITE = ROOT / "build" / "gpu-wheel-site"
# Their own configuration alone: that of tests/ needs the whole trainer. What they share with others is in tests/.
TESTS = (
    *("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--confcutdir=tests/gpu"),
    *("-o", "pythonpath=tests", "tests/gpu"),
)
RESERVE_S = 40.0
"""Rows begin nothing new that long before the end, for what they are at then, and for the report."""


class Steps:
    """Runs commands one after another until the time is over; remembers how each ended.

    Args:
        out: logs and the summary go here.
        seconds: of all steps together.
        env: their environment.
    """

    def __init__(self, out: Path, seconds: float, env: dict[str, str]) -> None:
        self.out, self.env = out, env
        self.deadline = time.monotonic() + seconds
        self.results: dict[str, str] = {}
        self.log = out / "gpu-check.log"
        self.log.write_text("")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def skip(self, name: str, why: str) -> bool:
        """Note a step that cannot run."""
        return self._note(name, f"NOT RUN: {why}")

    def run(self, name: str, *command: object, share: float = 1.0) -> bool:
        """Run a step for at most `share` of the time left; True if it passed."""
        left = self.left * share
        if left < 5:
            return self.skip(name, "no time left")
        started = time.monotonic()
        words = [str(word) for word in command]
        print(f"== {name}: {' '.join(words)}", flush=True)
        with self.log.open("a") as log:
            log.write(f"\n== {name}: {' '.join(words)}\n")
            process = subprocess.Popen(
                words, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, start_new_session=True,
            )  # fmt: skip
            code = _follow(process, log, started + left)
        result = {0: "ok", None: f"CUT OFF after {left:.0f} s"}.get(code, f"FAILED, exit code {code}")
        return self._note(name, f"{result} ({time.monotonic() - started:.0f} s)")

    def _note(self, name: str, result: str) -> bool:
        print(f"-- {name}: {result}", flush=True)
        self.results[name] = result
        (self.out / "summary.json").write_text(json.dumps(self.results, indent=1) + "\n")
        return result.startswith("ok")


def _follow(process: subprocess.Popen[str], log: IO[str], end: float) -> int | None:
    """Copy a process's output to the log and the screen; its exit code, or None when the time was over."""
    alarm = signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, max(end - time.monotonic(), 0.1))
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            print(line, end="", flush=True)
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
    return None if code == -signal.SIGKILL and time.monotonic() >= end else code


def main() -> int:
    """1 if a step failed or could not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder of further wheels: peers, pydantic, megatron-core")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry-run", action="store_true", help="no device: build, compile gate, print the rest")
    args = parser.parse_args()
    gpu = _gpu()
    if gpu is None and not args.dry_run:
        print("gpu-check: no NVIDIA GPU here (nvidia-smi found none); --dry-run does what can be done without one")
        return 1
    place = ROOT / "benchmarks" / "results" / gpu if gpu else ROOT / "build" / "dry-run"
    out = (args.out or place).absolute()
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(SITE, ignore_errors=True)
    path = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # A dry run holds no GPU, and compiles every kernel by every Triton on whatever cores there are.
    steps = Steps(out, 60 * args.minutes * (3 if args.dry_run else 1), env)
    passed = _steps(steps, args.wheels, dry=args.dry_run)
    print(json.dumps(steps.results, indent=1))
    print(f"rows, logs and summary: {out}")
    return 0 if passed else 1


def _steps(steps: Steps, wheels: Path | None, *, dry: bool) -> bool:
    python, ok = sys.executable, True
    pip = (python, "-m", "pip", "-q", "install", "--no-index", "--no-deps", "--no-compile", "--target")
    if wheels is not None:
        files = sorted(wheels.glob("*.whl"))
        ok &= steps.run("wheels", *pip, SITE, *files) if files else steps.skip("wheels", f"no .whl in {wheels}")
    if not steps.run("build", *pip, SITE, "--no-build-isolation", ROOT, share=0.4):
        return False
    shutil.copy(ROOT / "packaging" / "build_first.py", SITE / "sitecustomize.py")
    ok &= _own_wheel(steps, pip, "cpu" if dry else "cuda")
    tests = (python, *TESTS)
    bench = (python, "-m", "m2train.bench.cli")
    file = steps.out / "rows.jsonl"
    rows = (*bench, "run", "-s", "paper", "-o", file, "--ceilings", steps.out / "ceilings.json", "--minutes")
    report = (*bench, "report", file, "-o", steps.out)
    if dry:
        ok &= steps.run("sm90_gate", "make", "check-sm90", share=0.9)
        # What is imported there must not need what only a trainer has.
        ok &= steps.run("list", *bench, "list", "--device", "cpu")
        for command in (tests, (*rows, "..."), report):
            print(f"would run: {' '.join(map(str, command))}")
        return ok
    steps.run("environment", *bench, "env")
    ok &= steps.run("tests", *tests, share=0.45)
    minutes = max(0.5, (steps.left - RESERVE_S) / 60)
    ok &= steps.run("rows", *rows, f"{minutes:.2f}", share=1 - 15 / max(steps.left, 16))
    if file.exists():
        ok &= steps.run("report", *report)
    return ok


def _own_wheel(steps: Steps, pip: tuple[object, ...], device: str) -> bool:
    """Install the newest wheel of dist/ that is for this Python, alone, and run its ops; True where there is none."""
    pattern = "m2train-*-cp{}{}-*.whl".format(*sys.version_info)
    found = sorted((ROOT / "dist").glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        steps.skip("own wheel", f"no dist/{pattern}; `make wheel` builds it")
        return True
    shutil.rmtree(WHEEL_SITE, ignore_errors=True)
    smoke = (sys.executable, "-P", ROOT / "packaging" / "smoke.py", WHEEL_SITE, device)
    return steps.run("own wheel", *pip, WHEEL_SITE, found[-1]) and steps.run(
        "own wheel's ops", "env", f"PYTHONPATH={WHEEL_SITE}", *smoke
    )


def _gpu() -> str | None:
    """A folder name for the GPU: `h100`, `h200`, or the model's own name."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    names = done.stdout.strip().splitlines()
    if done.returncode or not names:
        return None
    known = [name for name in ("h100", "h200") if name in names[0].lower()]
    return known[0] if known else "_".join(names[0].lower().split())


if __name__ == "__main__":
    raise SystemExit(main())
