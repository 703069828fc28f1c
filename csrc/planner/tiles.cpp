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

// Blocks of `size` keys: smallest and largest subtree end, and the query blocks that see them.
struct KvBlocks {
  std::vector<int32_t> min_end, max_end;
  std::vector<int32_t> full_end, end;  // past the last query block that sees all, some
};

// Rows seeing a block of keys are [its first row, M), a contiguous range, and so are those seeing
// all of it: [its last row, m).
KvBlocks bound(const std::vector<int32_t>& subtree_end, int32_t size, int32_t block) {
  KvBlocks out;
  const int64_t rows = static_cast<int64_t>(subtree_end.size());
  const int32_t num = static_cast<int32_t>((rows + block - 1) / block);
  for (int64_t first = 0; first < rows; first += size) {
    const int64_t last = std::min(first + size, rows);
    int32_t low = subtree_end[first], high = low;
    for (int64_t j = first + 1; j < last; ++j) {
      low = std::min(low, subtree_end[j]);
      high = std::max(high, subtree_end[j]);
    }
    out.min_end.push_back(low);
    out.max_end.push_back(high);
    const int32_t full = low == rows ? num : low / block;
    out.full_end.push_back(std::max(full, static_cast<int32_t>(first / block) + 1));
    out.end.push_back((high - 1) / block + 1);
  }
  return out;
}

// Pairs in the tiles: whole query blocks but for the last, whole KV blocks but on the diagonal.
int64_t area_of(const KvBlocks& keys, int64_t rows, int32_t size, int32_t block) {
  const int64_t num = (rows + block - 1) / block;
  const int64_t missing = num * block - rows;
  int64_t area = 0;
  for (size_t s = 0; s < keys.end.size(); ++s) {
    const int64_t own = static_cast<int64_t>(s) * size / block;
    const int64_t keys_here = std::min<int64_t>(size, rows - static_cast<int64_t>(s) * size);
    area += keys_here * ((keys.end[s] - own) * block - (keys.end[s] == num ? missing : 0));
  }
  return area;
}

}  // namespace

int32_t choose_kv_block(const std::vector<int32_t>& subtree_end, int32_t block, int32_t finer,
                        double min_gain) {
  const int64_t rows = static_cast<int64_t>(subtree_end.size());
  const int64_t coarse_area = area_of(bound(subtree_end, block, block), rows, block, block);
  const int64_t fine_area = area_of(bound(subtree_end, finer, block), rows, finer, block);
  return fine_area < (1.0 - min_gain) * coarse_area ? finer : block;
}

Tiles cut_tiles(const std::vector<int32_t>& subtree_end, int32_t block, int32_t kv_block) {
  Tiles tiles;
  const int64_t rows = static_cast<int64_t>(subtree_end.size());
  const int32_t per_block = block / kv_block;
  KvBlocks whole = bound(subtree_end, block, block);
  tiles.min_end = std::move(whole.min_end);
  tiles.max_end = std::move(whole.max_end);
  tiles.full_end = std::move(whole.full_end);
  tiles.end = std::move(whole.end);
  const KvBlocks keys = bound(subtree_end, kv_block, block);
  tiles.kv_block = kv_block;
  tiles.area = area_of(keys, rows, kv_block, block);
  const int32_t num = static_cast<int32_t>(tiles.min_end.size());
  const int32_t num_keys = static_cast<int32_t>(keys.end.size());
  int64_t total = 0;
  for (int32_t s = 0; s < num_keys; ++s) total += keys.end[s] - s / per_block;
  if (total > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("plan_tree: the forest has " + std::to_string(total) +
                            " tiles; int32 cannot number them: use a larger block");
  }
  tiles.kv.reserve(total);
  std::vector<int32_t> live, full;  // KV blocks that the query block at hand sees, ascending
  for (int32_t i = 0; i < num; ++i) {
    tiles.start.push_back(static_cast<int32_t>(tiles.kv.size()));
    const int32_t diagonal = i * per_block;
    const int32_t diagonal_end = std::min(diagonal + per_block, num_keys);
    for (int32_t s = diagonal; s < diagonal_end; ++s) tiles.kv.push_back(s);
    full.clear();
    size_t kept = 0;
    for (int32_t s : live) {
      if (keys.end[s] <= i) continue;
      live[kept++] = s;
      if (i < keys.full_end[s]) {
        full.push_back(s);
      } else {
        tiles.kv.push_back(s);
      }
    }
    live.resize(kept);
    for (int32_t s = diagonal; s < diagonal_end; ++s) live.push_back(s);
    tiles.full.push_back(static_cast<int32_t>(tiles.kv.size()));
    tiles.kv.insert(tiles.kv.end(), full.begin(), full.end());
  }
  tiles.start.push_back(static_cast<int32_t>(tiles.kv.size()));
  tiles.forward_order =
      longest_first(num, [&](int32_t i) { return tiles.start[i + 1] - tiles.start[i]; });
  tiles.backward_order = longest_first(num, [&](int32_t b) { return tiles.end[b] - b; });
  return tiles;
}

}  // namespace m2plan
