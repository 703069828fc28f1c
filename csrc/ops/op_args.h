// Plain structs that carry an op's arguments from the torch glue to a kernel. No torch header here,
// so that a kernel file (one per instruction set, or CUDA) never sees one.
#pragma once

#include <stdint.h>

namespace m2k {

enum PolicyKind : int { kGrpo = 0, kGspo = 1, kCispo = 2 };
enum KlKind : int { kKlNone = 0, kKlK1 = 1, kKlK2 = 2, kKlK3 = 3 };

// Slots of the raw statistics: sums over the live tokens, then one maximum. The order is part of
// the op's contract with Python (m2kernels/metrics.py, RAW_METRICS).
enum RawStat : int {
  kRawTokens = 0,
  kRawClipLow,
  kRawClipHigh,
  kRawDualClip,
  kRawK1,
  kRawK3,
  kRawWeight,
  kRawWeightSquared,
  kRawTis,
  kRawTisCapped,
  kRawRefKl,
  kRawEntropy,
  kRawBadSeq,
  kRawRatioMax,
  kNumRaw,
  kRawObjective = kNumRaw,  // the sum of the terms: not a metric, becomes the loss
  kNumPartial
};

// Final metrics follow the raw ones in `stats`, in the order of Python's FINAL_METRICS.
constexpr int kNumFinal = 10;
constexpr int kNumStats = kNumRaw + kNumFinal;

struct IndexVector {
  const void* data;
  bool wide;  // int64 when true, int32 when false
};

struct PolicyLossArgs {
  int64_t num_tokens;
  int64_t num_advantages;
  const float* logp;          // [num_tokens]
  const float* old_logp;      // [num_tokens]; equals logp when the caller gave none
  const float* advantage;     // [num_advantages], or [num_tokens] when per_token
  IndexVector seq;            // [num_tokens]
  const uint8_t* mask;        // [num_tokens] or null: every token is live
  const float* entropy;       // [num_tokens] or null
  const float* rollout_logp;  // [num_tokens] or null
  const float* ref_logp;      // [num_tokens] or null
  int kind;
  int kl;
  double clip_low;
  double clip_high;
  double dual_clip;  // infinity: none
  double kl_coef;
  double entropy_coef;
  double tis_cap;  // infinity: the weight is measured, not applied
  bool tis_sequence;
  bool per_token;
  double denom;
  float* loss;          // [1]
  float* stats;         // [kNumStats]
  float* grad_logp;     // [num_tokens]
  float* grad_entropy;  // [num_tokens] or null
};

struct GroupAdvantageArgs {
  int64_t num_rows;
  const float* reward;   // [num_rows]
  IndexVector group;     // [num_rows]
  const uint8_t* valid;  // [num_rows] or null
  bool leave_one_out;
  bool divide_by_std;
  double eps;
  float* advantage;  // [num_rows]
};

// Rows of logits as they came from a GEMM, and how they become z: the maths is in
// m2kernels/_head_kernels.py.
struct HeadLogits {
  int64_t rows;
  int64_t columns;
  const void* data;
  int64_t stride;  // elements from row to row; columns are dense
  bool bf16;       // else float
  const int64_t* target;  // [rows], a column of these, or outside [0, columns)
  const float* bias;      // [columns] or null
  const float* inv_temperatures;  // [rows] or null
  float inv_temperature;          // for all rows, when inv_temperatures is null
  float softcap;                  // 0: none
  int64_t num_valid;              // columns from here on are padding
};

constexpr int kHeadTile = 128;  // columns of a vocabulary tile: part of the contract with Python

// Where the statistics of tile 0 of row 0 go; `moment` may be null.
struct HeadTileOut {
  float* z_target;  // [rows]; written where the target is among the columns
  float* top;
  float* total;
  float* moment;
  int64_t stride;  // of top, total and moment, from row to row
};

// Tiles of one row and of the whole vocabulary, to be summed relative to `anchor`.
struct HeadTiles {
  const float* top;
  const float* total;
  const float* moment;  // or null
  int64_t count;
  double anchor;
};

struct HeadRows {
  const void* data;  // [rows, depth]
  int64_t rows;
  int64_t depth;
  int64_t stride;
  bool bf16;  // else float
};

// The head's GEMM with its statistics. Rows of the chunk are lanes: groups of sixteen, the last one
// filled up; `stride` is 16 x groups. A logit is one chain of products over `depth`, in blocks of
// fixed size, whatever else is computed.
struct HeadGemm {
  int64_t rows;
  int64_t groups;
  int64_t stride;
  int64_t depth;
  const void* hidden;  // packed: [groups, depth, 16] float, or [groups, depth / 2, 16, 2] bf16
  const void* weight;  // [vocab, depth]
  int64_t weight_stride;
  bool weight_bf16;
  int64_t vocab;
  int64_t num_valid;
  const float* bias;      // [vocab] or null
  const float* inverse;   // [stride], 1 / temperature
  const int64_t* target;  // [stride], a row of the weight, or negative
  float softcap;          // 0: none
  float* z_target;        // [stride]; written where the target is here
  float* top;             // [tiles, stride]; null: no statistics
  float* total;           // [tiles, stride]
  float* moment;          // [tiles, stride] or null
  float* kept;            // [vocab, stride] or null: the GEMM's result, before bias, cap, temperature
};

// Gradient of kept logits. Lanes 0 .. count are those with a gradient, filled up to a multiple of 16.
struct HeadLaneGrad {
  const float* kept;  // [vocab, stride]
  int64_t stride;
  int64_t vocab;
  int64_t num_valid;
  const float* bias;  // [vocab] or null
  float softcap;
  int64_t lanes;           // a multiple of 16
  const int32_t* source;   // [lanes], ascending: the lane of `kept`; null: the same
  const float* log_norm;   // [lanes] each
  const float* log_norm_low;
  const float* inverse;
  const float* constant;  // dz = p (constant - slope * log p)
  const float* slope;
  void* out;  // [vocab, out_stride] in the memory of `kept`: float, or bf16
  int64_t out_stride;
  bool out_bf16;
};

// GEMMs of the head's gradients, in float: dX = dz^T W and dW = dz X, with dz [vocab, rows].
struct HeadProduct {
  const float* dz;
  int64_t dz_stride;
  int64_t vocab;
  int64_t rows;
  int64_t depth;       // a multiple of 16
  const float* other;  // W [vocab, depth], or X [rows, depth] (head_dw: strips of kProductLanes columns)
  int64_t other_stride;
  float* out;  // dX [rows, depth], or dW [vocab, depth]
  int64_t out_stride;
  bool add;  // to what `out` holds
};

// dX of bfloat16 factors.
struct HeadDot {
  const uint16_t* dz;  // [vocab, rows]
  int64_t dz_stride;
  int64_t vocab;
  int64_t rows;
  int64_t depth;           // a multiple of 32
  const uint16_t* weight;  // [vocab, depth]
  int64_t weight_stride;
  float* out;  // [rows, depth]
  int64_t out_stride;
};

struct HeadGradArgs {
  const float* log_norm;      // [rows], with log_norm_low the log-sum-exp
  const float* log_norm_low;  // [rows]
  const float* logp;          // [rows]
  const float* entropy;       // [rows] or null
  const float* grad_logp;     // [rows]
  const float* grad_entropy;  // [rows] or null
  void* out;                  // [rows, columns], the dtype of the logits; may be the logits
  int64_t out_stride;
};

}  // namespace m2k
