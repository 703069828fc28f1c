"""Hand-written gradients against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from m2train.learner.cpu_ops import rms_norm, swiglu


def rms_truth(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, 1e-5)


def swiglu_truth(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("shape", [(1, 1, 8), (300, 1, 64), (5, 3, 2, 24)])  # one row; over a block; q/k heads
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape).requires_grad_(), torch.rand(shape[-1]).requires_grad_()
    check(rms_norm(x, w, 1e-5), rms_truth(x.double(), w.double()), [x, w], 1e-5)


@pytest.mark.parametrize("rows", [1, 300])
def test_swiglu(rows: int) -> None:
    x = (4 * torch.randn(rows, 1, 96)).requires_grad_()
    check(swiglu(x), swiglu_truth(x.double()), [x], 1e-5)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_bf16_is_no_worse_than_torch(name: str) -> None:
    x, w = torch.randn(300, 1, 64).bfloat16().requires_grad_(), torch.rand(64).bfloat16().requires_grad_()
    g = torch.randn(300, 1, 64 if name == "rms_norm" else 32)
    if name == "rms_norm":
        outs, inputs = (rms_norm(x, w, 1e-5), rms_truth(x, w), rms_truth(x.double(), w.double())), [x, w]
    else:
        outs, inputs = (swiglu(x), swiglu_truth(x), swiglu_truth(x.double())), [x]
    ours, plain, exact = ([o, *torch.autograd.grad(o, inputs, g.to(o.dtype))] for o in outs)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6


def test_transposed_gradient() -> None:
    """Upstream gradients need not be contiguous."""
    x = torch.randn(6, 5, 8).requires_grad_()
    out = swiglu(x).transpose(0, 1)
    want = swiglu_truth(x).transpose(0, 1)
    g = torch.randn(5, 6, 4)
    torch.testing.assert_close(*(torch.autograd.grad(o, x, g)[0] for o in (out, want)))


def check(got: torch.Tensor, want: torch.Tensor, inputs: list[torch.Tensor], tol: float) -> None:
    torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol)
    g = torch.randn(got.shape)
    mine, theirs = torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=10 * tol, atol=10 * tol)
