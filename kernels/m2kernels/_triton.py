"""What every Triton backend shares: whether it can run here, and how a kernel is launched.

Triton is imported by the modules that hold kernels, and those only when an op needs them, so that
``import m2kernels`` works without it.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from m2kernels._backend import constant_when_compiled

INTERPRETER_PROGRAMS = 2
"""Programs of a persistent kernel under the interpreter: enough to take turns, and quick."""


def interpreting() -> bool:
    """Does TRITON_INTERPRET=1 ask for Triton's interpreter? Then kernels run on CPU tensors only."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@constant_when_compiled
def triton_reason(device_type: str | None = None, only: tuple[int, int] | None = None) -> str | None:
    """Why Triton kernels cannot run here, or on tensors of this device type; None if they can.

    Args:
        device_type: "cuda", "cpu", ...; None asks about the machine alone.
        only: the compute capability that the kernels are made for; None: any of 8.0 and later.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreting():
        if device_type not in (None, "cpu"):
            return f"TRITON_INTERPRET=1 takes CPU tensors; these are on {device_type}"
        return None
    if device_type not in (None, "cuda"):
        return f"the tensors are on {device_type}; on a CPU, Triton needs TRITON_INTERPRET=1"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    have = torch.cuda.get_device_capability()
    if have < (8, 0) or only not in (None, have):
        want = "8.0 or later" if only is None else ".".join(map(str, only))
        return f"the device has compute capability {'.'.join(map(str, have))}; the kernels need {want}"
    return None


@constant_when_compiled
def _bf16_reason(dtype: torch.dtype | None) -> str | None:
    """Triton's interpreter does integer arithmetic on bfloat16, and says nothing; the tests mend it."""
    if not interpreting() or dtype != torch.bfloat16:
        return None
    from triton.runtime import interpreter

    return None if getattr(interpreter, "BF16_IS_MENDED", False) else "Triton's interpreter is wrong in bfloat16"


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HEAD_CAPABILITY = (9, 0)
"""The head's tiles are made for Hopper's shared memory, tensor maps and wgmma; the tree's too. Not for later GPUs:
some have less shared memory, and what the kernels become there is checked by no gate."""
TREE_DIMS = (64, 128)
TREE_BLOCKS = (64, 128)
"""Tiles of a plan that are worth a GPU's while; the interpreter takes smaller ones too."""
ALIGNMENT = 16
"""Bytes: what a tensor map asks of its base and of its row stride."""


def triton_head_reason(hidden: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why Triton cannot run the head here, or with GEMMs of `dtype` on hidden [N, D]; None if it can."""
    why = triton_reason(None if hidden is None else hidden.device.type, HEAD_CAPABILITY)
    if why is not None or hidden is None or dtype is None:
        return why
    if dtype not in _FLOATS:
        return f"the computation is in {dtype}; the kernels take bfloat16, float16 and float32"
    if hidden.dim() == 2 and hidden.shape[1] * dtype.itemsize % ALIGNMENT:
        return f"hidden has {hidden.shape[1]} columns; expected a multiple of {ALIGNMENT // dtype.itemsize}"
    return _bf16_reason(dtype)


def triton_logits_reason(logits: torch.Tensor | None = None) -> str | None:
    """Why Triton cannot reduce logits here, or these; None if it can."""
    why = triton_reason(None if logits is None else logits.device.type, HEAD_CAPABILITY)
    if why is not None or logits is None:
        return why
    if logits.dtype not in _FLOATS:
        return f"logits are {logits.dtype}; the kernels take bfloat16, float16 and float32"
    return _bf16_reason(logits.dtype)


def triton_tree_reason(q: torch.Tensor | None = None, block: int | None = None) -> str | None:
    """Why Triton cannot run tree attention here, or on q [N, Hq, D] and a plan of such blocks; None if it can."""
    why = triton_reason(None if q is None else q.device.type, HEAD_CAPABILITY)
    if why is not None or q is None:
        return why
    if q.dtype not in _FLOATS:
        return f"q is {q.dtype}; the kernels take bfloat16, float16 and float32"
    if q.dim() == 3 and q.shape[2] not in TREE_DIMS:
        return f"head_dim is {q.shape[2]}; the kernels take {' and '.join(map(str, TREE_DIMS))}"
    if block is not None and (block > max(TREE_BLOCKS) or block not in TREE_BLOCKS and not interpreting()):
        return f"the plan's tiles have {block} rows; the kernels take {' and '.join(map(str, TREE_BLOCKS))}"
    return _bf16_reason(q.dtype)


def num_programs(device: torch.device) -> int:
    """How many programs fill the device with one each: the size of a persistent grid."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETER_PROGRAMS


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel, not yet made: the sm_90 gate compiles what :meth:`run` would run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of `device`; an empty grid launches nothing."""
        if 0 in self.grid:
            return
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.kernel[self.grid](*self.args, **self.meta)
        else:
            self.kernel[self.grid](*self.args, **self.meta)
