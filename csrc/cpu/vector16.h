// Sixteen-lane vectors for the LM head's kernels, gcc's own, so that every instruction set computes
// the same in the same order. Included by instruction-set files alone: internal linkage, no C++
// library header (see policy_block.h).
#pragma once

#include <stdint.h>

#define M2K_INLINE __attribute__((always_inline)) inline

namespace m2k {
namespace {

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef F16 F16u __attribute__((aligned(4)));  // unaligned memory
typedef H16 H16u __attribute__((aligned(2)));

constexpr int kVector = 16;
constexpr float kNone = -__builtin_inff();  // z of a column without mass

// exp of x <= 88 within 1.1 ulp (2^n p(r), |r| <= ln(2) / 2, a minimax p of degree 6); below -87
// exactly 0. A NaN passes through.
M2K_INLINE void exp16(const F16& x, F16* out) {
  const F16 t = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const F16 n = t - 12582912.0f;
  const F16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F16 q = r * 1.3950538542e-3f + 8.3689180625e-3f;
  q = q * r + 4.1666205091e-2f;
  q = q * r + 1.6666518601e-1f;
  q = q * r + 5.0000000954e-1f;
  const F16 p = (q * r) * r + r + 1.0f;
  const I16 scale = (I16)t << 23;  // the low bits of t are n
  const F16 value = (F16)((I16)p + scale);
  *out = x < -87.0f ? F16{} : value;
}

// tanh within 2 ulp: an odd polynomial near 0, else from exp.
M2K_INLINE void tanh16(const F16& x, F16* out) {
  const F16 a = x < 0.0f ? -x : x;
  const F16 s = x * x;
  F16 q = s * -5.6793038404e-3f + 2.0618121817e-2f;
  q = q * s + -5.3733999687e-2f;
  q = q * s + 1.3331383642e-1f;
  q = q * s + -3.3333280219e-1f;
  const F16 near = x + x * (s * q);
  F16 e;
  exp16(-2.0f * (a > 20.0f ? F16{} + 20.0f : a), &e);
  const F16 far = (1.0f - e) / (1.0f + e);
  *out = a < 0.625f ? near : (x < 0.0f ? -far : far);
}

M2K_INLINE void load16(const float* p, F16* out) { *out = *(const F16u*)p; }

M2K_INLINE void load16(const uint16_t* p, F16* out) {
  const H16 half = *(const H16u*)p;
  *out = (F16)(__builtin_convertvector(half, I16) << 16);
}

M2K_INLINE void store16(const F16& v, float* p) { *(F16u*)p = v; }

// Rounds to nearest, ties to even; a NaN stays one.
M2K_INLINE void store16(const F16& v, uint16_t* p) {
  const U16 bits = (U16)v;
  const U16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U16 chosen = v == v ? rounded : U16{} + 0x7fc0;
  *(H16u*)p = __builtin_convertvector(chosen, H16);
}

M2K_INLINE float widen(float x) { return x; }

M2K_INLINE float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof(out));
  return out;
}

}  // namespace
}  // namespace m2k
