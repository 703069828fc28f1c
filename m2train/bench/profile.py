"""The exact command of a profiler for one launch, and running it where the tool is there.

The tools record between cudaProfilerStart and Stop, which `launch_once` calls around one launch: that needs no other
package. With the nvtx package the launch is also in the NVTX domain `m2`: a start/end range `m2bench` around a
push/pop range `case/impl/shape/phase`. The trainer's ranges are there too: one nsys file shows step, op and kernel.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from m2train.bench import dram, registry
from m2train.bench.case import Skip
from m2train.bench.launch import callable_of, launch, make_ring
from m2train.bench.nvtx import launch_range
from m2train.bench.registry import Selector
from m2train.bench.runner import RunOptions
from m2train.bench.worker import Bench

TOOLS = ("ncu", "nsys", "proton")
_ENVIRONMENT = {"CUDA_INJECTION64_PATH": "none"}
"""DCGM holds the hardware counters on clusters, and ncu fails while it does; this keeps it out of the process."""


def command(pattern: str, tool: str, out: Path, cases: Path, device: str, dtype: str | None) -> list[str]:
    """The command line.

    Raises:
        ValueError: an unknown tool, a pattern that names no case and shape, or a backward alone.
    """
    if tool not in TOOLS:
        raise ValueError(f"got tool {tool!r}; expected one of {', '.join(TOOLS)}")
    specs = registry.load(cases)
    asked = Selector.parse(pattern)
    spec, shape, _ = registry.select(specs, [pattern], "smoke")[0]
    impl = asked.impl if asked.impl != "*" else "m2"
    phase = asked.phase if asked.phase != "*" else "fwd"
    _check_phase(phase)
    name = out / f"{spec.name}-{impl}-{shape}-{phase}"
    once = ["run", f"{spec.name}/{impl}/{shape}/{phase}", "--once", "--cases", str(cases), "--device", device]
    once += ["--dtype", dtype or registry.dtype_name(spec.dtypes[0])]
    module = [sys.executable, "-m", "m2train.bench.cli", *once]
    if tool == "ncu":
        return [
            *("ncu", "--nvtx", "--profile-from-start", "off", "--set", "full", "--import-source", "yes"),
            *("--cache-control", "none", "--clock-control", "none", "--force-overwrite", "-o", str(name)),
            *module,
        ]
    if tool == "nsys":
        return [
            *("nsys", "profile", "-t", "cuda,nvtx,cublas", "-c", "cudaProfilerApi", "--capture-range-end", "stop"),
            *("--force-overwrite", "true", "-o", str(name)),
            *module,
        ]
    return ["proton", "-n", str(name), str(Path(__file__).with_name("cli.py")), *once]


def printed(words: list[str]) -> str:
    """The command as it can be pasted into a shell."""
    return " ".join(f"{k}={v}" for k, v in _ENVIRONMENT.items()) + " " + shlex.join(words)


def run(tool: str, words: list[str], out: Path) -> int:
    """Run the command; its exit code.

    Raises:
        ValueError: the tool is not installed.
    """
    if shutil.which(tool) is None:
        where = {"proton": "Triton (pip install triton)"}.get(tool, "NVIDIA's CUDA toolkit")
        raise ValueError(f"{tool} is not installed (it comes with {where}); --print shows the command alone")
    out.mkdir(parents=True, exist_ok=True)
    return subprocess.run(words, env=os.environ | _ENVIRONMENT, check=False).returncode


def launched(words: list[str]) -> tuple[str, str, str, str, str]:
    """case, impl, shape, phase and dtype of a command."""
    case, impl, shape, phase = words[words.index("run") + 1].split("/")
    return case, impl, shape, phase, words[words.index("--dtype") + 1]


def measured_dram(words: list[str]) -> float:
    """Bytes that the launch of an ncu command moved to and from DRAM, read from the report that the command wrote.

    Raises:
        ValueError: ncu cannot read the report, or the counters are not in it.
    """
    report = Path(words[words.index("-o") + 1] + ".ncu-rep")  # names of shapes hold dots
    command = ["ncu", "--import", str(report), "--csv", "--page", "raw", "--metrics", ",".join(dram.COUNTERS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"ncu cannot read {report}: {done.stderr.strip() or done.stdout.strip()}")
    return dram.total(done.stdout)


def launch_once(options: RunOptions) -> None:
    """`m2bench run CASE --once`: one launch of one implementation in this process, nothing measured.

    Raises:
        ValueError: the pattern does not name one implementation and phase, or it cannot run here.
    """
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    found = registry.select(registry.load(options.cases, options.workload), options.patterns, options.suite)
    spec, shape, selector = found[0]
    dtype = registry.dtype_of(options.dtype) if options.dtype else spec.dtypes[0]
    try:
        case = spec.make(shape, dtype, device)
    except Skip as skip:
        raise ValueError(f"{spec.name} {shape} cannot run here: {skip}") from skip
    bench = Bench(spec=spec, case=case, shape=shape, dtype=dtype, device=device)
    impl: Any = case.impls.get(selector.impl)
    if len(found) != 1 or impl is None or selector.phase not in case.all_phases():
        raise ValueError(
            f"--once takes case/impl/shape/phase of one launch; {spec.name} has the implementations "
            f"{', '.join(case.impls)} and the phases {', '.join(case.all_phases())}"
        )
    if isinstance(impl, Skip):
        raise ValueError(f"{spec.name}/{selector.impl} cannot run here: {impl}")
    _check_phase(selector.phase)
    run_once(bench, selector.phase, selector.impl)


def _check_phase(phase: str) -> None:
    if phase not in ("fwd", "both"):
        raise ValueError(
            f"got phase {phase!r}; a profile holds fwd or both: a backward has no launch without its forward"
        )


def run_once(bench: Bench, phase: str, impl: str) -> None:
    """One launch, fwd or both, for a profiler: first one outside of the range, for what is set up once."""
    fn = callable_of(bench.case, impl)
    ring, _ = make_ring(bench.case, "warm", 0)
    launch(bench.case, fn, ring[0], phase)
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    with launch_range(f"{bench.spec.name}/{impl}/{bench.shape}/{phase}"):
        launch(bench.case, fn, ring[0], phase)
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        torch.cuda.profiler.stop()
