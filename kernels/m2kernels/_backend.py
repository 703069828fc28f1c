"""Choosing a backend: one predicate per op answers for dispatch, tests and the doctor."""

from collections.abc import Callable
from typing import TypeVar

BACKENDS = ("cuda", "cpu", "triton", "torch")
"""In the order in which ``auto`` tries them."""


_Fn = TypeVar("_Fn", bound=Callable[..., object])


def constant_when_compiled(fn: _Fn) -> _Fn:
    """`torch.compiler.assume_constant_result`, less its import of the compiler, which takes seconds."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def choose_backend(
    op: str, backend: str, reason: Callable[[str], str | None], backends: tuple[str, ...] = BACKENDS
) -> str:
    """Resolve ``auto``, and check an explicit choice.

    Args:
        op: name of the op, for messages.
        backend: ``auto`` or one of `backends`.
        reason: backend -> why it cannot run these inputs, or None.
        backends: those of the op, in the order in which ``auto`` tries them.

    Raises:
        ValueError: the backend is unknown, cannot run, or (auto) none can.
    """
    if backend == "auto":
        for candidate in backends:
            if reason(candidate) is None:
                return candidate
        raise ValueError(f"{op}: no backend can run these inputs; torch says: {reason('torch')}")
    if backend not in backends:
        raise ValueError(f"{op}: got backend {backend!r}; expected auto, {', '.join(backends)}")
    why = reason(backend)
    if why is not None:
        raise ValueError(f"{op}: backend {backend!r} cannot run: {why}; use backend='auto'")
    return backend
