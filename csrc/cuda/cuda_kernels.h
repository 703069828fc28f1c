// Launchers of the CUDA kernels. Plain pointers and a stream: no torch in the .cu files.
#pragma once

#include <stdint.h>

#include "op_args.h"

namespace m2k {

// Doubles of scratch that policy_loss_sm90 needs for this many tokens.
int64_t policy_loss_scratch(int64_t num_tokens);

// Each returns a cudaError_t (0 is success); nothing synchronises.
int policy_loss_sm90(const PolicyLossArgs& args, double* scratch, void* stream);
int policy_loss_bwd_sm90(const float* grad, const float* logp, int64_t m, float* logp_out,
                         const float* entropy, int64_t e, float* entropy_out, void* stream);
int group_advantage_sm90(const GroupAdvantageArgs& args, void* stream);
const char* cuda_error_text(int code);

// CUDART_VERSION of the runtime that is linked in: 13000 for 13.0.
int cuda_runtime_version();

}  // namespace m2k
