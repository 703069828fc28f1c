"""The mended interpreter against torch, bit for bit: no other Triton test means anything without it."""

import pytest
import torch
from triton_testing import interpreted

triton = pytest.importorskip("triton", reason="Triton is not installed: see `make test-triton`")
tl = pytest.importorskip("triton.language")

pytestmark = interpreted

ALL = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
SHAPE = 65536


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, bool_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, x - y)
    tl.store(out_ptr + 2 * N + i, x * y)
    tl.store(out_ptr + 3 * N + i, tl.where(x < y, x, y))
    tl.store(out_ptr + 4 * N + i, -x)
    tl.store(out_ptr + 5 * N + i, tl.abs(x))
    tl.store(bool_ptr + i, x < y)
    tl.store(bool_ptr + N + i, x == y)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, tl.dot(a, b))


@triton.jit
def sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


def cast(x, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, out, x.numel())
    return out


def same_bits(a, b):
    """Equal, and NaN in the same places (a NaN's payload is nobody's contract)."""
    nan = torch.isnan(a)
    return torch.equal(nan, torch.isnan(b)) and torch.equal(
        torch.where(nan, 0, a).view(torch.int16), torch.where(nan, 0, b).view(torch.int16)
    )


def test_every_bfloat16_widens_as_torch_widens_it():
    wide = cast(ALL, torch.float32)
    nan = torch.isnan(ALL)
    assert torch.equal(torch.isnan(wide), nan)
    assert torch.equal(wide[~nan].view(torch.int32), ALL.float()[~nan].view(torch.int32))


def test_float32_rounds_to_nearest_even_as_torch_does():
    # All signs and exponents with random mantissas, then every tie and its two neighbours.
    torch.manual_seed(0)
    random = torch.randint(-(2**31), 2**31 - 1, (SHAPE,), dtype=torch.int32)
    upper = torch.arange(65536, dtype=torch.int64) << 16
    for low in (None, 0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = random if low is None else (upper + low).to(torch.int32)
        x = bits.view(torch.float32)
        assert same_bits(cast(x, torch.bfloat16), x.bfloat16())
    assert cast(torch.full((2,), float("nan")), torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats_convert_as_torch_does(dtype):
    x = torch.randn(4096, dtype=torch.float64).mul(100).to(dtype)
    assert same_bits(cast(x, torch.bfloat16), x.bfloat16())
    y = torch.randn(4096).bfloat16()
    assert torch.equal(cast(y, dtype), y.to(dtype))


def test_arithmetic_and_comparisons_as_torch_does():
    torch.manual_seed(1)
    n = 4096
    x, y = (torch.randn(2, n) * 10.0 ** torch.randint(-3, 4, (2, n))).bfloat16()
    y[:8] = x[:8]
    out, flags = torch.empty(6, n, dtype=torch.bfloat16), torch.empty(2, n, dtype=torch.bool)
    binary_kernel[(1,)](x, y, out, flags, n)
    for got, want in zip(out, (x + y, x - y, x * y, torch.minimum(x, y), -x, x.abs()), strict=True):
        assert same_bits(got, want)
    assert torch.equal(flags, torch.stack([x < y, x == y]))


def test_dot_is_the_float32_product():
    torch.manual_seed(2)
    a, b = (torch.randn(64, 64).bfloat16() for _ in range(2))
    out = torch.empty(64, 64)
    dot_kernel[(1,)](a, b, out, 64)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=2e-5)


def test_a_reduction_of_bfloat16_raises():
    from triton.runtime.interpreter import InterpreterError

    with pytest.raises(InterpreterError, match="cast to float32 first"):
        sum_kernel[(1,)](torch.ones(4, dtype=torch.bfloat16), torch.zeros(1), 4)
