// Prefix forests: sequences -> compressed trie -> rows in heavy-child-first order -> attention tiles.
// Plain C++17.
//
// A segment is a node of the compressed trie: a run of tokens that the same sequences share. In
// depth-first order a segment's rows are contiguous and so is its subtree, so one number per row,
// the end of its subtree, holds the whole attention mask: row j is visible to row i iff
// j <= i < subtree_end[j].
#pragma once

#include <cstdint>
#include <vector>

namespace m2plan {

// T is int32_t or int64_t.
template <class T>
struct Sequence {
  const T* tokens = nullptr;
  int64_t length = 0;
  int64_t key = 0;  // sequences merge only under equal keys
};

// Rows in packed order; segments in depth-first order, so a parent comes before its children.
struct Forest {
  std::vector<int32_t> tokens, position, subtree_end;         // [rows]
  std::vector<int32_t> segment_start;                         // [segments + 1], rows
  std::vector<int32_t> segment_parent;                        // [segments], -1 for a root
  std::vector<int32_t> segment_depth;                         // [segments], position of its first row
  std::vector<int32_t> leaf;                                  // [sequences], last segment; -1: empty
  int64_t num_pairs = 0;                                      // visible (query, key) pairs
};

// Children lie largest subtree first, then by their first sequence; roots by their first sequence.
// Throws std::invalid_argument for a token that is not an int32, std::length_error for more than
// 2^31 - 2^16 rows.
template <class T>
Forest plant(const std::vector<Sequence<T>>& sequences);

// Forward tiles of `block` rows by `kv_block` keys, backward ones of `block` by `block`. Of KV block
// b with smallest and largest subtree end m and M, query rows [i0, i1] see something iff M > i0,
// and everything iff m > i1: two integers decide.
struct Tiles {
  int32_t kv_block = 0;
  std::vector<int32_t> min_end, max_end;     // [blocks], of `block` keys
  // KV blocks (of kv_block keys) of query block i: kv[start[i] : start[i + 1]]; the diagonal first,
  // then the partial ones, from full[i] on those that need no mask. Each part ascends.
  std::vector<int32_t> start, full, kv;
  // Query blocks that see block b of keys: [b, end[b]), of which [b + 1, full_end[b]) need no mask.
  std::vector<int32_t> full_end, end;
  std::vector<int32_t> forward_order, backward_order;  // blocks, most tiles first
  int64_t area = 0;                                    // (query, key) pairs in all forward tiles
};

// `kv_block` divides `block`.
Tiles cut_tiles(const std::vector<int32_t>& subtree_end, int32_t block, int32_t kv_block);

// `finer` where tiles that narrow spare more than `min_gain` of the pairs, else `block`.
int32_t choose_kv_block(const std::vector<int32_t>& subtree_end, int32_t block, int32_t finer,
                        double min_gain);

}  // namespace m2plan
