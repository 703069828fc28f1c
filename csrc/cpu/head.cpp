// The LM head on the CPU: rows over threads, and what is left of a row once its tiles are summed.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "cpu_kernels.h"

namespace m2k {
namespace {

constexpr int64_t kGrain = 1 << 14;  // logits a thread should have at least

int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(columns, 1)); }

// Everything is anchored at the target's z, so that a log-prob near 0 loses nothing to
// cancellation; at the largest z where that is out of reach of exp.
void merge_row(const CpuKernels& kernels, float z_target, HeadTiles tiles, int64_t rows,
               float* out) {
  const double target = z_target;
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t t = 0; t < tiles.count; ++t) largest = std::max<double>(largest, tiles.top[t]);
  const bool near = largest - target <= 600.0;
  tiles.anchor = near ? target : largest;
  double sums[2];
  kernels.head_merge(tiles, sums);
  const double ahead = near ? 0.0 : target - tiles.anchor;
  const double own = std::exp(ahead);
  const double log_sum = near ? std::log1p(sums[0]) : std::log(own + sums[0]);
  const double log_norm = tiles.anchor + log_sum;
  const float high = static_cast<float>(log_norm);
  out[0] = high;
  out[rows] = std::isinf(high) ? 0.0f : static_cast<float>(log_norm - high);
  out[2 * rows] = static_cast<float>(ahead - log_sum);
  if (tiles.moment) {
    const double weighted = sums[1] + (own > 0.0 ? own * ahead : 0.0);
    out[3 * rows] = static_cast<float>(log_sum - weighted / (own + sums[0]));
  }
}

}  // namespace

void head_stats_cpu(const HeadLogits& logits, const HeadTileOut& out) {
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, logits.rows, row_grain(logits.columns), [&](int64_t b, int64_t e) {
    kernels.head_stats(logits, out, b, e);
  });
}

void head_grad_cpu(const HeadLogits& logits, const HeadGradArgs& args) {
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, logits.rows, row_grain(logits.columns), [&](int64_t b, int64_t e) {
    kernels.head_grad(logits, args, b, e);
  });
}

void head_merge_cpu(const float* z_target, const HeadTiles& tiles, int64_t rows, float* out) {
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, rows, row_grain(tiles.count), [&](int64_t b, int64_t e) {
    for (int64_t row = b; row < e; ++row) {
      HeadTiles own = tiles;
      own.top += row * tiles.count;
      own.total += row * tiles.count;
      if (own.moment) own.moment += row * tiles.count;
      merge_row(kernels, z_target[row], own, rows, out + row);
    }
  });
}

}  // namespace m2k
