// GEMMs of the LM head's gradients in float. Included once by each instruction-set file, after
// head_tiles.h.
//
// The depth runs along the lanes and dz, [vocabulary, rows], is broadcast. dX sums one tile of the vocabulary after another, so that its chains stay short (one chain over a
// whole vocabulary has an error ten times as large).
#pragma once

#include "cpu_kernels.h"
#include "head_tiles.h"

namespace m2k {
namespace {

// Columns [column, column + 16 kNumGroups) of `count` rows of out; row m has the factors
// dz + m * row_step + k * depth_step.
template <int kNumGroups>
M2K_INLINE void product_rows(const float* dz, int64_t row_step, int64_t depth_step, int64_t count,
                             const float* other, int64_t other_stride, int64_t depth, bool add,
                             float* out, int64_t out_stride) {
  float spill[kBlockLanes];  // results of rows past the last
  const float* w[kWeights];
  float* to[kWeights];
  for (int64_t first = 0; first < count; first += kWeights) {
    for (int m = 0; m < kWeights; ++m) {
      const int64_t row = first + m < count ? first + m : count - 1;
      w[m] = dz + row * row_step;
      to[m] = first + m < count ? out + row * out_stride : spill;
    }
    products<kNumGroups>(w, depth_step, other, other_stride, kVector, depth, add, to);
  }
}

// The same for `lanes` columns, a multiple of 16.
M2K_INLINE void product_block(const float* dz, int64_t row_step, int64_t depth_step, int64_t count,
                              const float* other, int64_t other_stride, int64_t depth, bool add,
                              float* out, int64_t out_stride, int64_t lanes) {
  while (lanes > 0) {
    const int64_t take = lanes < kBlockLanes ? lanes / kVector : kGroups;
    if (take == 1) {
      product_rows<1>(dz, row_step, depth_step, count, other, other_stride, depth, add, out, out_stride);
    } else if (take == 2) {
      product_rows<kGroups < 2 ? 1 : 2>(dz, row_step, depth_step, count, other, other_stride, depth,
                                        add, out, out_stride);
    } else {
      product_rows<kGroups>(dz, row_step, depth_step, count, other, other_stride, depth, add, out,
                            out_stride);
    }
    lanes -= take * kVector;
    other += take * kVector;
    out += take * kVector;
  }
}

// Columns of a tile of the weight, next to each other: rows a power of two apart share cache sets.
struct alignas(64) Panel {
  float w[kHeadTile * kProductLanes];
};

void head_dx(const HeadProduct& a, int64_t begin, int64_t end) {
  Panel panel;
  const int64_t row_blocks = (a.rows + kProductRows - 1) / kProductRows;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block % row_blocks * kProductRows;
    const int64_t column = block / row_blocks * kProductLanes;
    const int64_t count = a.rows - row < kProductRows ? a.rows - row : kProductRows;
    const int64_t lanes = a.depth - column < kProductLanes ? a.depth - column : kProductLanes;
    for (int64_t v = 0; v < a.vocab; v += kHeadTile) {
      const int64_t depth = a.vocab - v < kHeadTile ? a.vocab - v : kHeadTile;
      const float* weight = a.other + v * a.other_stride + column;
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t l = 0; l < lanes; l += kVector) {
          const float* from = weight + k * a.other_stride + l;
          *(F16*)(panel.w + k * kProductLanes + l) = *(const F16u*)from;
          if (v + kHeadTile + k < a.vocab) __builtin_prefetch(from + kHeadTile * a.other_stride);
        }
      }
      product_block(a.dz + v * a.dz_stride + row, 1, a.dz_stride, count, panel.w, kProductLanes,
                    depth, a.add || v > 0, a.out + row * a.out_stride + column, a.out_stride, lanes);
    }
  }
}

void head_dw(const HeadProduct& a, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t v = tile * kHeadTile;
    const int64_t count = a.vocab - v < kHeadTile ? a.vocab - v : kHeadTile;
    for (int64_t column = 0; column < a.depth; column += kProductLanes) {
      const int64_t lanes = a.depth - column < kProductLanes ? a.depth - column : kProductLanes;
      product_block(a.dz + v * a.dz_stride, a.dz_stride, 1, count, a.other + column, a.other_stride,
                    a.rows, a.add, a.out + v * a.out_stride + column, a.out_stride, lanes);
    }
  }
}

}  // namespace
}  // namespace m2k
