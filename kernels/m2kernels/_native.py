"""Loads the compiled op libraries and says why one of them cannot be used.

``_ops_cpu.so`` defines every op and its CPU kernels, ``_ops_cuda.so`` adds the CUDA kernels. Both
are found by import machinery, so that ordinary and editable installs work alike, but are loaded by
torch: they hold no Python. Without them the ``torch`` backend still works.
"""

import functools
import importlib.metadata
import importlib.util
import os

import torch

from m2kernels._backend import constant_when_compiled

_NOTHING = torch.empty(0, device="cpu")
"""For ops that ask the library and take no tensor: a tensor chooses the CPU's, whatever the default device."""
ISA_NAMES = ("baseline", "avx2", "avx512")


def _load(name: str) -> str | None:
    """Load ``m2kernels/<name>.so``; return None, or why it is not there."""
    spec = importlib.util.find_spec(f"m2kernels.{name}")
    if spec is None or spec.origin is None:
        return f"{name}.so is not installed"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"{name}.so does not load: {error}"
    return None


CPU_ERROR: str | None = _load("_ops_cpu")
CUDA_ERROR: str | None = CPU_ERROR or _load("_ops_cuda")


def cpu_isa() -> str:
    """Name of the instruction set that the CPU kernels use: baseline, avx2 or avx512.

    Raises:
        RuntimeError: the library is missing, or M2KERNELS_CPU_ISA names a set that this machine
            cannot run.
    """
    if CPU_ERROR is not None:
        raise RuntimeError(CPU_ERROR)
    return ISA_NAMES[int(torch.ops.m2kernels.cpu_isa(_NOTHING))]


@functools.cache
def cpu_bf16_dot() -> bool:
    """Whether the CPU kernels multiply bfloat16 by dot products of pairs (AVX-512 BF16)."""
    return CPU_ERROR is None and bool(torch.ops.m2kernels.cpu_bf16_dot(_NOTHING))


def cuda_runtime() -> int:
    """CUDART_VERSION of the runtime in ``_ops_cuda.so``: 13000 for 13.0."""
    return int(torch.ops.m2kernels.cuda_runtime(_NOTHING))


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def machine_reason(backend: str) -> str | None:
    """Why this machine cannot run C++ kernels on `backend` (cpu | cuda), or None."""
    reason: str | None = _machine_reason(backend)
    return reason


@constant_when_compiled
def _machine_reason(backend: str) -> str | None:
    if backend == "cpu":
        return CPU_ERROR
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if CUDA_ERROR is not None:
        return CUDA_ERROR + " (it is built only where nvcc is found)"
    runtime = cuda_runtime()
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # only in builds with CUDA
    if driver // 1000 < runtime // 1000:  # within a major version, older drivers run newer runtimes
        return (
            f"_ops_cuda.so holds the CUDA {_dotted(runtime)} runtime; the driver is for CUDA {_dotted(driver)}: "
            "update it, or build with an older nvcc"
        )
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"the device has compute capability {major}.{minor}; the kernels are for 9.0"
    return None


def environment() -> dict[str, str | None]:
    """Versions that a bug report needs; values are strings or None where a part is absent."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    isa = None if CPU_ERROR is not None else _isa_or_error()
    return {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "device": device,
        "triton": _version_of("triton"),
        "cpu_isa": isa,
        "cpu_isa_override": os.environ.get("M2KERNELS_CPU_ISA"),
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _isa_or_error() -> str:
    try:
        return cpu_isa()
    except RuntimeError as error:
        return f"error: {str(error).splitlines()[0]}"
