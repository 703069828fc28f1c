// Policy loss on Hopper: one kernel over the tokens, one block that adds up the partial sums in a
// fixed order, and in backward one kernel that scales the gradients the forward left. Bitwise the
// same from run to run: no atomics.
#include <cuda_runtime.h>

#include "cuda_kernels.h"

#define M2K_HD __device__
#define m2k_exp ::exp
#include "policy_math.h"

namespace m2k {
namespace {

// Launch bounds below say one block an SM at least: without it ptxas 13.0 aims at 64 to 96
// registers and spills up to 48 bytes; with it the largest kernel takes 108 and none spills.
constexpr int kThreads = 256;
constexpr int kTokensPerBlock = 1024;
constexpr int kSequenceThreads = 128;
constexpr int kSequenceTile = 128;  // sequences that start in this many tokens share a block

__device__ __forceinline__ int64_t index_at(const IndexVector& v, int64_t i) {
  return v.wide ? static_cast<const int64_t*>(v.data)[i] : static_cast<const int32_t*>(v.data)[i];
}

__device__ __forceinline__ double max_or_nan(double x, double y) { return y <= x ? x : y; }

// Adds one thread's sums over the block; the result is in thread 0. Fixed tree, so deterministic.
template <int kThreadsInBlock>
__device__ void store_block_sums(double (&sums)[kNumPartial], double* out) {
  __shared__ double shared[kThreadsInBlock / 32][kNumPartial];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kNumPartial; ++k) {
    double v = sums[k];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const double other = __shfl_down_sync(0xffffffffu, v, step);
      v = k == kRawRatioMax ? max_or_nan(v, other) : v + other;
    }
    if (lane == 0) shared[warp][k] = v;
  }
  __syncthreads();
  if (threadIdx.x < kNumPartial) {
    const int k = threadIdx.x;
    double v = shared[0][k];
    for (int w = 1; w < kThreadsInBlock / 32; ++w) {
      v = k == kRawRatioMax ? max_or_nan(v, shared[w][k]) : v + shared[w][k];
    }
    out[k] = v;
  }
}

// What a sequence gives to each of its tokens.
struct SequenceValues {
  double log_ratio;
  double share;
  double tis_log;
};

// Evaluates token i, adds it to `sums`, writes the gradients that are known already. Returns
// d term / d log_ratio (gspo spreads it over the sequence later).
template <int kKind, int kKl>
__device__ __forceinline__ double one_token(const PolicyLossArgs& a, const LossConstants& c,
                                            const SequenceValues& s, bool tis_sequence, int64_t i,
                                            double (&sums)[kNumPartial]) {
  if (i > 0 && index_at(a.seq, i) < index_at(a.seq, i - 1)) sums[kRawBadSeq] += 1.0;
  if (a.mask && !a.mask[i]) {
    a.grad_logp[i] = 0.0f;
    if (a.grad_entropy) a.grad_entropy[i] = 0.0f;
    return 0.0;
  }
  const double logp = a.logp[i];
  const double old_logp = a.old_logp[i];
  const int64_t id = a.per_token ? i : index_at(a.seq, i);
  const bool known = id >= 0 && id < a.num_advantages;
  if (!known) sums[kRawBadSeq] += 1.0;
  TokenInput x;
  x.logp = logp;
  x.token_log_ratio = logp - old_logp;
  x.log_ratio = kKind == kGspo ? s.log_ratio : x.token_log_ratio;
  x.share = kKind == kGspo ? s.share : 1.0;
  x.advantage = known ? a.advantage[id] : 0.0;
  x.tis_log = tis_sequence ? s.tis_log : a.rollout_logp ? old_logp - a.rollout_logp[i] : 0.0;
  x.ref_log = a.ref_logp ? a.ref_logp[i] - logp : 0.0;
  x.entropy = a.entropy ? a.entropy[i] : 0.0;
  TokenOutput out;
  eval_token<kKind, kKl>(c, x, &out);
#pragma unroll
  for (int k = 0; k < kRawBadSeq; ++k) sums[k] += out.raw[k];
  sums[kRawRatioMax] = max_or_nan(sums[kRawRatioMax], out.raw[kRawRatioMax]);
  sums[kRawObjective] += out.term;
  const double slope = out.direct + (kKind == kGspo ? 0.0 : out.via_ratio);
  a.grad_logp[i] = static_cast<float>((0.0 - slope) / a.denom);
  if (a.grad_entropy) {
    a.grad_entropy[i] = static_cast<float>((0.0 - c.entropy_coef * x.share) / a.denom);
  }
  return out.via_ratio;
}

// No value of the loss needs a whole sequence: tokens are independent.
template <int kKind, int kKl>
__global__ void __launch_bounds__(kThreads, 1) token_kernel(PolicyLossArgs a, double* partial) {
  const LossConstants c = loss_constants(a);
  double sums[kNumPartial] = {};
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < begin + kTokensPerBlock && i < a.num_tokens;
       i += kThreads) {
    one_token<kKind, kKl>(a, c, SequenceValues{}, false, i, sums);
  }
  store_block_sums<kThreads>(sums, partial + blockIdx.x * kNumPartial);
}

// Adds v over the block in a fixed order; every thread gets the sum.
__device__ double block_sum(double v) {
  __shared__ double shared[kSequenceThreads / 32];
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < kSequenceThreads / 32; ++w) total += shared[w];
  return total;
}

// The sequence that starts at `start`: its values, and where it ends.
__device__ SequenceValues measure(const PolicyLossArgs& a, int64_t start, int64_t* end) {
  const int64_t id = index_at(a.seq, start);
  double sum = 0.0, live = 0.0, tis = 0.0;
  int64_t base = start;
  while (true) {
    const int64_t i = base + threadIdx.x;
    // Runs, not ids: a token belongs when every token since `start` has this id. Ids ascend, so
    // looking at the token alone is enough.
    const bool inside = i < a.num_tokens && index_at(a.seq, i) == id;
    if (inside && (!a.mask || a.mask[i])) {
      live += 1.0;
      const double old_logp = a.old_logp[i];
      sum += a.logp[i] - old_logp;
      if (a.rollout_logp) tis += old_logp - a.rollout_logp[i];
    }
    const int count = __syncthreads_count(inside);
    base += count;
    if (count < kSequenceThreads) break;
  }
  *end = base;
  SequenceValues v;
  live = block_sum(live);
  v.share = live > 0.0 ? 1.0 / live : 0.0;
  v.log_ratio = block_sum(sum) * v.share;
  v.tis_log = block_sum(tis);
  return v;
}

// gspo, or sequence-level TIS: a block takes the sequences that start in its tile of tokens. No
// table of offsets is needed, hence no host sync to learn how many sequences there are.
template <int kKind, int kKl>
__global__ void __launch_bounds__(kSequenceThreads, 1) sequence_kernel(PolicyLossArgs a,
                                                                    double* partial) {
  const LossConstants c = loss_constants(a);
  double sums[kNumPartial] = {};
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kSequenceTile;
  const int64_t tile_end = min(tile + kSequenceTile, a.num_tokens);
  const bool tis_sequence = a.tis_sequence && a.rollout_logp;
  int64_t start = tile;
  // Tokens of a sequence that began in an earlier tile belong to that tile's block.
  while (start < tile_end && start > 0 && index_at(a.seq, start) == index_at(a.seq, start - 1)) {
    ++start;
  }
#pragma unroll 1
  while (start < tile_end) {
    int64_t end;
    const SequenceValues s = measure(a, start, &end);
    double slope = 0.0;
#pragma unroll 1
    for (int64_t i = start + threadIdx.x; i < end; i += kSequenceThreads) {
      slope += one_token<kKind, kKl>(a, c, s, tis_sequence, i, sums);
    }
    if (kKind == kGspo) {
      slope = block_sum(slope) * s.share / a.denom;
      for (int64_t i = start + threadIdx.x; i < end; i += kSequenceThreads) {
        if (!a.mask || a.mask[i]) a.grad_logp[i] = static_cast<float>(a.grad_logp[i] - slope);
      }
    }
    start = end;
  }
  __syncthreads();
  store_block_sums<kSequenceThreads>(sums, partial + blockIdx.x * kNumPartial);
}

// One block: warp k adds slot k over the blocks.
__global__ void __launch_bounds__(kNumPartial * 32) finish_kernel(const double* partial,
                                                                  int64_t num_blocks, double denom,
                                                                  float* stats, float* loss) {
  __shared__ double sums[kNumPartial];
  const int k = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  double v = 0.0;
  for (int64_t b = lane; b < num_blocks; b += 32) {
    const double other = partial[b * kNumPartial + k];
    v = k == kRawRatioMax ? max_or_nan(v, other) : v + other;
  }
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_down_sync(0xffffffffu, v, step);
    v = k == kRawRatioMax ? max_or_nan(v, other) : v + other;
  }
  if (lane == 0) sums[k] = v;
  __syncthreads();
  if (threadIdx.x == 0) finish(sums, denom, stats, loss);
}

__global__ void __launch_bounds__(kThreads) scale_kernel(const float* grad, const float* logp,
                                                         int64_t m, float* logp_out,
                                                         const float* entropy, int64_t e,
                                                         float* entropy_out) {
  const float g = *grad;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < m) logp_out[i] = g * logp[i];
  if (i < e) entropy_out[i] = g * entropy[i];
}

bool needs_sequences(const PolicyLossArgs& a) {
  return a.kind == kGspo || (a.tis_sequence && a.rollout_logp);
}

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

template <int kKind, int kKl>
void launch_tokens(const PolicyLossArgs& a, double* scratch, cudaStream_t stream) {
  if (kKind == kGspo || needs_sequences(a)) {
    const unsigned grid = static_cast<unsigned>(ceil_div(a.num_tokens, kSequenceTile));
    sequence_kernel<kKind, kKl><<<grid, kSequenceThreads, 0, stream>>>(a, scratch);
  } else {
    const unsigned grid = static_cast<unsigned>(ceil_div(a.num_tokens, kTokensPerBlock));
    token_kernel<kKind, kKl><<<grid, kThreads, 0, stream>>>(a, scratch);
  }
}

template <int kKind>
void launch_kind(const PolicyLossArgs& a, double* scratch, cudaStream_t stream) {
  switch (a.kl) {
    case kKlK1: return launch_tokens<kKind, kKlK1>(a, scratch, stream);
    case kKlK2: return launch_tokens<kKind, kKlK2>(a, scratch, stream);
    case kKlK3: return launch_tokens<kKind, kKlK3>(a, scratch, stream);
    default: return launch_tokens<kKind, kKlNone>(a, scratch, stream);
  }
}

}  // namespace

int64_t policy_loss_scratch(int64_t num_tokens) {
  return ceil_div(num_tokens, kSequenceTile) * kNumPartial;  // the finer of the two grids
}

int policy_loss_sm90(const PolicyLossArgs& a, double* scratch, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const int64_t tile = needs_sequences(a) ? kSequenceTile : kTokensPerBlock;
  if (a.num_tokens > 0) {
    switch (a.kind) {
      case kGspo: launch_kind<kGspo>(a, scratch, s); break;
      case kCispo: launch_kind<kCispo>(a, scratch, s); break;
      default: launch_kind<kGrpo>(a, scratch, s); break;
    }
  }
  finish_kernel<<<1, kNumPartial * 32, 0, s>>>(scratch, ceil_div(a.num_tokens, tile), a.denom,
                                               a.stats, a.loss);
  return cudaGetLastError();
}

int policy_loss_bwd_sm90(const float* grad, const float* logp, int64_t m, float* logp_out,
                         const float* entropy, int64_t e, float* entropy_out, void* stream) {
  const int64_t n = m > e ? m : e;
  if (n == 0) return 0;
  scale_kernel<<<static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(grad, logp, m, logp_out, entropy, e,
                                                      entropy_out);
  return cudaGetLastError();
}

int cuda_runtime_version() { return CUDART_VERSION; }

const char* cuda_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace m2k
