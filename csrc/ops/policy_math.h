// The policy loss of one token, shared word for word by the CPU and the CUDA kernels. All in
// double: the op reads a few bytes a token, so the arithmetic is free beside its memory traffic.
//
// M2K_HD and m2k_exp come from the including file: CUDA has its own exp, the CPU files bring one
// that their compiler can vectorise.
#pragma once

#include "op_args.h"

namespace m2k {
// Internal linkage: each including file is compiled for another instruction set, and the linker
// must never keep one file's copy for the others.
namespace {

// Log-ratios above this count as this: a ratio stays finite in fp32, so that a zero advantage
// gives an exact zero, never inf * 0. Such a ratio is a constant and has no gradient.
constexpr double kMaxLogRatio = 88.7;
// Weights above this count as this in the effective sample size: its square still fits in fp32.
constexpr double kMaxEssWeight = 1e15;

struct TokenInput {
  double logp;
  double token_log_ratio;  // logp - old_logp
  double log_ratio;        // the same, or its mean over the sequence (gspo)
  double advantage;
  double tis_log;   // old_logp - rollout_logp, or its sum over the sequence; 0 without rollouts
  double ref_log;   // ref_logp - logp; 0 without a reference
  double entropy;   // 0 without entropy
  double share;     // 1, or 1 / live tokens of the sequence (gspo)
};

struct TokenOutput {
  double term;       // this token's part of the objective
  double via_ratio;  // d term / d log_ratio
  double direct;     // d term / d logp that does not pass through the ratio
  double raw[kNumRaw];
};

struct LossConstants {
  double low, high, dual_clip, kl_coef, entropy_coef, tis_cap;
  bool apply_tis;
};

M2K_HD inline LossConstants loss_constants(const PolicyLossArgs& a) {
  LossConstants c;
  c.low = 1.0 - a.clip_low;
  c.high = 1.0 + a.clip_high;
  c.dual_clip = a.dual_clip;
  c.kl_coef = a.kl_coef;
  c.entropy_coef = a.entropy_coef;
  c.tis_cap = a.tis_cap;
  c.apply_tis = a.tis_cap < 1e308;
  return c;
}

template <int kKl>
M2K_HD inline void ref_kl(double ref_log, double* value, double* slope) {
  if (kKl == kKlK1) {
    *value = -ref_log;
    *slope = 1.0;
  } else if (kKl == kKlK2) {
    *value = 0.5 * ref_log * ref_log;
    *slope = -ref_log;
  } else {
    const double e = m2k_exp(ref_log);
    *value = e - ref_log - 1.0;
    *slope = 1.0 - e;
  }
}

M2K_HD inline double ratio(double log_ratio) {
  return m2k_exp(log_ratio > kMaxLogRatio ? kMaxLogRatio : log_ratio);  // a NaN passes
}

template <int kKind, int kKl>
M2K_HD inline void eval_token(const LossConstants& c, const TokenInput& x, TokenOutput* out) {
  const double r = ratio(x.log_ratio);
  const double token_r = kKind == kGspo ? ratio(x.token_log_ratio) : r;
  const double tis_full = ratio(x.tis_log);
  const bool capped = tis_full > c.tis_cap;
  const double tis = capped ? c.tis_cap : tis_full;
  const double weight = (c.apply_tis ? tis : 1.0) * x.share;
  const bool over = r > c.high;
  const bool under = r < c.low;
  bool high = over;
  bool low = under;
  bool dual = false;
  double bound;
  if (kKind == kCispo) {
    bound = over ? c.high : (under ? c.low : r);
    const double scale = weight * bound * x.advantage;
    out->term = scale * x.logp;
    out->via_ratio = 0.0;
    out->direct = scale;
  } else {
    high = over & (x.advantage > 0.0);
    low = under & (x.advantage < 0.0);
    dual = (r > c.dual_clip) & (x.advantage < 0.0);
    bound = high ? c.high : r;
    bound = low ? c.low : bound;
    bound = dual ? c.dual_clip : bound;
    out->term = weight * bound * x.advantage;
    const bool constant = high | low | dual | (x.log_ratio > kMaxLogRatio);
    out->via_ratio = constant ? 0.0 : out->term;
    out->direct = 0.0;
  }
  double kl, kl_slope;
  ref_kl<kKl>(x.ref_log, &kl, &kl_slope);
  // With a zero coefficient an infinite kl or entropy must not turn into a NaN.
  if (kKl != kKlNone) {
    const double coef = c.kl_coef * x.share;
    out->term -= coef * (c.kl_coef != 0.0 ? kl : 0.0);
    out->direct -= coef * (c.kl_coef != 0.0 ? kl_slope : 0.0);
  }
  out->term += c.entropy_coef * x.share * (c.entropy_coef != 0.0 ? x.entropy : 0.0);
  const double w = r * tis > kMaxEssWeight ? kMaxEssWeight : r * tis;
  out->raw[kRawTokens] = 1.0;
  out->raw[kRawClipLow] = low ? 1.0 : 0.0;
  out->raw[kRawClipHigh] = high ? 1.0 : 0.0;
  out->raw[kRawDualClip] = dual ? 1.0 : 0.0;
  out->raw[kRawK1] = -x.token_log_ratio;
  out->raw[kRawK3] = token_r - 1.0 - x.token_log_ratio;
  out->raw[kRawWeight] = w;
  out->raw[kRawWeightSquared] = w * w;
  out->raw[kRawTis] = tis;
  out->raw[kRawTisCapped] = capped ? 1.0 : 0.0;
  out->raw[kRawRefKl] = kl;
  out->raw[kRawEntropy] = x.entropy;
  out->raw[kRawBadSeq] = 0.0;
  out->raw[kRawRatioMax] = r;
}

// sums[kNumPartial] -> stats[kNumStats] and the loss. A bad sequence id makes the loss NaN: there
// is no way to raise from a kernel without a host sync.
M2K_HD inline void finish(const double* sums, double denom, float* stats, float* loss) {
  for (int k = 0; k < kNumRaw; ++k) stats[k] = static_cast<float>(sums[k]);
  const double n = sums[kRawTokens];
  const double inv = n > 0.0 ? 1.0 / n : 0.0;
  const double w2 = sums[kRawWeightSquared];
  float* f = stats + kNumRaw;
  f[0] = static_cast<float>(sums[kRawClipLow] * inv);
  f[1] = static_cast<float>(sums[kRawClipHigh] * inv);
  f[2] = static_cast<float>(sums[kRawDualClip] * inv);
  f[3] = static_cast<float>(sums[kRawK1] * inv);
  f[4] = static_cast<float>(sums[kRawK3] * inv);
  f[5] = static_cast<float>(w2 == 0.0 ? 0.0 : sums[kRawWeight] * sums[kRawWeight] / w2 * inv);
  f[6] = static_cast<float>(sums[kRawTis] * inv);
  f[7] = static_cast<float>(sums[kRawTisCapped] * inv);
  f[8] = static_cast<float>(sums[kRawRefKl] * inv);
  f[9] = static_cast<float>(sums[kRawEntropy] * inv);
  const double nan = __builtin_nan("");
  *loss = static_cast<float>(sums[kRawBadSeq] > 0.0 ? nan : (0.0 - sums[kRawObjective]) / denom);
}

}  // namespace
}  // namespace m2k
