// The LM head on the CPU: rows over threads, and what is left of a row once its tiles are summed.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu_kernels.h"

namespace m2k {
namespace {

constexpr int64_t kGrain = 1 << 14;  // logits a thread should have at least

int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(columns, 1)); }

// Everything is anchored at the target's z, so that a log-prob near 0 loses nothing to
// cancellation; at the largest z where that is out of reach of exp, and where the target's z has
// overflowed to inf: that gives NaN.
void merge_row(const CpuKernels& kernels, float z_target, HeadTiles tiles, int64_t rows,
               float* out) {
  const double target = z_target;
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t t = 0; t < tiles.count; ++t) largest = std::max<double>(largest, tiles.top[t]);
  const bool near = largest - target <= 600.0 && target < std::numeric_limits<double>::infinity();
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

float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (std::isnan(x)) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// fn(group, depth, lane, row) over all lanes that hold a row; a group is a thread's.
template <class Fn>
void for_each_packed(const HeadRows& h, int64_t groups, const Fn& fn) {
  torch::stable::parallel_for(0, groups, 1, [&](int64_t b, int64_t e) {
    for (int64_t g = b; g < e; ++g) {
      const int64_t lanes = std::min<int64_t>(16, h.rows - g * 16);
      for (int64_t k = 0; k < h.depth; ++k) {
        for (int64_t l = 0; l < lanes; ++l) fn(g, k, l, (g * 16 + l) * h.stride + k);
      }
    }
  });
}

// Maps the pages of a new matrix before they are written, many at once: a fault each would take half
// as long again. (Large pages would be faster still where memory is not fragmented, and far slower
// where it is.) A kernel before 5.14 refuses, and nothing is lost.
void populate(float* data, int64_t count) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE; headers may be older than the kernel
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = reinterpret_cast<uintptr_t>(data + count) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, kPopulateWrite);
#else
  (void)data, (void)count;
#endif
}

// What the gradient needs of each lane, filled up with lanes that have none.
struct LaneValues {
  std::vector<int32_t> source;
  std::vector<float> log_norm, log_norm_low, inverse, constant, slope;
  std::vector<double> own;  // gradient of the target's z

  explicit LaneValues(size_t n)
      : source(n), log_norm(n), log_norm_low(n), inverse(n), constant(n), slope(n), own(n) {}
};

void fill_lane(const HeadLogits& rows, const HeadGradArgs& args, int64_t row, size_t lane,
               LaneValues* v) {
  const double inverse = rows.inv_temperatures ? rows.inv_temperatures[row] : rows.inv_temperature;
  const double to_logp = args.grad_logp[row];
  const double to_entropy = args.grad_entropy ? args.grad_entropy[row] : 0.0;
  const double logp = args.logp[row];
  const double entropy = to_entropy != 0.0 ? args.entropy[row] : 0.0;
  v->source[lane] = static_cast<int32_t>(row);
  v->log_norm[lane] = args.log_norm[row];
  v->log_norm_low[lane] = args.log_norm_low[row];
  v->inverse[lane] = static_cast<float>(inverse);
  v->constant[lane] = static_cast<float>(-(to_logp + to_entropy * entropy) * inverse);
  v->slope[lane] = static_cast<float>(to_entropy * inverse);
  const double p = std::exp(logp);
  const double spread = p > 0.0 && to_entropy != 0.0 ? to_entropy * p * (logp + entropy) : 0.0;
  v->own[lane] = (to_logp * -std::expm1(logp) - spread) * inverse;
}

}  // namespace

void head_pack_cpu(const HeadRows& h, int64_t groups, float* out) {
  std::fill_n(out, groups * h.depth * 16, 0.0f);
  const float* wide = static_cast<const float*>(h.data);
  const uint16_t* half = static_cast<const uint16_t*>(h.data);
  for_each_packed(h, groups, [&](int64_t g, int64_t k, int64_t l, int64_t at) {
    out[(g * h.depth + k) * 16 + l] = h.bf16 ? widen(half[at]) : wide[at];
  });
}

void head_pack_cpu(const HeadRows& h, int64_t groups, uint16_t* out) {
  std::fill_n(out, groups * h.depth * 16, uint16_t{0});
  const uint16_t* half = static_cast<const uint16_t*>(h.data);
  for_each_packed(h, groups, [&](int64_t g, int64_t k, int64_t l, int64_t at) {
    out[(g * h.depth + k / 2 * 2) * 16 + l * 2 + k % 2] = half[at];
  });
}

void head_tiles_cpu(const HeadGemm& gemm, bool dot) {
  const HeadTilesFn run = dot ? bf16_kernels()->head_tiles : cpu_kernels().head_tiles;
  const int64_t tiles = (gemm.vocab + kHeadTile - 1) / kHeadTile;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t b, int64_t e) {
    std::vector<float> scratch(gemm.weight_bf16 && !dot ? kHeadTile * gemm.depth : 0);
    for (int64_t tile = b; tile < e; ++tile) {
      const int64_t first = tile * kHeadTile;
      const int64_t count = std::min<int64_t>(kHeadTile, gemm.vocab - first);
      if (gemm.kept) populate(gemm.kept + first * gemm.stride, count * gemm.stride);
      run(gemm, scratch.data(), tile, tile + 1);
    }
  });
}

void head_lanes_cpu(HeadLaneGrad grad, const HeadLogits& rows, const HeadGradArgs& args,
                    const int64_t* live, int64_t lanes) {
  grad.lanes = (lanes + 15) / 16 * 16;
  LaneValues v(static_cast<size_t>(grad.lanes));
  for (int64_t j = 0; j < lanes; ++j) fill_lane(rows, args, live ? live[j] : j, j, &v);
  for (int64_t j = lanes; j < grad.lanes; ++j) v.source[j] = v.source[lanes - 1];
  for (int64_t j = 0; j < lanes; ++j) {  // before the logits are overwritten
    const int64_t own = rows.target[v.source[j]];
    if (own < 0 || own >= grad.num_valid || grad.softcap == 0.0f) continue;
    double raw = grad.kept[own * grad.stride + v.source[j]];
    if (grad.bias) raw += grad.bias[own];
    const double share = std::tanh(raw / grad.softcap);
    v.own[j] *= 1.0 - share * share;
  }
  grad.source = live ? v.source.data() : nullptr;
  grad.log_norm = v.log_norm.data();
  grad.log_norm_low = v.log_norm_low.data();
  grad.inverse = v.inverse.data();
  grad.constant = v.constant.data();
  grad.slope = v.slope.data();
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, grad.vocab, row_grain(grad.lanes), [&](int64_t b, int64_t e) {
    kernels.head_lanes(grad, b, e);
  });
  for (int64_t j = 0; j < lanes; ++j) {
    const int64_t own = rows.target[v.source[j]];
    if (own < 0 || own >= grad.num_valid) continue;
    const int64_t at = own * grad.out_stride + j;
    const float value = static_cast<float>(v.own[j]);
    if (grad.out_bf16) {
      static_cast<uint16_t*>(grad.out)[at] = narrow(value);
    } else {
      static_cast<float*>(grad.out)[at] = value;
    }
  }
}

void head_dx_cpu(const HeadProduct& p) {
  const int64_t blocks = (p.rows + kProductRows - 1) / kProductRows *
                         ((p.depth + kProductLanes - 1) / kProductLanes);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) { cpu_kernels().head_dx(p, b, e); });
}

void head_dx_cpu(const HeadDot& p) {
  const int64_t strips = (p.depth + kDotColumns - 1) / kDotColumns;
  const int64_t blocks = (p.rows + kDotBlockRows - 1) / kDotBlockRows;
  torch::stable::parallel_for(0, strips, 1, [&](int64_t b, int64_t e) {
    std::vector<uint32_t> scratch(static_cast<size_t>(blocks * kDotBlockRows * kDotDepth / 2));
    bf16_kernels()->head_dx(p, scratch.data(), b, e);
  });
}

void head_dw_cpu(HeadProduct p) {
  const int64_t strips = (p.depth + kProductLanes - 1) / kProductLanes;
  std::vector<float> packed(static_cast<size_t>(strips * kProductLanes * p.rows));
  torch::stable::parallel_for(0, strips, 1, [&](int64_t b, int64_t e) {
    for (int64_t s = b; s < e; ++s) {
      const int64_t column = s * kProductLanes;
      const int64_t lanes = std::min(kProductLanes, p.depth - column);
      for (int64_t row = 0; row < p.rows; ++row) {
        std::copy_n(p.other + row * p.other_stride + column, lanes,
                    packed.data() + (s * p.rows + row) * kProductLanes);
      }
    }
  });
  p.other = packed.data();
  const int64_t tiles = (p.vocab + kHeadTile - 1) / kHeadTile;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t b, int64_t e) {
    for (int64_t tile = b; tile < e; ++tile) {
      const int64_t first = tile * kHeadTile;
      HeadProduct own = p;
      own.vocab = std::min<int64_t>(kHeadTile, p.vocab - first);
      own.dz += first * p.dz_stride;
      own.out += first * p.out_stride;
      if (!p.add) populate(own.out, (own.vocab - 1) * p.out_stride + p.depth);
      cpu_kernels().head_dw(own, 0, 1);
    }
  });
}

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
