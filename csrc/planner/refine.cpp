// Local search: from a packing that respects the caps to a better balanced one that still does.
#include <algorithm>
#include <numeric>

#include "pack.h"

namespace m2plan {
namespace {

constexpr int64_t kMaxWork = 3'000'000;  // item visits; about 5 ms

struct Exchange {
  int give = -1;  // from the heavy bin
  int take = -1;  // from the light bin, or -1
  double peak = 0.0;
};

class Balancer {
 public:
  Balancer(const PackProblem& p, Bins* bins) : p_(p), bins_(bins), members_(bins->size()) {
    for (int i = 0; i < p.num_items; ++i) members_[bins->bin_of(i)].push_back(i);
    for (auto& m : members_) std::sort(m.begin(), m.end(), by_cost());
  }

  void run() {
    std::vector<int> order(bins_->size());
    std::iota(order.begin(), order.end(), 0);
    while (work_ < kMaxWork) {
      std::sort(order.begin(), order.end(), [&](int a, int b) {
        return bins_->cost(a) != bins_->cost(b) ? bins_->cost(a) < bins_->cost(b) : a < b;
      });
      const int heavy = order.back();
      bool improved = false;
      for (size_t k = 0; k + 1 < order.size() && !improved && work_ < kMaxWork; ++k) {
        improved = improve(heavy, order[k]);
      }
      if (!improved) return;
    }
  }

 private:
  struct ByCost {
    const double* cost;
    bool operator()(int a, int b) const { return cost[a] != cost[b] ? cost[a] < cost[b] : a < b; }
  };
  ByCost by_cost() const { return ByCost{p_.cost}; }

  // Lowers the larger of the two costs, if some move or exchange does.
  bool improve(int heavy, int light) {
    const double gap = bins_->cost(heavy) - bins_->cost(light);
    if (gap <= 0.0) return false;
    Exchange best;
    best.peak = bins_->cost(heavy) - 1e-12 * std::abs(bins_->cost(heavy));
    for (int give : members_[heavy]) {
      if (p_.cost[give] > 0.0 && bins_->count(heavy) > 1) consider(heavy, light, give, -1, &best);
      nearest_takes(heavy, light, give, gap, &best);
    }
    work_ += static_cast<int64_t>(members_[heavy].size()) * 4;
    if (best.give < 0) return false;
    apply(heavy, light, best);
    return true;
  }

  // The light bin's items whose exchange for `give` comes closest to halving the gap.
  void nearest_takes(int heavy, int light, int give, double gap, Exchange* best) {
    const auto& m = members_[light];
    const double target = p_.cost[give] - gap / 2;
    const auto at = std::lower_bound(m.begin(), m.end(), target,
                                     [&](int item, double c) { return p_.cost[item] < c; });
    const int64_t mid = at - m.begin();
    const int64_t size = static_cast<int64_t>(m.size());
    for (int64_t k = std::max<int64_t>(0, mid - 2); k < std::min(size, mid + 2); ++k) {
      consider(heavy, light, give, m[k], best);
    }
  }

  void consider(int heavy, int light, int give, int take, Exchange* best) {
    const double delta = p_.cost[give] - (take < 0 ? 0.0 : p_.cost[take]);
    if (delta <= 0.0) return;
    const double peak = std::max(bins_->cost(heavy) - delta, bins_->cost(light) + delta);
    if (peak >= best->peak) return;
    if (!bins_->fits_exchange(give, take, light) || !bins_->fits_exchange(take, give, heavy)) {
      return;
    }
    *best = Exchange{give, take, peak};
  }

  void apply(int heavy, int light, const Exchange& e) {
    bins_->remove(e.give);
    if (e.take >= 0) bins_->remove(e.take);
    bins_->add(e.give, light);
    if (e.take >= 0) bins_->add(e.take, heavy);
    move_member(heavy, light, e.give);
    if (e.take >= 0) move_member(light, heavy, e.take);
  }

  void move_member(int from, int to, int item) {
    auto& f = members_[from];
    f.erase(std::lower_bound(f.begin(), f.end(), item, by_cost()));
    auto& t = members_[to];
    t.insert(std::lower_bound(t.begin(), t.end(), item, by_cost()), item);
    work_ += static_cast<int64_t>(f.size() + t.size()) / 8;
  }

  const PackProblem& p_;
  Bins* bins_;
  std::vector<std::vector<int>> members_;
  int64_t work_ = 0;
};

}  // namespace

void fill_empty_bins(const PackProblem& p, Bins* bins) {
  std::vector<int> order(p.num_items);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    return p.cost[a] != p.cost[b] ? p.cost[a] > p.cost[b] : a < b;
  });
  size_t next = 0;
  for (int b = 0; b < bins->size(); ++b) {
    if (bins->count(b) > 0) continue;
    while (next < order.size() && bins->count(bins->bin_of(order[next])) <= 1) ++next;
    if (next == order.size()) return;  // fewer items than bins
    const int item = order[next++];
    bins->remove(item);
    bins->add(item, b);
  }
}

void balance(const PackProblem& p, Bins* bins) { Balancer(p, bins).run(); }

}  // namespace m2plan
