"""The C++ GEMM of dX in bfloat16, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import threads

from m2kernels._native import cpu_bf16_dot

pytestmark = pytest.mark.skipif(not cpu_bf16_dot(), reason="no bfloat16 dot products on this machine")


def product(vocab, rows, dim, seed=0, spare=5):
    """(dX, factors): rows of both factors lie apart, and what is between them is NaN."""
    torch.manual_seed(seed)
    dz, weight = (torch.full((vocab, n + spare), float("nan"), dtype=torch.bfloat16)[:, :n] for n in (rows, dim))
    dz.copy_(torch.randn(vocab, rows))
    weight.copy_(torch.randn(vocab, dim))
    out = torch.full((rows, dim + spare), float("nan"))
    torch.ops.m2kernels.head_dx(dz, weight, out[:, :dim])
    assert out[:, dim:].isnan().all(), "beyond the last column"
    return out[:, :dim], dz, weight


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1100), st.integers(1, 130), st.integers(1, 9), st.integers(0, 9))
def test_sums_are_float32(vocab, rows, vectors, seed):
    got, dz, weight = product(vocab, rows, 32 * vectors, seed)
    want = dz.double().t() @ weight.double()
    size = dz.double().abs().t() @ weight.double().abs()
    assert ((got.double() - want).abs() <= 2e-6 * size).all()


def test_any_number_of_threads_gives_the_same_bits():
    want, *_ = product(700, 40, 320)
    with threads(2):
        assert torch.equal(product(700, 40, 320)[0], want)


def test_no_rows_and_no_vocabulary():
    for vocab, rows in ((0, 3), (3, 0)):
        dz = torch.ones(vocab, rows, dtype=torch.bfloat16)
        out = torch.full((rows, 32), 7.0)
        torch.ops.m2kernels.head_dx(dz, torch.ones(vocab, 32, dtype=torch.bfloat16), out)
        assert (out == 7).all()


def test_a_depth_that_is_not_whole_vectors_is_refused():
    dz, weight = torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(4, 48, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="expected a multiple of 32, got 48"):
        torch.ops.m2kernels.head_dx(dz, weight, torch.empty(3, 48))
