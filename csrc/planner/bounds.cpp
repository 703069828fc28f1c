// What can be proven about a packing problem: lower bounds, and an exhaustive search for a few
// items.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "pack.h"

namespace m2plan {
namespace {

// A sum of n doubles may be off by n ulp: never round a quotient up because of that.
int safe_ceil(double x) { return static_cast<int>(std::ceil(x * (1.0 - 1e-12) - 1e-12)); }

// Martello and Toth's L2 for one resource: items over half a cap cannot share a bin, and what they
// leave free must hold the middle-sized ones.
int resource_bound(std::vector<double> size, double cap) {
  std::sort(size.begin(), size.end(), std::greater<double>());
  const int n = static_cast<int>(size.size());
  std::vector<double> prefix(n + 1, 0.0);
  for (int i = 0; i < n; ++i) prefix[i + 1] = prefix[i] + size[i];
  if (prefix[n] <= 0.0) return 1;
  const auto count_above = [&](double x) {
    return static_cast<int>(std::partition_point(size.begin(), size.end(),
                                                 [x](double s) { return s > x; }) -
                            size.begin());
  };
  int best = std::max(1, safe_ceil(prefix[n] / cap));
  const int big = count_above(cap / 2);
  best = std::max(best, big);
  for (int i = big; i < n; ++i) {
    const double small = size[i];  // every item below it is left out of this bound
    if (small <= 0.0) break;
    const int huge = count_above(cap - small);
    const double free = (big - huge) * cap - (prefix[big] - prefix[huge]);
    best = std::max(best, big + std::max(0, safe_ceil((prefix[i + 1] - prefix[big] - free) / cap)));
  }
  return best;
}

class Exhaustive {
 public:
  Exhaustive(const PackProblem& p, int64_t max_nodes, Bins* bins)
      : p_(p), bins_(bins), nodes_left_(max_nodes), order_(p.num_items) {
    std::iota(order_.begin(), order_.end(), 0);
    std::vector<double> key(p.num_items, 0.0);
    for (int i = 0; i < p.num_items; ++i) {
      for (int r = 0; r < p.num_resources; ++r) {
        if (p.cap[r] > 0) {
          key[i] = std::max(key[i], p.size[size_t(i) * p.num_resources + r] / p.cap[r]);
        }
      }
    }
    std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return key[a] > key[b]; });
  }

  Search run() {
    if (place(0, 0)) return Search::kFound;
    return nodes_left_ < 0 ? Search::kGaveUp : Search::kImpossible;
  }

 private:
  bool place(int depth, int used) {
    if (depth == p_.num_items) return true;
    const int item = order_[depth];
    const int limit = std::min(used + 1, bins_->size());  // empty bins are all alike
    for (int b = 0; b < limit; ++b) {
      if (!bins_->fits(item, b)) continue;
      if (--nodes_left_ < 0) return false;
      bins_->add(item, b);
      if (place(depth + 1, std::max(used, b + 1))) return true;
      bins_->remove(item);
    }
    return false;
  }

  const PackProblem& p_;
  Bins* bins_;
  int64_t nodes_left_;
  std::vector<int> order_;
};

}  // namespace

int lower_bound(const PackProblem& p) {
  int best = 1;
  if (p.max_items > 0) best = (p.num_items + p.max_items - 1) / p.max_items;
  for (int r = 0; r < p.num_resources; ++r) {
    std::vector<double> size(p.num_items);
    for (int i = 0; i < p.num_items; ++i) size[i] = p.size[size_t(i) * p.num_resources + r];
    best = std::max(best, resource_bound(std::move(size), p.cap[r]));
  }
  return best;
}

Search search_all(const PackProblem& p, int num_bins, int64_t max_nodes, Bins* bins) {
  *bins = Bins(p, num_bins);
  return Exhaustive(p, max_nodes, bins).run();
}

}  // namespace m2plan
