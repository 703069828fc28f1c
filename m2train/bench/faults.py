"""What selftest plants: an op that does 3 % more, and a case with an implementation that cheats."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from m2train.bench.case import Case, CaseSpec, Fn, Setup

_WORK = 1 << 16
_LATE_S = 0.01


def work(device: torch.device, planted: float) -> tuple[Callable[[], object], Callable[[], object]]:
    """(an op of about 0.1 ms on a CPU, the same with a share `planted` more elements)."""
    size = _WORK if device.type == "cpu" else _WORK << 10
    data = torch.rand(int(size * (1 + planted)), device=device)
    out = torch.empty_like(data)

    def run(length: int) -> Callable[[], object]:
        x, y = data[:length], out[:length]
        return lambda: torch.erf(torch.exp(x, out=y), out=y)

    return run(size), run(len(data))


def _scaled_exp(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.exp(x) * w


def wrong(fn: Fn = _scaled_exp) -> Fn:
    """One element is off by a thousandth."""

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        error = torch.zeros_like(x)
        error.view(-1)[x.numel() // 2] = 1e-3
        result: torch.Tensor = fn(x, w) * (1 + error)
        return result

    return run


def late(fn: Fn = _scaled_exp) -> Fn:
    """The call returns an empty tensor, which a background thread or a side stream fills."""

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _Late.apply(fn, x, w)  # type: ignore[no-any-return]

    return run


class _Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Fn, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.fn = fn
        ctx.save_for_backward(x, w)
        out = torch.zeros_like(x)
        if x.is_cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), torch.no_grad():
                torch.cuda._sleep(20_000_000)
                out.copy_(fn(x, w))
            return out

        def finish() -> None:
            time.sleep(_LATE_S)
            with torch.no_grad():
                out.copy_(fn(x, w))

        threading.Thread(target=finish, daemon=True).start()
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        with torch.enable_grad():
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            return (None, *torch.autograd.grad(ctx.fn(x, w), (x, w), grad))


def cached(fn: Fn = _scaled_exp) -> Fn:
    """Computes once per address of its input, and returns copies of that."""
    kept: dict[int, torch.Tensor] = {}

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in kept:
            kept[x.data_ptr()] = fn(x.detach(), w.detach())
        # Right gradients, and a value that is not computed again.
        fresh: torch.Tensor = fn(x, w)
        return fresh - fresh.detach() + kept[x.data_ptr()]

    return run


def spec_of(plant: Callable[[], Fn]) -> CaseSpec:
    """A case of exp(x) * w with an honest implementation and a planted one."""
    planted = plant()

    def build(s: Setup) -> Case:
        return Case(
            oracle=_scaled_exp,
            inputs=(s.randn(64, 32), s.randn(64, 32)),
            grad=s.randn(64, 32),
            impls={"torch": _scaled_exp, "planted": planted},
            ours=("planted",),
        )

    return CaseSpec(name="planted", build=build, shapes={"plain": {}}, dtypes=(torch.float32,), smoke=("plain",))
