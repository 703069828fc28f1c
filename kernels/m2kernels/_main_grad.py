"""The trainer's float32 gradient buffer: what may be added to it, and that it is added once."""

import math
import weakref

import torch

from m2kernels._check import check_device, check_dtype

_TOLERANCE = 1e-6  # between the factor that was promised and the one that backward brings


class Counted:
    """A forward that has added to a main_grad; lives with its graph, which outlives its own backward: checkpointing
    may run the forward again after that, for another layer of the same region."""

    __slots__ = ("__weakref__", "main_grad", "target")

    def __init__(self, main_grad: torch.Tensor, target: torch.Tensor) -> None:
        self.main_grad = main_grad.data_ptr()
        self.target = target  # held: its address cannot be another's meanwhile

    def repeats(self, main_grad: torch.Tensor, target: torch.Tensor) -> bool:
        """Whether this call is that forward again; its target may have been made anew."""
        if self.main_grad != main_grad.data_ptr() or self.target.shape != target.shape:
            return False
        return self.target.data_ptr() == target.data_ptr() or torch.equal(self.target, target)


_counted: weakref.WeakSet[Counted] = weakref.WeakSet()


def count(main_grad: torch.Tensor, target: torch.Tensor) -> Counted | None:
    """Say that this forward adds to `main_grad`; None when it must not.

    Inside a backward, with the same call counted before, activation checkpointing runs that forward
    again: the non-reentrant kind, which is saved-tensor hooks. Reentrant checkpointing runs its first
    forward without a graph, so that the second is the one that counts. The result lives as long as
    whoever keeps it: the forward's graph.
    """
    inside: bool = torch._C._current_graph_task_id() != -1
    if inside and any(c.repeats(main_grad, target) for c in _counted):
        return None
    found = Counted(main_grad, target)
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        _counted.add(found)
    return found


def check_main_grad(op: str, main_grad: torch.Tensor | None, grad_scale: float | None, weight: torch.Tensor) -> None:
    """Raise ValueError for a buffer that dW cannot be added to."""
    if main_grad is None:
        if grad_scale is not None:
            raise ValueError(f"{op}: got grad_scale {grad_scale} without main_grad; pass both, or leave it None")
        return
    if main_grad.shape != weight.shape:
        raise ValueError(
            f"{op}: main_grad has shape {list(main_grad.shape)}; expected that of the weight, {list(weight.shape)}"
        )
    check_dtype(op, "main_grad", main_grad, (torch.float32,))
    check_device(op, "main_grad", main_grad, weight)
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(f"{op}: main_grad is given but the weight is frozen; leave main_grad None")
    if grad_scale is not None and not math.isfinite(grad_scale):
        raise ValueError(f"{op}: got grad_scale {grad_scale}; expected a finite number")
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: main_grad is for eager mode; return dW instead, or leave the call uncompiled")


def check_factor(op: str, brought: torch.Tensor, grad_scale: float) -> None:
    """Refuse a backward whose factor is not the one that main_grad was scaled by.

    Raises ValueError on a CPU. On a GPU the comparison is queued like a kernel, so that nothing
    waits for it, and a false one ends the process with the device's assertion.
    """
    if brought.device.type == "cpu":
        value = float(brought)
        if not math.isclose(value, grad_scale, rel_tol=_TOLERANCE):
            raise ValueError(
                f"{op}: the backward brings a gradient of {value}; expected grad_scale={grad_scale}, "
                "by which main_grad was scaled in the forward and which it now holds; pass the factor that the loss "
                "is multiplied by, and zero main_grad"
            )
        return
    assert_factor(op, brought, grad_scale)


def assert_factor(op: str, brought: torch.Tensor, grad_scale: float) -> None:
    """The comparison of :func:`check_factor` as work for the device."""
    near = (brought.double() - grad_scale).abs() <= _TOLERANCE * abs(grad_scale)
    message = f"{op}: the backward brings another gradient than grad_scale={grad_scale}"
    torch._assert_async(near, message)
