#include "tree.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace m2plan {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max() - (1 << 16);

// Length of the common prefix of a and b, which is at most n and known to be at least `from`.
template <class T>
int64_t common_prefix(const T* a, const T* b, int64_t from, int64_t n) {
  constexpr int64_t kStep = 1024 / sizeof(T);  // memcmp is the widest compare there is
  while (from + kStep <= n && std::memcmp(a + from, b + from, kStep * sizeof(T)) == 0) {
    from += kStep;
  }
  while (from < n && a[from] == b[from]) ++from;
  return from;
}

// A node: tokens [begin, end) of its owner.
struct Node {
  int32_t parent = -1;
  int32_t owner = 0;
  int64_t begin = 0, end = 0;
};

// Sequences [first, last) of the order: they share `depth` tokens, those above `parent`, and the
// token after them.
struct Group {
  size_t first = 0, last = 0;
  int64_t depth = 0;
  int32_t parent = -1;
};

// Builds the compressed trie from the top. Of a group, one sequence is the spine; every other is
// compared with it once, from the group's depth to where it leaves. So each token is looked at
// once, in any order of the input; no sort of long strings is needed.
template <class T>
class Trie {
 public:
  explicit Trie(const std::vector<Sequence<T>>& sequences)
      : sequences_(sequences), shared_(sequences.size()), leaf_(sequences.size(), -1) {
    for (size_t i = 0; i < sequences.size(); ++i) {
      if (sequences[i].length > 0) order_.push_back(static_cast<int32_t>(i));
    }
    std::sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
      const auto &x = sequences_[a], &y = sequences_[b];
      if (x.key != y.key) return x.key < y.key;
      return x.tokens[0] != y.tokens[0] ? x.tokens[0] < y.tokens[0] : a < b;
    });
    for (size_t first = 0; first < order_.size();) {
      const auto& head = sequences_[order_[first]];
      size_t last = first + 1;
      while (last < order_.size() && sequences_[order_[last]].key == head.key &&
             sequences_[order_[last]].tokens[0] == head.tokens[0]) {
        ++last;
      }
      groups_.push_back({first, last, 0, -1});
      first = last;
    }
    while (!groups_.empty()) {
      const Group group = groups_.back();
      groups_.pop_back();
      grow(group);
    }
  }

  const std::vector<Node>& nodes() const { return nodes_; }       // parents before children
  const std::vector<int32_t>& leaf() const { return leaf_; }

 private:
  void grow(const Group& group) {
    const auto begin = order_.begin() + group.first, end = order_.begin() + group.last;
    const auto longest = std::max_element(begin, end, [&](int32_t a, int32_t b) {
      const int64_t m = sequences_[a].length, n = sequences_[b].length;
      return m != n ? m < n : a > b;
    });
    const int32_t spine = *longest;
    const T* tokens = sequences_[spine].tokens;
    for (auto it = begin; it != end; ++it) {
      const auto& other = sequences_[*it];  // no longer than the spine
      shared_[*it] = *it == spine
                         ? other.length
                         : common_prefix(tokens, other.tokens, group.depth + 1, other.length);
    }
    if (end - begin > 1) {
      std::sort(begin, end, [&](int32_t a, int32_t b) { return before(a, b); });
    }
    Group branch{0, 0, group.depth, group.parent};
    for (size_t at = group.first; at < group.last;) {
      const int64_t cut = shared_[order_[at]];
      nodes_.push_back({branch.parent, spine, branch.depth, cut});
      branch.parent = static_cast<int32_t>(nodes_.size()) - 1;
      branch.depth = cut;
      while (at < group.last && shared_[order_[at]] == cut) {
        at = leave(at, group.last, &branch);
      }
    }
  }

  // Takes from the order those that end here, or those that go on with one same token.
  size_t leave(size_t at, size_t last, Group* branch) {
    const int32_t first = order_[at];
    if (sequences_[first].length == branch->depth) {
      leaf_[first] = branch->parent;
      return at + 1;
    }
    const T token = sequences_[first].tokens[branch->depth];
    branch->first = at;
    for (++at; at < last && shared_[order_[at]] == branch->depth; ++at) {
      if (sequences_[order_[at]].tokens[branch->depth] != token) break;
    }
    branch->last = at;
    groups_.push_back(*branch);
    return at;
  }

  // Where they leave the spine, then those that end there, then by the next token, then by number.
  bool before(int32_t a, int32_t b) const {
    if (shared_[a] != shared_[b]) return shared_[a] < shared_[b];
    const auto &x = sequences_[a], &y = sequences_[b];
    const bool a_ends = x.length == shared_[a], b_ends = y.length == shared_[b];
    if (a_ends != b_ends) return a_ends;
    if (!a_ends && x.tokens[shared_[a]] != y.tokens[shared_[b]]) {
      return x.tokens[shared_[a]] < y.tokens[shared_[b]];
    }
    return a < b;
  }

  const std::vector<Sequence<T>>& sequences_;
  std::vector<int32_t> order_;    // sequences that are not empty
  std::vector<int64_t> shared_;   // with the spine of the group at hand
  std::vector<int32_t> leaf_;
  std::vector<Node> nodes_;
  std::vector<Group> groups_;
};

// Each node's place in depth-first order and first row.
struct Layout {
  std::vector<int32_t> order;   // nodes in depth-first order
  std::vector<int32_t> rank;    // node -> its place there
  std::vector<int64_t> start;   // node -> first row
  std::vector<int64_t> size;    // node -> rows of its subtree
};

Layout lay_out(const std::vector<Node>& nodes, const std::vector<int32_t>& leaf) {
  const int32_t num = static_cast<int32_t>(nodes.size());
  Layout out;
  out.start.assign(num, 0);
  out.size.assign(num, 0);
  out.order.resize(num);
  out.rank.resize(num);
  std::vector<int32_t> first(num, std::numeric_limits<int32_t>::max());  // sequence below the node
  std::vector<int32_t> count(num, 0);                                    // nodes of the subtree
  for (int32_t i = static_cast<int32_t>(leaf.size()) - 1; i >= 0; --i) {
    if (leaf[i] >= 0) first[leaf[i]] = i;
  }
  for (int32_t n = num - 1; n >= 0; --n) {
    out.size[n] += nodes[n].end - nodes[n].begin;
    ++count[n];
    const int32_t parent = nodes[n].parent;
    if (parent < 0) continue;
    out.size[parent] += out.size[n];
    count[parent] += count[n];
    first[parent] = std::min(first[parent], first[n]);
  }
  std::vector<int32_t> siblings(num);
  std::iota(siblings.begin(), siblings.end(), 0);
  std::sort(siblings.begin(), siblings.end(), [&](int32_t a, int32_t b) {
    if (nodes[a].parent != nodes[b].parent) return nodes[a].parent < nodes[b].parent;
    if (nodes[a].parent >= 0 && out.size[a] != out.size[b]) return out.size[a] > out.size[b];
    return first[a] < first[b];
  });
  // Parents have smaller numbers, so a parent is placed before its children are.
  std::vector<int64_t> next_row(num + 1, 0);
  std::vector<int32_t> next_rank(num + 1, 0);
  for (int32_t n : siblings) {
    const int32_t slot = nodes[n].parent + 1;
    out.start[n] = next_row[slot];
    out.rank[n] = next_rank[slot];
    next_row[slot] += out.size[n];
    next_rank[slot] += count[n];
    next_row[n + 1] = out.start[n] + nodes[n].end - nodes[n].begin;
    next_rank[n + 1] = out.rank[n] + 1;
    out.order[out.rank[n]] = n;
  }
  if (next_row[0] > kMaxRows) {
    throw std::length_error("plan_tree: the forest has " + std::to_string(next_row[0]) +
                            " rows; int32 cannot number them: plan fewer sequences at once");
  }
  return out;
}

template <class T>
void copy_tokens(const Sequence<T>& sequence, const Node& node, int32_t owner, int32_t* out) {
  bool fits = true;
  for (int64_t i = node.begin; i < node.end; ++i) {
    const int32_t token = static_cast<int32_t>(sequence.tokens[i]);
    fits &= static_cast<T>(token) == sequence.tokens[i];
    out[i - node.begin] = token;
  }
  if (!fits) {
    throw std::invalid_argument("plan_tree: sequence " + std::to_string(owner) +
                                " has a token id that is not an int32");
  }
}

}  // namespace

template <class T>
Forest plant(const std::vector<Sequence<T>>& sequences) {
  const Trie<T> trie(sequences);
  const auto& nodes = trie.nodes();
  const Layout layout = lay_out(nodes, trie.leaf());
  int64_t rows = 0;
  for (const Node& node : nodes) rows += node.end - node.begin;
  Forest out;
  out.tokens.resize(rows);
  out.position.resize(rows);
  out.subtree_end.resize(rows);
  for (int32_t n : layout.order) {
    const Node& node = nodes[n];
    const int64_t start = layout.start[n], length = node.end - node.begin;
    copy_tokens(sequences[node.owner], node, node.owner, out.tokens.data() + start);
    std::iota(out.position.begin() + start, out.position.begin() + start + length,
              static_cast<int32_t>(node.begin));
    std::fill_n(out.subtree_end.begin() + start, length,
                static_cast<int32_t>(start + layout.size[n]));
    out.num_pairs += length * node.begin + length * (length + 1) / 2;
    out.segment_start.push_back(static_cast<int32_t>(start));
    out.segment_parent.push_back(node.parent < 0 ? -1 : layout.rank[node.parent]);
    out.segment_depth.push_back(static_cast<int32_t>(node.begin));
  }
  out.segment_start.push_back(static_cast<int32_t>(rows));
  out.leaf.reserve(sequences.size());
  for (int32_t node : trie.leaf()) out.leaf.push_back(node < 0 ? -1 : layout.rank[node]);
  return out;
}

template Forest plant<int32_t>(const std::vector<Sequence<int32_t>>&);
template Forest plant<int64_t>(const std::vector<Sequence<int64_t>>&);

}  // namespace m2plan
