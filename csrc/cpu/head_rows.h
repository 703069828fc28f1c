// Kernels over logits that are there already, row by row: statistics of vocabulary tiles, their
// merge, the gradient. Included once by each instruction-set file, after policy_block.h (which
// brings m2k_exp).
//
// A tile of 128 logits is staged as float in L1, so that dtypes, bias, cap and temperature are
// dealt with in one place.
#pragma once

#include "cpu_kernels.h"
#include "vector16.h"

namespace m2k {
namespace {

struct alignas(64) Tile {
  float z[kHeadTile];
};

M2K_INLINE float sum16(const F16& v) {
  float lane[kVector];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int half = kVector / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

M2K_INLINE float max16(const F16& v) {
  float lane[kVector];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int half = kVector / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] = lane[l + half] > lane[l] ? lane[l + half] : lane[l];
  }
  return lane[0];
}

// Columns [begin, begin + count) of a row, as float before bias, cap and temperature; 0 after them.
template <class T>
M2K_INLINE void stage(const T* row, int count, Tile* t) {
  if (count == kHeadTile) {
    for (int j = 0; j < kHeadTile; j += kVector) {
      F16 v;
      load16(row + j, &v);
      *(F16*)(t->z + j) = v;
    }
    return;
  }
  for (int j = 0; j < kHeadTile; ++j) t->z[j] = j < count ? widen(row[j]) : 0.0f;
}

// raw -> raw after bias and cap, of `count` columns.
M2K_INLINE void cap_tile(const HeadLogits& a, const float* bias, int count, Tile* t) {
  if (bias) {
    for (int j = 0; j < count; ++j) t->z[j] += bias[j];
  }
  if (a.softcap != 0.0f) {
    for (int j = 0; j < kHeadTile; j += kVector) {
      F16* v = (F16*)(t->z + j);
      F16 y;
      tanh16(*v / a.softcap, &y);
      *v = y * a.softcap;
    }
  }
}

// z of a staged tile. Not inlined: contracted with the subtraction that follows, the gradient's z
// would be rounded differently from the one that the statistics were measured on.
__attribute__((noinline)) void scale_tile(float inverse, Tile* t) {
  for (int j = 0; j < kHeadTile; j += kVector) *(F16*)(t->z + j) *= inverse;
}

M2K_INLINE float inverse_of(const HeadLogits& a, int64_t row) {
  return a.inv_temperatures ? a.inv_temperatures[row] : a.inv_temperature;
}

template <bool kMoment>
M2K_INLINE void tile_sums(const Tile& t, float* top, float* total, float* moment) {
  F16 best = *(const F16*)t.z;
  for (int j = kVector; j < kHeadTile; j += kVector) {
    const F16 v = *(const F16*)(t.z + j);
    best = v > best ? v : best;
  }
  *top = max16(best);
  const float anchor = *top == kNone ? 0.0f : *top;
  F16 sum = {}, weighted = {};
  for (int j = 0; j < kHeadTile; j += kVector) {
    const F16 below = *(const F16*)(t.z + j) - anchor;
    F16 e;
    exp16(below, &e);
    sum += e;
    if (kMoment) weighted += e * (below < -200.0f ? F16{} - 200.0f : below);  // never 0 * inf
  }
  *total = sum16(sum);
  if (kMoment) *moment = sum16(weighted);
}

template <class T, bool kMoment>
void head_stats_rows(const HeadLogits& a, const HeadTileOut& out, int64_t begin, int64_t end) {
  Tile t;
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = static_cast<const T*>(a.data) + row * a.stride;
    const float inverse = inverse_of(a, row);
    for (int64_t base = 0, tile = 0; base < a.columns; base += kHeadTile, ++tile) {
      const int64_t left = a.num_valid - base;
      const int count = left > kHeadTile ? kHeadTile : (left > 0 ? static_cast<int>(left) : 0);
      const int64_t at = row * out.stride + tile;
      if (count == 0) {
        out.top[at] = kNone;
        out.total[at] = 0.0f;
        if (kMoment) out.moment[at] = 0.0f;
        continue;
      }
      stage(logits + base, count, &t);
      cap_tile(a, a.bias ? a.bias + base : nullptr, count, &t);
      if (inverse != 1.0f) scale_tile(inverse, &t);
      for (int j = count; j < kHeadTile; ++j) t.z[j] = kNone;
      const int64_t own = a.target[row] - base;
      if (own >= 0 && own < count) {
        out.z_target[row] = t.z[own];
        t.z[own] = kNone;
      }
      float* moment = kMoment ? out.moment + at : nullptr;
      tile_sums<kMoment>(t, out.top + at, out.total + at, moment);
    }
  }
}

void head_stats(const HeadLogits& a, const HeadTileOut& out, int64_t begin, int64_t end) {
  if (a.bf16) {
    return out.moment ? head_stats_rows<uint16_t, true>(a, out, begin, end)
                      : head_stats_rows<uint16_t, false>(a, out, begin, end);
  }
  return out.moment ? head_stats_rows<float, true>(a, out, begin, end)
                    : head_stats_rows<float, false>(a, out, begin, end);
}

// Eight lanes, whatever the count: tiles without mass at the end change no bit.
void head_merge(const HeadTiles& t, double* sums) {
  constexpr int kSumLanes = 8;
  double sum[kSumLanes] = {}, weighted[kSumLanes] = {};
  for (int64_t base = 0; base < t.count; base += kSumLanes) {
    const int count = t.count - base < kSumLanes ? static_cast<int>(t.count - base) : kSumLanes;
    double top[kSumLanes], total[kSumLanes], moment[kSumLanes];
    for (int l = 0; l < kSumLanes; ++l) {
      const bool there = l < count && t.total[base + (l < count ? l : 0)] != 0.0f;
      const int64_t i = base + (l < count ? l : 0);
      top[l] = there ? t.top[i] - t.anchor : 0.0;
      total[l] = there ? t.total[i] : 0.0;
      moment[l] = there && t.moment ? t.moment[i] : 0.0;
    }
    for (int l = 0; l < kSumLanes; ++l) {
      const double scale = top[l] < -700.0 ? 0.0 : m2k_exp(top[l]);
      sum[l] += scale * total[l];
      weighted[l] += scale * (moment[l] + top[l] * total[l]);
    }
  }
  sums[0] = sums[1] = 0.0;
  for (int l = 0; l < kSumLanes; ++l) {
    sums[0] += sum[l];
    sums[1] += t.moment ? weighted[l] : 0.0;
  }
}

// 1 - exp(x) for x <= 0, without cancellation.
inline double one_minus_exp(double x) {
  return x > -1e-4 ? -x * (1.0 + x * (0.5 + x * (1.0 / 6.0))) : 1.0 - m2k_exp(x);
}

struct RowGrad {
  float log_norm, log_norm_low, inverse;
  float constant;  // dz = p (constant - slope * log p)
  float slope;
};

template <class T>
M2K_INLINE void grad_tile(const HeadLogits& a, const RowGrad& g, const T* logits, int64_t base,
                          int count, T* out) {
  Tile t, flat, before;
  stage(logits, count, &t);
  cap_tile(a, a.bias ? a.bias + base : nullptr, count, &t);
  if (a.softcap != 0.0f) before = t;
  if (g.inverse != 1.0f) scale_tile(g.inverse, &t);
  for (int j = 0; j < kHeadTile; j += kVector) {
    const F16 log_p = (*(const F16*)(t.z + j) - g.log_norm) - g.log_norm_low;
    F16 p;
    exp16(log_p, &p);
    F16 dz = p * (g.constant - g.slope * (log_p < -200.0f ? F16{} - 200.0f : log_p));
    if (a.softcap != 0.0f) {
      const F16 share = *(const F16*)(before.z + j) / a.softcap;
      dz *= 1.0f - share * share;
    }
    *(F16*)(flat.z + j) = dz;
  }
  if (count == kHeadTile) {
    for (int j = 0; j < kHeadTile; j += kVector) store16(*(const F16*)(flat.z + j), out + j);
    return;
  }
  T narrow[kHeadTile];
  for (int j = 0; j < kHeadTile; j += kVector) store16(*(const F16*)(flat.z + j), narrow + j);
  for (int j = 0; j < count; ++j) out[j] = narrow[j];
}

// The target's own gradient: 1 - p is taken from logp, exact for confident tokens too.
template <class T>
void grad_target(const HeadLogits& a, const HeadGradArgs& args, int64_t row, float inverse,
                 float raw, int64_t column, T* out) {
  const double logp = args.logp[row];
  double dz = args.grad_logp[row] * one_minus_exp(logp);
  if (args.grad_entropy && args.grad_entropy[row] != 0.0f && logp > -700.0) {
    dz -= args.grad_entropy[row] * m2k_exp(logp) * (logp + args.entropy[row]);
  }
  dz *= inverse;
  if (a.softcap != 0.0f) {
    Tile t;
    for (int j = 0; j < kHeadTile; ++j) t.z[j] = raw;
    F16 y;
    tanh16(*(const F16*)t.z / a.softcap, &y);
    dz *= 1.0 - static_cast<double>(y[0]) * y[0];
  }
  Tile t;
  for (int j = 0; j < kVector; ++j) t.z[j] = static_cast<float>(dz);
  T narrow[kVector];
  store16(*(const F16*)t.z, narrow);
  out[column] = narrow[0];
}

template <class T>
void head_grad_rows(const HeadLogits& a, const HeadGradArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = static_cast<const T*>(a.data) + row * a.stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    const float to_logp = args.grad_logp[row];
    const float to_entropy = args.grad_entropy ? args.grad_entropy[row] : 0.0f;
    const int64_t valid = to_logp == 0.0f && to_entropy == 0.0f ? 0 : a.num_valid;
    RowGrad g;
    g.log_norm = args.log_norm[row];
    g.log_norm_low = args.log_norm_low[row];
    g.inverse = inverse_of(a, row);
    g.constant = -to_logp * g.inverse;
    if (to_entropy != 0.0f) g.constant -= to_entropy * args.entropy[row] * g.inverse;
    g.slope = to_entropy * g.inverse;
    const int64_t own = a.target[row];
    const bool here = own >= 0 && own < valid;
    float raw = here ? widen(logits[own]) : 0.0f;  // before `out`, which may be the logits
    if (here && a.bias) raw += a.bias[own];
    for (int64_t base = 0; base < valid; base += kHeadTile) {
      const int count = valid - base < kHeadTile ? static_cast<int>(valid - base) : kHeadTile;
      grad_tile(a, g, logits + base, base, count, out + base);
    }
    for (int64_t j = valid; j < a.columns; ++j) out[j] = 0;
    if (here) grad_target(a, args, row, g.inverse, raw, own, out);
  }
}

void head_grad(const HeadLogits& a, const HeadGradArgs& args, int64_t begin, int64_t end) {
  return a.bf16 ? head_grad_rows<uint16_t>(a, args, begin, end)
                : head_grad_rows<float>(a, args, begin, end);
}

}  // namespace
}  // namespace m2k
