// GEMMs of the LM head's gradients in float. Included once by each instruction-set file, after
// head_tiles.h.
//
// The depth runs along the lanes and dz, [vocabulary, rows], is broadcast. dX sums one tile of the
// vocabulary after another, so that its chains stay short (one chain over a whole vocabulary has an
// error ten times as large).
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

struct alignas(64) Panel {
  float w[kHeadTile * kProductLanes];
};

// Columns [column, column + lanes) of a tile of the weight, next to each other: rows a power of two
// apart share cache sets. The next panel is fetched meanwhile, `ahead` floats further on.
M2K_INLINE void pack_panel(const float* weight, int64_t stride, int64_t depth, int64_t lanes,
                           int64_t ahead, float* panel) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t l = 0; l < lanes; l += kVector) {
      const float* from = weight + k * stride + l;
      *(F16*)(panel + k * kProductLanes + l) = *(const F16u*)from;
      if (ahead) __builtin_prefetch(from + ahead);
    }
  }
}

// Tile by tile, so that the weight is read along its rows; the sums stay in the cache.
void head_dx(const HeadProduct& a, int64_t begin, int64_t end) {
  Panel panel;
  const int64_t row_blocks = (a.rows + kProductRows - 1) / kProductRows;
  const int64_t first_column = begin / row_blocks * kProductLanes;
  const int64_t last_column = (end - 1) / row_blocks * kProductLanes;
  for (int64_t v = 0; v < a.vocab; v += kHeadTile) {
    const int64_t depth = a.vocab - v < kHeadTile ? a.vocab - v : kHeadTile;
    const bool more = v + 2 * kHeadTile <= a.vocab;
    int64_t packed = -1;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block % row_blocks * kProductRows;
      const int64_t column = block / row_blocks * kProductLanes;
      const int64_t count = a.rows - row < kProductRows ? a.rows - row : kProductRows;
      const int64_t lanes = a.depth - column < kProductLanes ? a.depth - column : kProductLanes;
      if (column != packed) {
        const int64_t along = column + 2 * kProductLanes <= a.depth ? kProductLanes : 0;
        const int64_t down = more ? kHeadTile * a.other_stride + first_column - column : 0;
        pack_panel(a.other + v * a.other_stride + column, a.other_stride, depth, lanes,
                   column < last_column ? along : down, panel.w);
        packed = column;
      }
      product_block(a.dz + v * a.dz_stride + row, 1, a.dz_stride, count, panel.w, kProductLanes,
                    depth, a.add || v > 0, a.out + row * a.out_stride + column, a.out_stride, lanes);
    }
  }
}

// The hidden states come as strips of kProductLanes columns, one after another.
void head_dw(const HeadProduct& a, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t v = tile * kHeadTile;
    const int64_t count = a.vocab - v < kHeadTile ? a.vocab - v : kHeadTile;
    for (int64_t column = 0; column < a.depth; column += kProductLanes) {
      const int64_t lanes = a.depth - column < kProductLanes ? a.depth - column : kProductLanes;
      product_block(a.dz + v * a.dz_stride, a.dz_stride, 1, count, a.other + column * a.rows,
                    kProductLanes, a.rows, a.add, a.out + v * a.out_stride + column, a.out_stride, lanes);
    }
  }
}

}  // namespace
}  // namespace m2k
