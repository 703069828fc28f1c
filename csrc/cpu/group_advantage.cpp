// Group advantage on the CPU: rows are sorted by label once, then each group is summed in double,
// in row order. One file for every instruction set: the sort, not the arithmetic, takes the time.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu_kernels.h"

namespace m2k {
namespace {

void one_group(const GroupAdvantageArgs& a, const int64_t* rows, int64_t num_rows) {
  double sum = 0.0;
  for (int64_t k = 0; k < num_rows; ++k) sum += a.reward[rows[k]];
  const double n = static_cast<double>(num_rows);
  const double mean = sum / n;  // of n equal fp32 values: exact in double, hence exact zeros below
  double squares = 0.0;
  for (int64_t k = 0; k < num_rows; ++k) {
    const double d = a.reward[rows[k]] - mean;
    squares += d * d;
  }
  double scale = a.leave_one_out && num_rows > 1 ? n / (n - 1.0) : 1.0;
  if (a.divide_by_std) {
    const double std = num_rows > 1 ? std::sqrt(squares / (n - 1.0)) : 0.0;
    scale /= std + a.eps;
  }
  for (int64_t k = 0; k < num_rows; ++k) {
    const double d = a.reward[rows[k]] - mean;
    a.advantage[rows[k]] = d == 0.0 ? 0.0f : static_cast<float>(d * scale);
  }
}

}  // namespace

void group_advantage_cpu(const GroupAdvantageArgs& a) {
  std::vector<int64_t> label(static_cast<size_t>(a.num_rows));
  std::vector<int64_t> rows;
  rows.reserve(label.size());
  for (int64_t i = 0; i < a.num_rows; ++i) {
    label[i] = a.group.wide ? static_cast<const int64_t*>(a.group.data)[i]
                            : static_cast<const int32_t*>(a.group.data)[i];
    a.advantage[i] = 0.0f;
    if (!a.valid || a.valid[i]) rows.push_back(i);
  }
  const auto before = [&](int64_t x, int64_t y) { return label[x] < label[y]; };
  if (!std::is_sorted(rows.begin(), rows.end(), before)) {
    std::stable_sort(rows.begin(), rows.end(), before);
  }
  size_t begin = 0;
  for (size_t k = 1; k <= rows.size(); ++k) {
    if (k == rows.size() || label[rows[k]] != label[rows[begin]]) {
      one_group(a, rows.data() + begin, static_cast<int64_t>(k - begin));
      begin = k;
    }
  }
}

}  // namespace m2k
