// Python binding of the planner: numpy arrays in and out, the GIL released while it works.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "pack.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// cost [n], size [n, k], cap [k] -> (status, num_bins, lower_bound, bin_of int32 [n]); status is
// 0 found, 1 not found, 2 proven impossible. num_bins and max_items: 0 means none given.
py::tuple pack(const Array<double>& cost, const Array<double>& size, const Array<double>& cap,
               int max_items, int num_bins) {
  m2plan::PackProblem problem;
  problem.num_items = static_cast<int>(cost.size());
  problem.num_resources = static_cast<int>(cap.size());
  problem.cost = cost.data();
  problem.size = size.data();
  problem.cap.assign(cap.data(), cap.data() + cap.size());
  problem.max_items = max_items;
  if (size.size() != cost.size() * cap.size()) {
    throw py::value_error("size: expected one row per item and one column per cap");
  }
  m2plan::PackResult result;
  {
    py::gil_scoped_release release;
    result = m2plan::pack(problem, num_bins);
  }
  py::array_t<int32_t> bin_of(static_cast<py::ssize_t>(result.bin_of.size()));
  std::copy(result.bin_of.begin(), result.bin_of.end(), bin_of.mutable_data());
  return py::make_tuple(static_cast<int>(result.status), result.num_bins, result.lower_bound,
                        bin_of);
}

}  // namespace

PYBIND11_MODULE(_planner, m, py::mod_gil_not_used()) {
  m.doc() = "Balanced packing, in C++; see m2kernels.pack_balanced.";
  m.def("pack", &pack, py::arg("cost"), py::arg("size"), py::arg("cap"), py::arg("max_items"),
        py::arg("num_bins"));
}
