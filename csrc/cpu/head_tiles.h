// The LM head's GEMM with its statistics, and the gradient of the logits it kept. Included once by
// each instruction-set file.
//
// The chunk's rows are vector lanes, the vocabulary runs down: weights are broadcast straight from
// their rows, so the large operand is never packed, and a tile's statistics are sums over registers
// with no reduction across lanes. A block of 128 logits x 48 rows stays in L1 between the GEMM and
// its statistics. As each logit is its own chain of products, it is the same to the bit whatever
// the other rows, the chunk or the shard.
#pragma once

#include "cpu_kernels.h"
#include "vector16.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace m2k {
namespace {

#if defined(__AVX512F__)
constexpr int kWeights = 8;  // vocabulary entries x groups whose sums stay in registers
constexpr int kGroups = 3;
#elif defined(__AVX2__)
constexpr int kWeights = 4;
constexpr int kGroups = 1;
#else
constexpr int kWeights = 2;
constexpr int kGroups = 1;
#endif
constexpr int kBlockLanes = kGroups * kVector;
constexpr int64_t kDepthBlock = 512;  // products in one chain; shorter chains, smaller errors

static_assert(kHeadTile % kWeights == 0, "a tile is whole register blocks");

// Logits of one tile for some groups: [kHeadTile][kBlockLanes], of which kNumGroups are in use.
struct alignas(64) Block {
  float z[kHeadTile * kBlockLanes];
};

// out[m] (+)= sum over k of w[m][k w_step] h[g][k h_step], for kWeights rows and some groups of lanes.
template <int kNumGroups>
M2K_INLINE void products(const float* const* w, int64_t w_step, const float* h, int64_t h_step,
                         int64_t group_stride, int64_t count, bool add, float* const* out) {
  F16 sum[kWeights][kNumGroups] = {};
  const float* rows[kWeights];
  for (int m = 0; m < kWeights; ++m) rows[m] = w[m];
  for (int64_t k = 0; k < count; ++k) {
    F16 x[kNumGroups];
#pragma GCC unroll 8
    for (int g = 0; g < kNumGroups; ++g) x[g] = *(const F16u*)(h + g * group_stride + k * h_step);
#pragma GCC unroll 16
    for (int m = 0; m < kWeights; ++m) {
      const float weight = rows[m][k * w_step];
#pragma GCC unroll 8
      for (int g = 0; g < kNumGroups; ++g) sum[m][g] += x[g] * weight;
    }
  }
  for (int m = 0; m < kWeights; ++m) {
    for (int g = 0; g < kNumGroups; ++g) {
      F16u* to = (F16u*)(out[m] + g * kVector);
      *to = add ? *to + sum[m][g] : sum[m][g];
    }
  }
}

struct FloatGemm {
  using Element = float;

  template <int kNumGroups>
  static M2K_INLINE void multiply(const float* const* w, const float* h, int64_t group_stride,
                                  int64_t begin, int64_t end, float* z) {
    const float* from[kWeights];
    float* to[kWeights];
    for (int m = 0; m < kWeights; ++m) {
      from[m] = w[m] + begin;
      to[m] = z + m * kBlockLanes;
    }
    products<kNumGroups>(from, 1, h + begin * kVector, kVector, group_stride, end - begin,
                         begin > 0, to);
  }
};

#if defined(__AVX512BF16__)
// Products of pairs: two elements of depth at a time, so a lane holds two.
struct Bf16Gemm {
  using Element = uint16_t;

  template <int kNumGroups>
  static M2K_INLINE void multiply(const uint16_t* const* w, const uint16_t* h,
                                  int64_t group_stride, int64_t begin, int64_t end, float* z) {
    __m512 sum[kWeights][kNumGroups];
    const uint16_t* rows[kWeights];
    for (int m = 0; m < kWeights; ++m) {
      rows[m] = w[m];
      for (int g = 0; g < kNumGroups; ++g) sum[m][g] = _mm512_setzero_ps();
    }
    for (int64_t k = begin; k < end; k += 2) {
      __m512bh x[kNumGroups];
#pragma GCC unroll 8
      for (int g = 0; g < kNumGroups; ++g) {
        x[g] = (__m512bh)_mm512_load_si512(h + g * group_stride + k * kVector);
      }
#pragma GCC unroll 16
      for (int m = 0; m < kWeights; ++m) {
        int32_t pair;
        __builtin_memcpy(&pair, rows[m] + k, sizeof(pair));
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
        for (int g = 0; g < kNumGroups; ++g) {
          sum[m][g] = _mm512_dpbf16_ps(sum[m][g], x[g], weight);
        }
      }
    }
    for (int m = 0; m < kWeights; ++m) {
      for (int g = 0; g < kNumGroups; ++g) {
        F16* to = (F16*)(z + m * kBlockLanes + g * kVector);
        *to = begin > 0 ? *to + (F16)sum[m][g] : (F16)sum[m][g];
      }
    }
  }
};
#endif

// Logits of `count` entries from `weight` on, for kNumGroups groups from `group` on.
template <class Gemm, int kNumGroups>
void multiply_block(const HeadGemm& a, const typename Gemm::Element* weight, int64_t stride,
                    int count, int64_t group, Block* block) {
  using Element = typename Gemm::Element;
  const Element* hidden = static_cast<const Element*>(a.hidden) + group * a.depth * kVector;
  for (int first = 0; first < count; first += kWeights) {
    const Element* rows[kWeights];
    for (int m = 0; m < kWeights; ++m) {  // past the end: the last row again, never looked at
      const int row = first + m < count ? first + m : count - 1;
      rows[m] = weight + row * stride;
    }
    for (int64_t k = 0; k < a.depth; k += kDepthBlock) {
      const int64_t end = k + kDepthBlock < a.depth ? k + kDepthBlock : a.depth;
      Gemm::template multiply<kNumGroups>(rows, hidden, a.depth * kVector, k, end,
                                          block->z + first * kBlockLanes);
    }
  }
}

// z of a vector of raw logits, before the temperature.
M2K_INLINE void cap16(const float* bias, int64_t entry, float softcap, F16* z) {
  if (bias) *z += bias[entry];
  if (softcap != 0.0f) {
    F16 y;
    tanh16(*z / softcap, &y);
    *z = y * softcap;
  }
}

// Raw logits of a group -> z, in place. Not inlined, nor is its twin in the gradient: contracted
// with the subtraction that follows, the two would be rounded differently.
__attribute__((noinline)) void settle_group(const HeadGemm& a, int64_t base, int count, int64_t lane,
                                            float* z) {
  const F16 inverse = *(const F16*)(a.inverse + lane);
  for (int v = 0; v < count; ++v) {
    F16* at = (F16*)(z + v * kBlockLanes);
    F16 x = *at;
    cap16(a.bias, base + v, a.softcap, &x);
    *at = x * inverse;
  }
}

// Statistics of a group's z [count, 16 lanes]; the target is taken out first.
template <bool kMoment>
M2K_INLINE void measure_group(const HeadGemm& a, int64_t tile, int count, int64_t lane, float* z) {
  const int64_t base = tile * kHeadTile;
  for (int l = 0; l < kVector; ++l) {
    const int64_t own = a.target[lane + l] - base;
    if (own < 0 || own >= count) continue;
    float* at = z + own * kBlockLanes + l;
    a.z_target[lane + l] = *at;
    *at = kNone;
  }
  F16 top = F16{} + kNone;
  for (int v = 0; v < count; ++v) {
    const F16 x = *(const F16*)(z + v * kBlockLanes);
    top = x > top ? x : top;
  }
  const F16 anchor = top == kNone ? F16{} : top;
  constexpr int kChains = 8;  // short sums are exact sums
  F16 sum[kChains] = {}, weighted[kChains] = {};
  for (int first = 0; first < count; first += kChains) {
    for (int c = 0; c < kChains; ++c) {
      if (first + c >= count) break;
      const F16 below = *(const F16*)(z + (first + c) * kBlockLanes) - anchor;
      F16 e;
      exp16(below, &e);
      sum[c] += e;
      if (kMoment) weighted[c] += e * (below < -200.0f ? F16{} - 200.0f : below);  // never 0 * inf
    }
  }
  const int64_t at = tile * a.stride + lane;
  *(F16u*)(a.top + at) = top;
  for (int half = kChains / 2; half > 0; half /= 2) {
    for (int c = 0; c < half; ++c) {
      sum[c] += sum[c + half];
      weighted[c] += weighted[c + half];
    }
  }
  *(F16u*)(a.total + at) = sum[0];
  if (kMoment) *(F16u*)(a.moment + at) = weighted[0];
}

template <class Gemm, int kNumGroups>
void tile_groups(const HeadGemm& a, const typename Gemm::Element* weight, int64_t stride,
                 int64_t tile, int64_t group, Block* block) {
  const int64_t base = tile * kHeadTile;
  const int64_t left = a.vocab - base;
  const int count = left < kHeadTile ? static_cast<int>(left) : kHeadTile;
  multiply_block<Gemm, kNumGroups>(a, weight, stride, count, group, block);
  if (a.kept) {
    for (int v = 0; v < count; ++v) {
      float* to = a.kept + (base + v) * a.stride + group * kVector;
      for (int l = 0; l < kNumGroups * kVector; l += kVector) {
        *(F16u*)(to + l) = *(const F16*)(block->z + v * kBlockLanes + l);
      }
    }
  }
  if (!a.top) return;
  const int64_t real = a.num_valid - base;
  const int valid = real < count ? (real > 0 ? static_cast<int>(real) : 0) : count;
  for (int g = 0; g < kNumGroups; ++g) {
    float* z = block->z + g * kVector;
    const int64_t lane = (group + g) * kVector;
    settle_group(a, base, valid, lane, z);
    if (a.moment) {
      measure_group<true>(a, tile, valid, lane, z);
    } else {
      measure_group<false>(a, tile, valid, lane, z);
    }
  }
}

// All groups of a tile, in blocks of at most kGroups and of nearly equal size.
template <class Gemm>
void tile_rows(const HeadGemm& a, const typename Gemm::Element* weight, int64_t stride,
               int64_t tile, Block* block) {
  int64_t blocks = (a.groups + kGroups - 1) / kGroups;
  for (int64_t group = 0; group < a.groups; --blocks) {
    const int64_t take = (a.groups - group + blocks - 1) / blocks;
    if (take == 1) {
      tile_groups<Gemm, 1>(a, weight, stride, tile, group, block);
    } else if (take == 2) {
      tile_groups<Gemm, kGroups < 2 ? 1 : 2>(a, weight, stride, tile, group, block);
    } else {
      tile_groups<Gemm, kGroups>(a, weight, stride, tile, group, block);
    }
    group += take;
  }
}

[[maybe_unused]] void head_tiles(const HeadGemm& a, float* scratch, int64_t begin, int64_t end) {
  Block block;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t base = tile * kHeadTile;
    if (!a.weight_bf16) {
      const float* weight = static_cast<const float*>(a.weight) + base * a.weight_stride;
      tile_rows<FloatGemm>(a, weight, a.weight_stride, tile, &block);
      continue;
    }
    for (int64_t v = base; v < a.vocab && v < base + kHeadTile; ++v) {
      const uint16_t* from = static_cast<const uint16_t*>(a.weight) + v * a.weight_stride;
      float* to = scratch + (v - base) * a.depth;
      for (int64_t k = 0; k < a.depth; ++k) to[k] = widen(from[k]);
    }
    tile_rows<FloatGemm>(a, scratch, a.depth, tile, &block);
  }
}

#if defined(__AVX512BF16__)
[[maybe_unused]] void head_tiles_dot(const HeadGemm& a, float*, int64_t begin, int64_t end) {
  Block block;
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint16_t* weight = static_cast<const uint16_t*>(a.weight) + tile * kHeadTile * a.weight_stride;
    tile_rows<Bf16Gemm>(a, weight, a.weight_stride, tile, &block);
  }
}
#endif

// One vector of z, and of the slope of the cap. See settle_group.
__attribute__((noinline)) void settle_lanes(const HeadLaneGrad& a, int64_t entry, int64_t lane,
                                            float* z, float* slope) {
  const float* row = a.kept + entry * a.stride;
  F16 x;
  if (a.source) {
    float gathered[kVector];
    for (int l = 0; l < kVector; ++l) gathered[l] = row[a.source[lane + l]];
    __builtin_memcpy(&x, gathered, sizeof(x));
  } else {
    x = *(const F16u*)(row + lane);
  }
  cap16(a.bias, entry, a.softcap, &x);
  if (a.softcap != 0.0f) {
    const F16 share = x / a.softcap;
    *(F16*)slope = 1.0f - share * share;
  }
  *(F16*)z = x * *(const F16u*)(a.inverse + lane);
}

// Lanes move to the front in ascending order and a result is no wider than a logit, so writing
// never overtakes reading within a row.
template <class T>
void grad_lanes(const HeadLaneGrad& a, int64_t begin, int64_t end) {
  alignas(64) float z[kVector], slope[kVector];
  for (int64_t v = begin; v < end; ++v) {
    T* out = static_cast<T*>(a.out) + v * a.out_stride;
    for (int64_t lane = 0; lane < a.lanes; lane += kVector) {
      if (v >= a.num_valid) {
        store16(F16{}, out + lane);
        continue;
      }
      settle_lanes(a, v, lane, z, slope);
      const F16 log_p = (*(const F16*)z - *(const F16u*)(a.log_norm + lane)) -
                        *(const F16u*)(a.log_norm_low + lane);
      F16 p;
      exp16(log_p, &p);
      const F16 bounded = log_p < -200.0f ? F16{} - 200.0f : log_p;  // never 0 * inf
      F16 dz = p * (*(const F16u*)(a.constant + lane) - *(const F16u*)(a.slope + lane) * bounded);
      if (a.softcap != 0.0f) dz *= *(const F16*)slope;
      store16(dz, out + lane);
    }
  }
}

[[maybe_unused]] void head_lanes(const HeadLaneGrad& a, int64_t begin, int64_t end) {
  return a.out_bf16 ? grad_lanes<uint16_t>(a, begin, end) : grad_lanes<float>(a, begin, end);
}

}  // namespace
}  // namespace m2k
