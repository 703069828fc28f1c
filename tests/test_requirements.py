"""The pins of a machine that is not at hand must at least resolve."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from m2train.bench.peers import PEERS

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "requirements" / "cuda.txt"
GLIBC = range(5, 40)  # pip matches each tag exactly


def pins(*names: str) -> dict[str, str]:
    lines = [line for name in names for line in (ROOT / "requirements" / name).read_text().splitlines()]
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name: version for name, version in found}


def test_a_gpu_machine_gets_the_peers_and_the_trainer() -> None:
    """The versions that adapters were written against, and what the cases of the trainer look for."""
    small = pins("gpu-wheels.txt")
    assert {"pydantic", "pydantic_core", "safetensors", "packaging"} <= small.keys()
    assert f'megatron-core=={small["megatron-core"]}; python_version >= "3.12"' in CUDA.read_text(), "as there"
    every = small | pins("gpu-wheels-cute.txt")
    wanted = {peer.distribution: peer.pin for peer in PEERS.values() if peer.distribution}
    assert {name: every.get(name) for name in wanted} == wanted


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_cuda_stack_resolves_for_python_3_12(tmp_path: Path) -> None:
    """The resolver over requirements/cuda.txt, for Linux x86-64 wheels; installs nothing, needs a package index."""
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in GLIBC]
    platforms += [f"--platform={name}_x86_64" for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    report, pinned = tmp_path / "report.json", tmp_path / "cuda.txt"
    # pip takes the markers from the Python that it runs in: those of 3.12 are put in their place.
    lines = [line.partition(";") for line in CUDA.read_text().splitlines()]
    pinned.write_text("\n".join(need for need, _, marker in lines if "<" not in marker))
    command = [
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary=:all:"),
        *("--python-version=3.12", "--implementation=cp", "--abi=cp312", "--abi=abi3", "--abi=none", *platforms),
        *(f"--report={report}", f"--target={tmp_path / 'none'}", "--ignore-requires-python", "-r", str(pinned)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {
        i["metadata"]["name"].lower(): i["metadata"]["version"] for i in json.loads(report.read_text())["install"]
    }
    assert found["vllm"] == "0.32.0"
    assert found["megatron-core"] == "0.19.2"
    assert found["torch"].startswith("2.13")
