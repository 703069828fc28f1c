// Chooses the instruction set once, and runs the policy loss over fixed blocks of tokens, so that
// sums do not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_kernels.h"

#define M2K_HD
#define m2k_exp std::exp
#include "policy_math.h"

namespace m2k {
namespace {

constexpr int64_t kBlock = 2048;  // tokens a partial sum covers; a multiple of the lanes

const CpuKernels& choose() {
  const char* wanted = std::getenv("M2KERNELS_CPU_ISA");
  const std::string name = wanted ? wanted : "";
  if (name == "baseline") return kBaselineKernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v4 = __builtin_cpu_supports("x86-64-v4");
  const bool v3 = __builtin_cpu_supports("x86-64-v3");
  if (v4 && (name.empty() || name == "avx512")) return kAvx512Kernels;
  if (v3 && (name.empty() || name == "avx2")) return kAvx2Kernels;
#endif
  if (!name.empty()) {
    throw std::runtime_error("M2KERNELS_CPU_ISA is '" + name +
                             "', which this machine cannot run or which does not exist; expected "
                             "baseline, avx2 or avx512, or leave it unset");
  }
  return kBaselineKernels;
}

int64_t index_at(const IndexVector& v, int64_t i) {
  return v.wide ? static_cast<const int64_t*>(v.data)[i] : static_cast<const int32_t*>(v.data)[i];
}

// Runs of equal ids: starts[s] .. starts[s + 1] is the s-th sequence.
std::vector<int64_t> sequence_starts(const PolicyLossArgs& a) {
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < a.num_tokens; ++i) {
    if (i == 0 || index_at(a.seq, i) != index_at(a.seq, i - 1)) starts.push_back(i);
  }
  starts.push_back(a.num_tokens);
  return starts;
}

struct SequenceValues {
  std::vector<double> log_ratio, share, tis_log, via_ratio;
};

void measure_sequence(const PolicyLossArgs& a, int64_t begin, int64_t end, SequenceValues* v) {
  double sum = 0.0, tis = 0.0, live = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    if (a.mask && !a.mask[i]) continue;
    live += 1.0;
    sum += static_cast<double>(a.logp[i]) - a.old_logp[i];
    if (a.rollout_logp) tis += static_cast<double>(a.old_logp[i]) - a.rollout_logp[i];
  }
  const double share = live > 0.0 ? 1.0 / live : 0.0;
  for (int64_t i = begin; i < end; ++i) {
    if (!v->log_ratio.empty()) {
      v->log_ratio[i] = sum * share;
      v->share[i] = share;
    }
    if (!v->tis_log.empty()) v->tis_log[i] = tis;
  }
}

// gspo: the ratio is a mean over the sequence, so each token's slope is the mean of theirs.
void spread_gradient(const PolicyLossArgs& a, int64_t begin, int64_t end, SequenceValues* v) {
  double sum = 0.0;
  for (int64_t i = begin; i < end; ++i) sum += v->via_ratio[i];
  const double slope = sum * v->share[begin] / a.denom;
  for (int64_t i = begin; i < end; ++i) {
    if (!a.mask || a.mask[i]) a.grad_logp[i] = static_cast<float>(a.grad_logp[i] - slope);
  }
}

template <class Fn>
void for_each_sequence(const std::vector<int64_t>& starts, const Fn& fn) {
  const int64_t count = static_cast<int64_t>(starts.size()) - 1;
  torch::stable::parallel_for(0, count, 64, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) fn(starts[s], starts[s + 1]);
  });
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

const Bf16Kernels* bf16_kernels() {
#if defined(__x86_64__)
  static const bool there = __builtin_cpu_supports("avx512bf16");
  if (there && &cpu_kernels() == &kAvx512Kernels) return &kBf16Kernels;
#endif
  return nullptr;
}

void policy_loss_cpu(const PolicyLossArgs& a) {
  const CpuKernels& kernels = cpu_kernels();
  const bool gspo = a.kind == kGspo;
  const bool tis_sequence = a.tis_sequence && a.rollout_logp;
  const int64_t m = a.num_tokens;
  SequenceValues values;
  std::vector<int64_t> starts;
  if ((gspo || tis_sequence) && m > 0) {
    if (gspo) {
      values.log_ratio.resize(m);
      values.share.resize(m);
      values.via_ratio.resize(m);
    }
    if (tis_sequence) values.tis_log.resize(m);
    starts = sequence_starts(a);
    for_each_sequence(starts, [&](int64_t b, int64_t e) { measure_sequence(a, b, e, &values); });
  }
  const SequenceScratch scratch = {gspo ? values.log_ratio.data() : nullptr,
                                   gspo ? values.share.data() : nullptr,
                                   tis_sequence ? values.tis_log.data() : nullptr,
                                   gspo ? values.via_ratio.data() : nullptr};
  const int64_t blocks = (m + kBlock - 1) / kBlock;
  std::vector<double> partial(static_cast<size_t>(blocks) * kNumPartial);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      const int64_t end = (b + 1) * kBlock < m ? (b + 1) * kBlock : m;
      kernels.policy_block(a, scratch, b * kBlock, end, partial.data() + b * kNumPartial);
    }
  });
  double sums[kNumPartial] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const double* p = partial.data() + b * kNumPartial;
    for (int k = 0; k < kNumPartial; ++k) {
      if (k != kRawRatioMax) sums[k] += p[k];
    }
    if (!(p[kRawRatioMax] <= sums[kRawRatioMax])) sums[kRawRatioMax] = p[kRawRatioMax];
  }
  finish(sums, a.denom, a.stats, a.loss);
  if (gspo && m > 0) {
    for_each_sequence(starts, [&](int64_t b, int64_t e) { spread_gradient(a, b, e, &values); });
  }
}

void policy_loss_bwd_cpu(float grad, const float* saved, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = grad * saved[i];
}

}  // namespace m2k
