// Balanced packing of items into bins: largest first, then refinement. Plain C++17.
//
// A problem has one cost per item (what is balanced) and any number of capped resources (what is
// never exceeded). The number of items in a bin may be capped too.
#pragma once

#include <cstdint>
#include <vector>

namespace m2plan {

struct PackProblem {
  int num_items = 0;
  int num_resources = 0;
  const double* cost = nullptr;  // [num_items]
  const double* size = nullptr;  // [num_items, num_resources], row-major
  std::vector<double> cap;       // [num_resources]
  int max_items = 0;             // 0: no cap
};

enum class PackStatus { kFound = 0, kNotFound = 1, kImpossible = 2 };

struct PackResult {
  PackStatus status = PackStatus::kNotFound;
  int num_bins = 0;
  int lower_bound = 1;            // no packing has fewer bins
  std::vector<int32_t> bin_of;    // [num_items]
};

// num_bins > 0: exactly that many bins, balanced. num_bins == 0: as few as are found.
PackResult pack(const PackProblem& problem, int num_bins);

// ---- shared by the planner's own files

// Loads of a partial packing, kept up to date as items move.
class Bins {
 public:
  Bins(const PackProblem& problem, int num_bins);

  bool fits(int item, int bin) const;
  // Would `bin` hold after `out` leaves and `in` enters? Either may be -1.
  bool fits_exchange(int in, int out, int bin) const;
  void add(int item, int bin);
  void remove(int item);
  int add_bin();
  // What is left of the tightest resource after `item` enters, as a fraction of its cap.
  double slack_after(int item, int bin) const;

  int size() const { return static_cast<int>(cost_.size()); }
  double cost(int bin) const { return cost_[bin]; }
  int count(int bin) const { return count_[bin]; }
  int bin_of(int item) const { return bin_of_[item]; }
  const std::vector<int32_t>& assignment() const { return bin_of_; }

 private:
  const PackProblem* p_;
  std::vector<double> cost_, load_;
  std::vector<int> count_;
  std::vector<int32_t> bin_of_;
};

// bounds.cpp: the fewest bins that the caps allow, proven; and a search over all packings of a
// few items, which settles what the heuristics could not.
int lower_bound(const PackProblem& problem);
enum class Search { kFound, kImpossible, kGaveUp };
Search search_all(const PackProblem& problem, int num_bins, int64_t max_nodes, Bins* bins);

// refine.cpp: moves and exchanges that lower the most expensive bin.
void fill_empty_bins(const PackProblem& problem, Bins* bins);
void balance(const PackProblem& problem, Bins* bins);

}  // namespace m2plan
