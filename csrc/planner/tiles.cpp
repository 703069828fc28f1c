// Attention tiles of a forest, from the smallest and largest subtree end of each block of keys.
#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "tree.h"

namespace m2plan {
namespace {

// Longest first: a thread or SM that takes the next free block then ends about when the others do.
template <class Count>
std::vector<int32_t> longest_first(int32_t num, Count count) {
  std::vector<int32_t> order(num);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return count(a) > count(b); });
  return order;
}

void bound_ends(const std::vector<int32_t>& subtree_end, int32_t block, Tiles* tiles) {
  const int64_t rows = static_cast<int64_t>(subtree_end.size());
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t last = std::min(first + block, rows);
    int32_t low = subtree_end[first], high = low;
    for (int64_t j = first + 1; j < last; ++j) {
      low = std::min(low, subtree_end[j]);
      high = std::max(high, subtree_end[j]);
    }
    tiles->min_end.push_back(low);
    tiles->max_end.push_back(high);
  }
}

// Rows seeing KV block b are [its first row, M), a contiguous range, and so are those seeing all
// of it: [its last row, m).
void bound_queries(int64_t rows, int32_t block, Tiles* tiles) {
  const int32_t num = static_cast<int32_t>(tiles->min_end.size());
  for (int32_t b = 0; b < num; ++b) {
    const int32_t full = tiles->min_end[b] == rows ? num : tiles->min_end[b] / block;
    tiles->full_end.push_back(std::max(full, b + 1));
    tiles->end.push_back((tiles->max_end[b] - 1) / block + 1);
  }
}

}  // namespace

Tiles cut_tiles(const std::vector<int32_t>& subtree_end, int32_t block) {
  Tiles tiles;
  const int64_t rows = static_cast<int64_t>(subtree_end.size());
  bound_ends(subtree_end, block, &tiles);
  bound_queries(rows, block, &tiles);
  const int32_t num = static_cast<int32_t>(tiles.min_end.size());
  int64_t total = 0;
  for (int32_t b = 0; b < num; ++b) total += tiles.end[b] - b;
  if (total > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("plan_tree: the forest has " + std::to_string(total) +
                            " tiles; int32 cannot number them: use a larger block");
  }
  const auto size_of = [&](int32_t b) { return std::min<int64_t>(block, rows - int64_t(b) * block); };
  tiles.kv.reserve(total);
  std::vector<int32_t> live, full;  // KV blocks that the query block at hand sees, ascending
  for (int32_t i = 0; i < num; ++i) {
    tiles.start.push_back(static_cast<int32_t>(tiles.kv.size()));
    tiles.kv.push_back(i);
    full.clear();
    size_t kept = 0;
    for (int32_t b : live) {
      if (tiles.end[b] <= i) continue;
      live[kept++] = b;
      if (i < tiles.full_end[b]) {
        full.push_back(b);
      } else {
        tiles.kv.push_back(b);
      }
    }
    live.resize(kept);
    live.push_back(i);
    tiles.full.push_back(static_cast<int32_t>(tiles.kv.size()));
    tiles.kv.insert(tiles.kv.end(), full.begin(), full.end());
    // All KV blocks before this one are whole.
    tiles.area += size_of(i) * (static_cast<int64_t>(kept) * block + size_of(i));
  }
  tiles.start.push_back(static_cast<int32_t>(tiles.kv.size()));
  tiles.forward_order =
      longest_first(num, [&](int32_t i) { return tiles.start[i + 1] - tiles.start[i]; });
  tiles.backward_order = longest_first(num, [&](int32_t b) { return tiles.end[b] - b; });
  return tiles;
}

}  // namespace m2plan
