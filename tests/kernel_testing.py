"""What kernel tests share: above all the one comparison, of a kernel with float64, with torch as yardstick.

A kernel passes when its error is at most `ratio` times the error of plain torch at the same dtype,
plus `eps` of the oracle's largest value. Both are measured against a float64 oracle, so neither a
loose tolerance nor a weak reference can hide a wrong result.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def device_of(backend: str) -> str:
    """Where the tensors of this backend's tests live: Triton without a GPU runs in its interpreter."""
    return "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"


@contextmanager
def threads(num: int) -> Iterator[None]:
    """torch's threads, whatever the run was started with."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finite_pattern_equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Do both hold NaN, +inf and -inf in the same places?"""
    return all(torch.equal(f(x), f(y)) for f in (torch.isnan, lambda t: t == math.inf, lambda t: t == -math.inf))


def assert_kernel(
    name: str,
    actual: torch.Tensor,
    baseline: torch.Tensor,
    oracle: torch.Tensor,
    *,
    ratio: float = 2.0,
    eps: float = 1e-7,
) -> None:
    """Assert err(actual, oracle) <= ratio * err(baseline, oracle) + eps * max(1, |oracle|).

    Args:
        name: what is compared, for the message.
        actual: the kernel's result.
        baseline: torch's result at the same dtype, the yardstick.
        oracle: float64.
        ratio: how many times torch's error is allowed.
        eps: floor, relative to the oracle's largest value (at least 1e-3, so that an all-zero
            oracle asks for nearly exact zeros).

    Raises:
        AssertionError: with the worst coordinate, both errors and the distance in ulp.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, oracle {oracle.shape}"
    got, plain, want = (t.detach().double().cpu() for t in (actual, baseline, oracle))
    assert _finite_pattern_equal(got, want), f"{name}: NaN or inf where the oracle has none"
    if got.numel() == 0:
        return
    finite = torch.isfinite(want)
    error = torch.where(finite, (got - want).abs(), 0.0)
    yardstick = torch.where(finite & torch.isfinite(plain), (plain - want).abs(), 0.0).max()
    largest = torch.where(finite, want.abs(), 0.0).max().clamp(min=1e-3)
    limit = ratio * yardstick + eps * largest
    worst = int(error.flatten().argmax())
    value = float(want.flatten()[worst])
    ulp = float(torch.finfo(actual.dtype).eps) * max(abs(value), 1e-30)
    assert error.max() <= limit, (
        f"{name}: element {worst} is {float(got.flatten()[worst])!r}, oracle {value!r}: error "
        f"{float(error.max()):.3e} ({float(error.max()) / ulp:.1f} ulp), torch's {yardstick:.3e}, "
        f"limit {limit:.3e}"
    )
