// The body of an instruction-set file: included once by each, compiled with that file's flags.
// Internal linkage and no C++ library header: an inline function compiled for AVX-512 must never
// be the copy that the linker keeps for the others.
#pragma once

#include <stdint.h>

#define M2K_HD __attribute__((always_inline))

namespace {

// exp in double, about 1 ulp, without a branch: 2^n * p(r), |r| <= ln(2)/2, degree 13. Arguments
// are clamped to +-708, far outside what a ratio may be; a NaN passes through.
__attribute__((always_inline)) inline double m2k_exp(double x) {
  constexpr double kLog2e = 1.4426950408889634074;
  constexpr double kLn2High = 6.93147180369123816490e-01;
  constexpr double kLn2Low = 1.90821492927058770002e-10;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  x = x > 708.0 ? 708.0 : x;
  x = x < -708.0 ? -708.0 : x;
  const double t = x * kLog2e + kRound;
  const double n = t - kRound;
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &t, sizeof(bits));
  const uint64_t scale_bits = (bits + 1023) << 52;
  double scale;
  __builtin_memcpy(&scale, &scale_bits, sizeof(scale));
  return p * scale;
}

}  // namespace

#include "cpu_kernels.h"
#include "policy_math.h"

namespace m2k {
namespace {

constexpr int kLanes = 8;   // one AVX-512 register of doubles; the sums keep this many lanes
constexpr int kTile = 64;  // tokens that are staged at a time: 15 KiB, well inside L1

// Structures of arrays, so that the loop over a tile is plain vector code.
struct TileInput {
  double logp[kTile], token_log_ratio[kTile], log_ratio[kTile], advantage[kTile], tis_log[kTile];
  double ref_log[kTile], entropy[kTile], share[kTile];
  double on[kTile];  // live, as 0 or 1
  bool live[kTile];
};

struct TileOutput {
  double term[kTile], via_ratio[kTile], direct[kTile];
  double raw[kNumRaw][kTile];
};

template <class Index>
double load_sequences(const PolicyLossArgs& a, const Index* seq, int64_t begin, int count,
                      TileInput* t) {
  double bad = 0.0;
  for (int l = 0; l < count; ++l) {
    const int64_t i = begin + l;
    if (i > 0 && seq[i] < seq[i - 1]) bad += 1.0;
    t->live[l] = !a.mask || a.mask[i];
    t->advantage[l] = 0.0;
    if (!t->live[l]) continue;
    const int64_t id = a.per_token ? i : static_cast<int64_t>(seq[i]);
    if (id < 0 || id >= a.num_advantages) {
      bad += 1.0;
    } else {
      t->advantage[l] = a.advantage[id];
    }
  }
  for (int l = count; l < kTile; ++l) {
    t->live[l] = false;
    t->advantage[l] = 0.0;
  }
  return bad;
}

// values[l] or 0 where the token is not live: nothing that a masked token holds can leak.
template <class T>
__attribute__((always_inline)) inline void load(const T* values, int count, const bool* live,
                                                double* out) {
  for (int l = 0; l < kTile; ++l) out[l] = 0.0;
  if (!values) return;
  for (int l = 0; l < count; ++l) {
    const double v = values[l];
    out[l] = live[l] ? v : 0.0;
  }
}

// Stages tokens [begin, begin + count); returns the number of bad ids.
double load_tile(const PolicyLossArgs& a, const SequenceScratch& s, int64_t begin, int count,
                 TileInput* t) {
  const double bad =
      a.seq.wide
          ? load_sequences(a, static_cast<const int64_t*>(a.seq.data), begin, count, t)
          : load_sequences(a, static_cast<const int32_t*>(a.seq.data), begin, count, t);
  const auto at = [begin](const auto* p) { return p ? p + begin : p; };
  double old_logp[kTile];
  load(a.logp + begin, count, t->live, t->logp);
  load(a.old_logp + begin, count, t->live, old_logp);
  load(at(a.entropy), count, t->live, t->entropy);
  load(at(a.ref_logp), count, t->live, t->ref_log);
  load(s.tis_log ? nullptr : at(a.rollout_logp), count, t->live, t->tis_log);
  for (int l = 0; l < kTile; ++l) {
    t->token_log_ratio[l] = t->logp[l] - old_logp[l];
    t->log_ratio[l] = t->token_log_ratio[l];
    t->ref_log[l] = a.ref_logp ? t->ref_log[l] - t->logp[l] : 0.0;
    t->tis_log[l] = a.rollout_logp ? old_logp[l] - t->tis_log[l] : 0.0;
    t->share[l] = 1.0;
    t->on[l] = t->live[l] ? 1.0 : 0.0;
  }
  if (s.tis_log) load(at(s.tis_log), count, t->live, t->tis_log);
  if (s.log_ratio) {
    load(at(s.log_ratio), count, t->live, t->log_ratio);
    load(at(s.share), count, t->live, t->share);
  }
  return bad;
}

template <int kKind, int kKl>
void eval_tile(const LossConstants& c, const TileInput& t, TileOutput* out) {
#pragma omp simd
  for (int l = 0; l < kTile; ++l) {
    const TokenInput x = {t.logp[l],    t.token_log_ratio[l], t.log_ratio[l], t.advantage[l],
                          t.tis_log[l], t.ref_log[l],         t.entropy[l],   t.share[l]};
    TokenOutput y;
    eval_token<kKind, kKl>(c, x, &y);
    out->term[l] = y.term;
    out->via_ratio[l] = y.via_ratio;
    out->direct[l] = y.direct;
    for (int k = 0; k < kNumRaw; ++k) out->raw[k][l] = y.raw[k];
  }
}

// sums[lane] += values where live; the lane of a token depends on its place alone. A token that
// is not live was evaluated on zeros, so its values are finite and a product is a safe mask.
void add_lanes(const double* values, const double* on, double* sums) {
  for (int base = 0; base < kTile; base += kLanes) {
    for (int l = 0; l < kLanes; ++l) sums[l] += values[base + l] * on[base + l];
  }
}

void max_lanes(const double* values, const double* on, double* sums) {
  for (int base = 0; base < kTile; base += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const double v = values[base + l] * on[base + l];
      sums[l] = v <= sums[l] ? sums[l] : v;  // a NaN stays
    }
  }
}

void store_gradients(const PolicyLossArgs& a, const SequenceScratch& s, const LossConstants& c,
                     const TileInput& in, const TileOutput& out, int64_t begin, int count) {
  const double factor = -1.0 / a.denom;
  float* grad_logp = a.grad_logp + begin;
  for (int l = 0; l < count; ++l) {
    const double slope = s.via_ratio ? out.direct[l] : out.direct[l] + out.via_ratio[l];
    grad_logp[l] = in.live[l] ? static_cast<float>(slope * factor) : 0.0f;
  }
  if (s.via_ratio) {
    for (int l = 0; l < count; ++l) s.via_ratio[begin + l] = in.live[l] ? out.via_ratio[l] : 0.0;
  }
  if (a.grad_entropy) {
    for (int l = 0; l < count; ++l) {
      const double slope = c.entropy_coef * in.share[l] * factor;
      a.grad_entropy[begin + l] = in.live[l] ? static_cast<float>(slope) : 0.0f;
    }
  }
}

template <int kKind, int kKl>
void policy_block_impl(const PolicyLossArgs& a, const SequenceScratch& s, int64_t begin,
                       int64_t end, double* partial) {
  const LossConstants c = loss_constants(a);
  double sums[kNumPartial][kLanes] = {};
  TileInput in;
  TileOutput out;
  for (int64_t base = begin; base < end; base += kTile) {
    const int count = static_cast<int>(end - base < kTile ? end - base : kTile);
    sums[kRawBadSeq][0] += load_tile(a, s, base, count, &in);
    eval_tile<kKind, kKl>(c, in, &out);
    for (int k = 0; k < kRawBadSeq; ++k) add_lanes(out.raw[k], in.on, sums[k]);
    max_lanes(out.raw[kRawRatioMax], in.on, sums[kRawRatioMax]);
    add_lanes(out.term, in.on, sums[kRawObjective]);
    store_gradients(a, s, c, in, out, base, count);
  }
  for (int k = 0; k < kNumPartial; ++k) {
    double total = sums[k][0];
    for (int l = 1; l < kLanes; ++l) {
      const double v = sums[k][l];
      if (k == kRawRatioMax) {
        total = v <= total ? total : v;
      } else {
        total += v;
      }
    }
    partial[k] = total;
  }
}

template <int kKind>
void policy_block_kind(const PolicyLossArgs& a, const SequenceScratch& s, int64_t begin,
                       int64_t end, double* partial) {
  switch (a.kl) {
    case kKlK1: return policy_block_impl<kKind, kKlK1>(a, s, begin, end, partial);
    case kKlK2: return policy_block_impl<kKind, kKlK2>(a, s, begin, end, partial);
    case kKlK3: return policy_block_impl<kKind, kKlK3>(a, s, begin, end, partial);
    default: return policy_block_impl<kKind, kKlNone>(a, s, begin, end, partial);
  }
}

void policy_block(const PolicyLossArgs& a, const SequenceScratch& s, int64_t begin, int64_t end,
                  double* partial) {
  switch (a.kind) {
    case kGspo: return policy_block_kind<kGspo>(a, s, begin, end, partial);
    case kCispo: return policy_block_kind<kCispo>(a, s, begin, end, partial);
    default: return policy_block_kind<kGrpo>(a, s, begin, end, partial);
  }
}

}  // namespace
}  // namespace m2k
