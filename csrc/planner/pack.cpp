#include "pack.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>

namespace m2plan {
namespace {

constexpr int kSearchItems = 24;              // an exhaustive search is tried up to this many
constexpr int64_t kSearchNodes = 300'000;     // and this long: about 10 ms
constexpr int64_t kRetryWork = 20'000'000;    // bin visits spent on shuffled orders
constexpr int kMaxRetries = 48;

using Order = std::vector<int>;

double normalised(const PackProblem& p, int item, int resource) {
  const double cap = p.cap[resource];
  return cap > 0.0 ? p.size[size_t(item) * p.num_resources + resource] / cap : 0.0;
}

// Orders to try, most useful first: by cost, by the largest share of any cap, by the sum of
// shares, then by each resource alone.
std::vector<std::vector<double>> sort_keys(const PackProblem& p) {
  const int n = p.num_items;
  std::vector<std::vector<double>> keys;
  if (p.num_resources > 0) {
    std::vector<double> largest(n, 0.0), sum(n, 0.0);
    for (int i = 0; i < n; ++i) {
      for (int r = 0; r < p.num_resources; ++r) {
        largest[i] = std::max(largest[i], normalised(p, i, r));
        sum[i] += normalised(p, i, r);
      }
    }
    keys.push_back(std::move(largest));
    keys.push_back(std::move(sum));
    for (int r = 0; r < p.num_resources && p.num_resources > 1; ++r) {
      std::vector<double> one(n);
      for (int i = 0; i < n; ++i) one[i] = normalised(p, i, r);
      keys.push_back(std::move(one));
    }
  } else {
    keys.emplace_back(p.cost, p.cost + n);
  }
  return keys;
}

Order descending(const std::vector<double>& key) {
  Order order(key.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return key[a] != key[b] ? key[a] > key[b] : a < b; });
  return order;
}

// Largest first into the cheapest bin that has room. Empty bins come first among equals, so no
// bin stays empty while there are items.
bool place_cheapest(const PackProblem& p, const Order& order, Bins* bins) {
  using Entry = std::tuple<double, int, int>;  // cost, count, bin
  std::set<Entry> queue;
  for (int b = 0; b < bins->size(); ++b) queue.insert({0.0, 0, b});
  for (int item : order) {
    auto it = queue.begin();
    while (it != queue.end() && !bins->fits(item, std::get<2>(*it))) ++it;
    if (it == queue.end()) return false;
    const int b = std::get<2>(*it);
    queue.erase(it);
    bins->add(item, b);
    queue.insert({bins->cost(b), bins->count(b), b});
  }
  (void)p;
  return true;
}

// Best fit: the bin where the tightest resource leaves least. With `open`, a new bin is opened
// when none has room; otherwise the items that found no room are put in `left`.
void place_tightest(const Order& order, bool open, Bins* bins, std::vector<int>* left) {
  for (int item : order) {
    int best = -1;
    double best_slack = std::numeric_limits<double>::infinity();
    for (int b = 0; b < bins->size(); ++b) {
      if (!bins->fits(item, b)) continue;
      const double slack = bins->slack_after(item, b);
      if (slack < best_slack) {
        best = b;
        best_slack = slack;
      }
    }
    if (best < 0 && open) best = bins->add_bin();
    if (best >= 0) {
      bins->add(item, best);
    } else {
      left->push_back(item);
    }
  }
}

// Puts `item` in a bin by pushing one of its items to another bin.
bool place_by_ejection(const PackProblem& p, int item, Bins* bins) {
  for (int out = 0; out < p.num_items; ++out) {
    const int b = bins->bin_of(out);
    if (b < 0 || !bins->fits_exchange(item, out, b)) continue;
    for (int to = 0; to < bins->size(); ++to) {
      if (to == b || !bins->fits(out, to)) continue;
      bins->remove(out);
      bins->add(out, to);
      bins->add(item, b);
      return true;
    }
  }
  return false;
}

bool place_left(const PackProblem& p, std::vector<int> left, Bins* bins) {
  if (left.size() > 64) return false;
  for (int item : left) {
    if (!place_by_ejection(p, item, bins)) return false;
  }
  return true;
}

uint64_t next_random(uint64_t* state) {  // splitmix64
  uint64_t z = (*state += 0x9e3779b97f4a7c15ULL);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

bool try_order(const PackProblem& p, const Order& order, int num_bins, Bins* bins) {
  *bins = Bins(p, num_bins);
  std::vector<int> left;
  place_tightest(order, false, bins, &left);
  return left.empty() || place_left(p, std::move(left), bins);
}

// Any packing into num_bins that respects the caps, by every means there is.
PackStatus find_feasible(const PackProblem& p, int num_bins, Bins* bins) {
  const auto keys = sort_keys(p);
  for (const auto& key : keys) {
    const Order order = descending(key);
    *bins = Bins(p, num_bins);
    if (place_cheapest(p, order, bins)) return PackStatus::kFound;
    if (try_order(p, order, num_bins, bins)) return PackStatus::kFound;
  }
  if (p.num_items <= kSearchItems) {
    const Search found = search_all(p, num_bins, kSearchNodes, bins);
    if (found == Search::kFound) return PackStatus::kFound;
    if (found == Search::kImpossible) return PackStatus::kImpossible;
  }
  const int64_t work = static_cast<int64_t>(p.num_items) * num_bins * (p.num_resources + 1);
  const int64_t retries = std::min<int64_t>(kMaxRetries, kRetryWork / std::max<int64_t>(work, 1));
  uint64_t state = 1;
  for (int64_t t = 0; t < retries; ++t) {
    std::vector<double> key = keys[t % keys.size()];
    const double spread = 0.1 + 0.4 * static_cast<double>(t) / kMaxRetries;
    for (double& k : key) {
      const double u = static_cast<double>(next_random(&state) >> 11) * 0x1p-53;
      k *= 1.0 + spread * (u - 0.5);
    }
    if (try_order(p, descending(key), num_bins, bins)) return PackStatus::kFound;
  }
  return PackStatus::kNotFound;
}

// Exactly num_bins bins: the largest-first packing when the caps let it through, else whatever
// respects them; then refined.
PackStatus pack_balanced(const PackProblem& p, int num_bins, Bins* bins) {
  *bins = Bins(p, num_bins);
  if (!place_cheapest(p, descending({p.cost, p.cost + p.num_items}), bins)) {
    const PackStatus status = find_feasible(p, num_bins, bins);
    if (status != PackStatus::kFound) return status;
  }
  fill_empty_bins(p, bins);
  balance(p, bins);
  return PackStatus::kFound;
}

// As few bins as are found: best fit with every order, then fewer bins while that works.
void pack_fewest(const PackProblem& p, int bound, Bins* bins) {
  int fewest = p.num_items + 1;
  for (const auto& key : sort_keys(p)) {
    Bins trial(p, 0);
    place_tightest(descending(key), true, &trial, nullptr);
    if (trial.size() < fewest) {
      fewest = trial.size();
      *bins = std::move(trial);
    }
  }
  while (fewest > bound) {
    Bins trial(p, 0);
    if (find_feasible(p, fewest - 1, &trial) != PackStatus::kFound) break;
    fewest -= 1;
    *bins = std::move(trial);
  }
  Bins balanced(p, fewest);
  const Order order = descending({p.cost, p.cost + p.num_items});
  if (place_cheapest(p, order, &balanced)) *bins = std::move(balanced);
  balance(p, bins);
}

// Incremental loads may drift by an ulp: add every bin up again, in item order, as a caller would.
bool caps_hold(const PackProblem& p, const std::vector<int32_t>& bin_of, int num_bins) {
  std::vector<double> load(size_t(num_bins) * p.num_resources, 0.0);
  for (int i = 0; i < p.num_items; ++i) {
    for (int r = 0; r < p.num_resources; ++r) {
      load[size_t(bin_of[i]) * p.num_resources + r] += p.size[size_t(i) * p.num_resources + r];
    }
  }
  for (size_t k = 0; k < load.size(); ++k) {
    if (load[k] > p.cap[k % p.num_resources]) return false;
  }
  return true;
}

PackResult pack_once(const PackProblem& p, int num_bins) {
  PackResult result;
  result.lower_bound = lower_bound(p);
  result.num_bins = num_bins;
  if (num_bins > 0 && result.lower_bound > num_bins) {
    result.status = PackStatus::kImpossible;
    return result;
  }
  Bins bins(p, 0);
  if (num_bins > 0) {
    result.status = pack_balanced(p, num_bins, &bins);
  } else {
    pack_fewest(p, result.lower_bound, &bins);
    result.num_bins = bins.size();
    result.status = PackStatus::kFound;
  }
  result.bin_of = bins.assignment();
  return result;
}

}  // namespace

Bins::Bins(const PackProblem& p, int num_bins)
    : p_(&p),
      cost_(num_bins, 0.0),
      load_(size_t(num_bins) * p.num_resources, 0.0),
      count_(num_bins, 0),
      bin_of_(p.num_items, -1) {}

bool Bins::fits(int item, int bin) const { return fits_exchange(item, -1, bin); }

bool Bins::fits_exchange(int in, int out, int bin) const {
  const int count = count_[bin] + (in >= 0) - (out >= 0);
  if (p_->max_items > 0 && count > p_->max_items) return false;
  const int resources = p_->num_resources;
  for (int r = 0; r < resources; ++r) {
    double load = load_[size_t(bin) * resources + r];
    if (out >= 0) load -= p_->size[size_t(out) * resources + r];
    if (in >= 0) load += p_->size[size_t(in) * resources + r];
    // One item alone always fits: the caller has checked every item against the caps.
    if (load > p_->cap[r] && count > 1) return false;
  }
  return true;
}

void Bins::add(int item, int bin) {
  bin_of_[item] = bin;
  cost_[bin] += p_->cost[item];
  count_[bin] += 1;
  for (int r = 0; r < p_->num_resources; ++r) {
    load_[size_t(bin) * p_->num_resources + r] += p_->size[size_t(item) * p_->num_resources + r];
  }
}

void Bins::remove(int item) {
  const int bin = bin_of_[item];
  bin_of_[item] = -1;
  cost_[bin] -= p_->cost[item];
  count_[bin] -= 1;
  for (int r = 0; r < p_->num_resources; ++r) {
    load_[size_t(bin) * p_->num_resources + r] -= p_->size[size_t(item) * p_->num_resources + r];
  }
}

int Bins::add_bin() {
  cost_.push_back(0.0);
  count_.push_back(0);
  load_.resize(load_.size() + p_->num_resources, 0.0);
  return size() - 1;
}

double Bins::slack_after(int item, int bin) const {
  double tightest = std::numeric_limits<double>::infinity();
  for (int r = 0; r < p_->num_resources; ++r) {
    if (p_->cap[r] <= 0.0) continue;
    const size_t k = size_t(bin) * p_->num_resources + r;
    const double load = load_[k] + p_->size[size_t(item) * p_->num_resources + r];
    tightest = std::min(tightest, 1.0 - load / p_->cap[r]);
  }
  // No capped resource: only the number of items can be tight.
  return std::isinf(tightest) ? -static_cast<double>(count_[bin]) : tightest;
}

PackResult pack(const PackProblem& problem, int num_bins) {
  PackResult result = pack_once(problem, num_bins);
  if (result.status != PackStatus::kFound ||
      caps_hold(problem, result.bin_of, result.num_bins)) {
    return result;
  }
  // Only non-integral sizes come here: stay clear of the caps by more than a sum can drift.
  PackProblem tighter = problem;
  for (double& cap : tighter.cap) cap *= 1.0 - 1e-15 * (problem.num_items + 16.0);
  PackResult again = pack_once(tighter, num_bins);
  if (again.status == PackStatus::kImpossible) again.status = PackStatus::kNotFound;
  if (again.status == PackStatus::kFound &&
      !caps_hold(problem, again.bin_of, again.num_bins)) {
    again.status = PackStatus::kNotFound;
  }
  return again;
}

}  // namespace m2plan
