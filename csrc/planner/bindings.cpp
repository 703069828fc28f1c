// Python binding of the planner: numpy arrays in and out, the GIL released while it works.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "pack.h"
#include "tree.h"

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

// The vector's memory, not a copy.
py::array_t<int32_t> as_array(std::vector<int32_t>&& values) {
  auto owner = std::make_unique<std::vector<int32_t>>(std::move(values));
  const auto size = static_cast<py::ssize_t>(owner->size());
  int32_t* data = owner->data();
  py::capsule free(owner.get(), [](void* p) { delete static_cast<std::vector<int32_t>*>(p); });
  owner.release();
  return py::array_t<int32_t>({size}, data, free);
}

template <class T>
std::vector<m2plan::Sequence<T>> sequences_of(const py::list& arrays, const Array<int64_t>& key) {
  std::vector<m2plan::Sequence<T>> out;
  out.reserve(arrays.size());
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto array = py::cast<py::array_t<T, py::array::c_style>>(arrays[i]);
    if (array.ptr() != py::handle(arrays[i]).ptr()) {
      throw py::value_error("sequences: expected C-contiguous arrays, all int32 or all int64");
    }
    out.push_back({array.data(), array.size(), key.at(i)});
  }
  return out;
}

template <class T>
std::pair<m2plan::Forest, m2plan::Tiles> grow(const py::list& arrays, const Array<int64_t>& key,
                                              int32_t block, int32_t kv_block, double min_gain) {
  const auto sequences = sequences_of<T>(arrays, key);
  py::gil_scoped_release release;
  m2plan::Forest forest = m2plan::plant(sequences);
  if (min_gain > 0) {
    kv_block = m2plan::choose_kv_block(forest.subtree_end, block, kv_block, min_gain);
  }
  m2plan::Tiles tiles = m2plan::cut_tiles(forest.subtree_end, block, kv_block);
  return {std::move(forest), std::move(tiles)};
}

// Arrays (all int32, or all int64 with wide), key int64 [n] -> names of m2plan::Forest and Tiles to
// their values. A positive min_gain makes kv_block the finer of two choices, see choose_kv_block.
py::dict plan_tree(const py::list& arrays, const Array<int64_t>& key, bool wide, int32_t block,
                   int32_t kv_block, double min_gain) {
  auto [forest, tiles] = wide ? grow<int64_t>(arrays, key, block, kv_block, min_gain)
                              : grow<int32_t>(arrays, key, block, kv_block, min_gain);
  py::dict out;
  out["tokens"] = as_array(std::move(forest.tokens));
  out["position"] = as_array(std::move(forest.position));
  out["subtree_end"] = as_array(std::move(forest.subtree_end));
  out["segment_start"] = as_array(std::move(forest.segment_start));
  out["segment_parent"] = as_array(std::move(forest.segment_parent));
  out["segment_depth"] = as_array(std::move(forest.segment_depth));
  out["leaf"] = as_array(std::move(forest.leaf));
  out["num_pairs"] = forest.num_pairs;
  out["min_end"] = as_array(std::move(tiles.min_end));
  out["max_end"] = as_array(std::move(tiles.max_end));
  out["start"] = as_array(std::move(tiles.start));
  out["full"] = as_array(std::move(tiles.full));
  out["kv"] = as_array(std::move(tiles.kv));
  out["full_end"] = as_array(std::move(tiles.full_end));
  out["end"] = as_array(std::move(tiles.end));
  out["forward_order"] = as_array(std::move(tiles.forward_order));
  out["backward_order"] = as_array(std::move(tiles.backward_order));
  out["area"] = tiles.area;
  out["kv_block"] = tiles.kv_block;
  return out;
}

}  // namespace

PYBIND11_MODULE(_planner, m, py::mod_gil_not_used()) {
  m.doc() = "Balanced packing and prefix forests; see m2kernels.pack_balanced and plan_tree.";
  m.def("pack", &pack, py::arg("cost"), py::arg("size"), py::arg("cap"), py::arg("max_items"),
        py::arg("num_bins"));
  m.def("plan_tree", &plan_tree, py::arg("sequences"), py::arg("key"), py::arg("wide"),
        py::arg("block"), py::arg("kv_block"), py::arg("min_gain"));
}
