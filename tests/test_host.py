"""Processes end with those that they belong to; the GPUs that a child may be given."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2train.host import visible_gpus

PARENT = """
import multiprocessing, sys, time
from m2train.host import forks_die_too
forks_die_too()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
print(child.pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_fork_dies_with_its_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [("", []), ("-1", []), ("2, 5", ["2", "5"]), ("0,-1,1", ["0"]), ("GPU-8f,", ["GPU-8f"]), ("1,,2", ["1"])]
    + [("NoDevFiles", []), ("MIG-1a,0", ["MIG-1a", "0"]), (None, ["0", "1"])],
)
def test_gpus_are_those_that_cuda_would_see(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, wanted: list[str]
) -> None:
    """Two devices in /dev count only if CUDA_VISIBLE_DEVICES is not set."""
    monkeypatch.setattr(Path, "glob", lambda *_: [Path("/dev/nvidia0"), Path("/dev/nvidia7")])
    if listed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == wanted


def test_as_many_files_as_the_hard_limit_allows() -> None:
    code = (
        "import resource; from m2train import host; N = resource.RLIMIT_NOFILE; resource.setrlimit(N, (256, 512)); "
        "host.allow_open_files(); assert resource.getrlimit(N) == (512, 512); assert host.open_files_limit() == 512"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
