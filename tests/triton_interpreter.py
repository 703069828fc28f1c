"""Makes bfloat16 trustworthy in Triton's interpreter (3.6 to 3.9): without this it is silently wrong.

The interpreter keeps bfloat16 as uint16 and hands it to numpy, which then does integer arithmetic on
the bits; its own float32 -> bfloat16 conversion does not round to nearest even. Here a bfloat16
operand is widened to float32 before numpy sees it, a bfloat16 result is rounded as torch and the GPU
round, and what is not mended (reductions, scans, atomics) raises: kernels reduce in float32.

A dot is summed in float64 and rounded once. numpy's float32 product of a row depends on where in the
block it stands with some of OpenBLAS's kernels (OPENBLAS_CORETYPE=Haswell), where the GPU's does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

MARK = "BF16_IS_MENDED"


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 -> float32 of the same value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bits of bfloat16, to nearest even; every NaN becomes torch's, 0x7fc0 with its sign."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def mend() -> None:
    """Patch the interpreter of the installed Triton, once; before any kernel is launched."""
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, MARK, False):
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(x: Any) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def widen(x: Any) -> Any:
        return handle(bf16_to_f32(x.data), tl.float32) if is_bf16(x) else x

    def in_float32(method: Callable[..., Any], operands: int) -> Callable[..., Any]:
        """Run `method` on widened operands; a float32 result of bfloat16 ones is rounded back."""

        def mended(self: Any, *args: Any) -> Any:
            if not any(map(is_bf16, args[:operands])):
                return method(self, *args)
            result = method(self, *map(widen, args[:operands]), *args[operands:])
            if result.data.dtype == np.float32:
                return handle(f32_to_bf16(result.data), tl.bfloat16)
            return result  # a comparison

        return mended

    plain_cast, plain_convert, plain_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if is_bf16(src) and dst_type.scalar == tl.bfloat16:
            return src
        if is_bf16(src):
            src = widen(src)
            return src if dst_type.scalar == tl.float32 else plain_cast(self, src, dst_type)
        if dst_type.scalar == tl.bfloat16:
            return handle(f32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    def convert(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if is_bf16(src) or dst_type.scalar == tl.bfloat16:
            if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
                raise NotImplementedError("rounding bfloat16 towards zero is not mended")
            return cast(self, src, dst_type)
        return plain_convert(self, src, dst_type, rounding_mode)

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if is_bf16(d):
            raise NotImplementedError("a dot that accumulates in bfloat16 is not mended")
        left, right = widen(a).data, widen(b).data
        if not {left.dtype, right.dtype} <= {np.dtype(np.float16), np.dtype(np.float32)}:
            return plain_dot(self, a, b, d, *options)
        product = np.matmul(left.astype(np.float64), right.astype(np.float64))
        return handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def check_tensor(self: Any, inputs: Any) -> None:
        plain_check(self, inputs)
        if any(is_bf16(x.handle) for x in inputs):
            raise TypeError("reduce or scan of bfloat16: cast to float32 first")

    plain_check = interpreter.ReduceScanOpInterface.check_tensor
    interpreter.ReduceScanOpInterface.check_tensor = check_tensor
    for name, operands in (("binary_op", 2), ("unary_op", 1), ("create_fma", 3), ("create_rsqrt", 1)):
        setattr(builder, name, in_float32(getattr(builder, name), operands))
    builder.create_idiv = in_float32(builder.create_idiv, 2)
    builder.create_clampf = in_float32(builder.create_clampf, 3)
    builder.cast_impl = cast
    builder.create_fp_to_fp = convert
    builder.create_dot = dot
    setattr(interpreter, MARK, True)
