// dX of the LM head with AVX-512's bf16 dot products. Included once, by the file that is compiled
// for them.
//
// Both operands lie along the depth of a product, the vocabulary being outermost, while an
// instruction wants two neighbours of it in one lane: a panel of the weight is interleaved in pairs
// on its way into the L1 cache, which costs little as all rows go over it there, and dz once for
// each stretch of the vocabulary.
#pragma once

#include <immintrin.h>

#include "cpu_kernels.h"
#include "vector16.h"

namespace m2k {
namespace {

constexpr int kDotRows = 6;  // of dX x vectors of columns whose sums stay in registers
constexpr int kDotVectors = 4;
static_assert(kDotRows == kDotBlockRows && kDotVectors * kVector == kDotColumns &&
              kDotDepth % 2 == 0);

// Pairs (entry 2k, 2k + 1) of a stretch of the vocabulary; past its end they are zero.
struct alignas(64) DotPanel {
  uint32_t pairs[kDotDepth / 2 * kDotColumns];
};

// Columns [0, kNumVectors * 16) of `depth` rows from `weight` on.
template <int kNumVectors>
M2K_INLINE void interleave_weight(const uint16_t* weight, int64_t stride, int64_t depth,
                                  int64_t ahead, uint32_t* panel) {
  static_assert(kNumVectors % 2 == 0, "two vectors of pairs come of one vector of entries");
  alignas(64) static const uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t k = 0; k < depth; k += 2) {
    const uint16_t* first = weight + k * stride;
    const bool two = k + 1 < depth;
    for (int v = 0; v < kNumVectors; v += 2) {
      const __m512i a = _mm512_loadu_si512(first + v * kVector);
      const __m512i b =
          two ? _mm512_loadu_si512(first + stride + v * kVector) : _mm512_setzero_si512();
      uint32_t* to = panel + k / 2 * kDotColumns + v * kVector;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(to + kVector, _mm512_permutex2var_epi16(a, high, b));
      if (ahead) {
        _mm_prefetch(reinterpret_cast<const char*>(first + v * kVector + ahead), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(first + stride + v * kVector + ahead),
                     _MM_HINT_T1);
      }
    }
  }
}

// dz [depth, rows] -> [blocks of kDotRows, depth / 2, kDotRows] pairs; of rows past the last they
// are zero.
M2K_INLINE void interleave_dz(const uint16_t* dz, int64_t stride, int64_t depth, int64_t rows,
                              uint32_t* pairs) {
  const int64_t steps = (depth + 1) / 2;
  uint32_t line[16 * kDotRows];
  for (int64_t row = 0; row < rows; row += 16 * kDotRows) {
    const int64_t count = rows - row < 16 * kDotRows ? rows - row : 16 * kDotRows;
    for (int64_t m = count; m < 16 * kDotRows; ++m) line[m] = 0;
    for (int64_t k = 0; k < steps; ++k) {
      const uint16_t* first = dz + 2 * k * stride + row;
      const uint16_t* second = first + stride;
      if (2 * k + 1 < depth) {
        for (int64_t m = 0; m < count; ++m)
          line[m] = first[m] | static_cast<uint32_t>(second[m]) << 16;
      } else {
        for (int64_t m = 0; m < count; ++m) line[m] = first[m];
      }
      uint32_t* to = pairs + k * kDotRows;
      for (int64_t m = 0; m < count; m += kDotRows, to += steps * kDotRows) {
        __builtin_memcpy(to, line + m, sizeof(uint32_t) * kDotRows);
      }
    }
    pairs += 16 * kDotRows * steps;
  }
}

// out (+)= dz^T W for kNumRows rows and kNumVectors vectors of columns.
template <int kNumRows, int kNumVectors>
M2K_INLINE void dot_block(const uint32_t* dz, const uint32_t* panel, int64_t steps, bool add,
                          float* out, int64_t out_stride) {
  __m512 sum[kNumRows][kNumVectors];
  for (int m = 0; m < kNumRows; ++m) {
    for (int v = 0; v < kNumVectors; ++v) sum[m][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < steps; ++k) {
    __m512bh w[kNumVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kNumVectors; ++v) {
      w[v] = (__m512bh)_mm512_load_si512(panel + k * kDotColumns + v * kVector);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kNumRows; ++m) {
      const __m512bh z = (__m512bh)_mm512_set1_epi32(static_cast<int>(dz[k * kDotRows + m]));
#pragma GCC unroll 8
      for (int v = 0; v < kNumVectors; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], z, w[v]);
    }
  }
  for (int m = 0; m < kNumRows; ++m) {
    for (int v = 0; v < kNumVectors; ++v) {
      float* to = out + m * out_stride + v * kVector;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[m][v]) : sum[m][v]);
    }
  }
}

template <int kNumVectors>
M2K_INLINE void dot_columns(const uint32_t* dz, const uint32_t* panel, int64_t steps, int64_t rows,
                            bool add, float* out, int64_t out_stride) {
  for (; rows > 0; rows -= kDotRows, dz += steps * kDotRows, out += kDotRows * out_stride) {
    switch (rows < kDotRows ? rows : kDotRows) {
      case 1: dot_block<1, kNumVectors>(dz, panel, steps, add, out, out_stride); break;
      case 2: dot_block<2, kNumVectors>(dz, panel, steps, add, out, out_stride); break;
      case 3: dot_block<3, kNumVectors>(dz, panel, steps, add, out, out_stride); break;
      case 4: dot_block<4, kNumVectors>(dz, panel, steps, add, out, out_stride); break;
      case 5: dot_block<5, kNumVectors>(dz, panel, steps, add, out, out_stride); break;
      default: dot_block<kDotRows, kNumVectors>(dz, panel, steps, add, out, out_stride);
    }
  }
}

// Strips [begin, end) of kDotColumns columns, one stretch of the vocabulary after another. Scratch:
// see HeadDotFn.
void head_dx_dot(const HeadDot& a, uint32_t* scratch, int64_t begin, int64_t end) {
  DotPanel panel;
  for (int64_t v = 0; v < a.vocab; v += kDotDepth) {
    const int64_t depth = a.vocab - v < kDotDepth ? a.vocab - v : kDotDepth;
    const bool more = v + 2 * kDotDepth <= a.vocab;  // the next stretch is a whole one
    interleave_dz(a.dz + v * a.dz_stride, a.dz_stride, depth, a.rows, scratch);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t column = strip * kDotColumns;
      const uint16_t* weight = a.weight + v * a.weight_stride + column;
      const bool whole = a.depth - column >= kDotColumns;
      const bool next = strip + 1 < end && a.depth - column >= 2 * kDotColumns;
      const int64_t ahead = next ? kDotColumns
                            : more && strip + 1 == end
                                ? kDotDepth * a.weight_stride + (begin - strip) * kDotColumns
                                : 0;
      float* out = a.out + column;
      const int64_t steps = (depth + 1) / 2;
      if (whole) {
        interleave_weight<kDotVectors>(weight, a.weight_stride, depth, ahead, panel.pairs);
        dot_columns<kDotVectors>(scratch, panel.pairs, steps, a.rows, v > 0, out, a.out_stride);
      } else {
        interleave_weight<kDotVectors / 2>(weight, a.weight_stride, depth, ahead, panel.pairs);
        dot_columns<kDotVectors / 2>(scratch, panel.pairs, steps, a.rows, v > 0, out, a.out_stride);
      }
    }
  }
}

}  // namespace
}  // namespace m2k
