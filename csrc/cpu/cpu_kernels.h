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

// Rows [begin, end): statistics of each tile, the target's column left out.
using HeadStatsFn = void (*)(const HeadLogits&, const HeadTileOut&, int64_t begin, int64_t end);
// sums[0] of exp(z - anchor), sums[1] of (z - anchor) exp(z - anchor); sums[1] is 0 without moment.
using HeadMergeFn = void (*)(const HeadTiles&, double* sums);
// Rows [begin, end): d loss / d logits.
using HeadGradFn = void (*)(const HeadLogits&, const HeadGradArgs&, int64_t begin, int64_t end);

// Vocabulary tiles [begin, end) of a chunk; scratch holds kHeadTile * depth floats.
using HeadTilesFn = void (*)(const HeadGemm&, float* scratch, int64_t begin, int64_t end);
// Rows [begin, end) of the vocabulary.
using HeadLanesFn = void (*)(const HeadLaneGrad&, int64_t begin, int64_t end);

// Blocks [begin, end) of the work of a gradient's GEMM.
using HeadProductFn = void (*)(const HeadProduct&, int64_t begin, int64_t end);

constexpr int64_t kProductLanes = 48;  // columns of a block of dX and dW
constexpr int64_t kProductRows = 256;  // rows of a block of dX

constexpr int64_t kDotColumns = 64;   // of a strip of dX
constexpr int64_t kDotBlockRows = 6;  // of dX
constexpr int64_t kDotDepth = 256;    // entries of the vocabulary in one chain of sums

// Strips [begin, end) of dX in bfloat16; scratch holds kDotDepth / 2 * (rows rounded up to blocks).
using HeadDotFn = void (*)(const HeadDot&, uint32_t* scratch, int64_t begin, int64_t end);

// With bf16 dot products; hidden of HeadGemm is packed as pairs then.
struct Bf16Kernels {
  HeadTilesFn head_tiles;
  HeadDotFn head_dx;
};

struct CpuKernels {
  const char* name;
  PolicyBlockFn policy_block;
  HeadStatsFn head_stats;
  HeadMergeFn head_merge;
  HeadGradFn head_grad;
  HeadTilesFn head_tiles;
  HeadLanesFn head_lanes;
  HeadProductFn head_dx;  // blocks: of rows, for each of columns
  HeadProductFn head_dw;  // blocks: tiles of the vocabulary
};

extern const CpuKernels kBaselineKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
extern const Bf16Kernels kBf16Kernels;  // needs avx512_bf16
#endif

// The kernels for this machine, or for M2KERNELS_CPU_ISA (baseline | avx2 | avx512); throws
// std::runtime_error when that names one this machine cannot run.
const CpuKernels& cpu_kernels();

// kBf16Kernels where cpu_kernels() is avx512 and the machine has the instructions, else null.
const Bf16Kernels* bf16_kernels();

void policy_loss_cpu(const PolicyLossArgs& args);
void policy_loss_bwd_cpu(float grad, const float* saved, int64_t n, float* out);
void group_advantage_cpu(const GroupAdvantageArgs& args);
// hidden [rows, depth] of T -> the layouts of HeadGemm::hidden, zeros in lanes past `rows`.
void head_pack_cpu(const HeadRows& hidden, int64_t groups, float* out);
void head_pack_cpu(const HeadRows& hidden, int64_t groups, uint16_t* out);
void head_tiles_cpu(const HeadGemm& gemm, bool dot);
// Lanes `live` [lanes] of kept logits (null: the first `lanes`) -> their gradient, in place.
void head_lanes_cpu(HeadLaneGrad grad, const HeadLogits& rows, const HeadGradArgs& args,
                    const int64_t* live, int64_t lanes);
void head_dx_cpu(const HeadProduct& product);
void head_dx_cpu(const HeadDot& product);
void head_dw_cpu(HeadProduct product);
void head_stats_cpu(const HeadLogits& logits, const HeadTileOut& out);
void head_grad_cpu(const HeadLogits& logits, const HeadGradArgs& args);
// z_target [rows], tiles [rows, tiles.count] -> out: log_norm, log_norm_low, logp, entropy, each
// [rows]; the last stays as it is without moment.
void head_merge_cpu(const float* z_target, const HeadTiles& tiles, int64_t rows, float* out);

}  // namespace m2k
