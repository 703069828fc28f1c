// What each instruction-set file offers, and the scratch that the driver hands to it.
#pragma once

#include "op_args.h"

namespace m2k {

// Per-token values that come from a whole sequence. Null pointers: this loss has no such value.
struct SequenceScratch {
  const double* log_ratio;  // gspo: the sequence's mean log-ratio
  const double* share;      // gspo: 1 / live tokens of the sequence
  const double* tis_log;    // sequence-level TIS: sum of old_logp - rollout_logp
  double* via_ratio;        // gspo, out: d term / d log_ratio of each token
};

// Tokens [begin, end) -> partial[kNumPartial], and their gradients.
using PolicyBlockFn = void (*)(const PolicyLossArgs&, const SequenceScratch&, int64_t begin,
                               int64_t end, double* partial);

struct CpuKernels {
  const char* name;
  PolicyBlockFn policy_block;
};

extern const CpuKernels kBaselineKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

// The kernels for this machine, or for M2KERNELS_CPU_ISA (baseline | avx2 | avx512); throws
// std::runtime_error when that names one this machine cannot run.
const CpuKernels& cpu_kernels();

void policy_loss_cpu(const PolicyLossArgs& args);
void policy_loss_bwd_cpu(float grad, const float* saved, int64_t n, float* out);
void group_advantage_cpu(const GroupAdvantageArgs& args);

}  // namespace m2k
