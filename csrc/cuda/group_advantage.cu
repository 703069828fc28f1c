// Group advantage on Hopper: one warp a row, which walks over all rows and keeps those with its
// label. B^2 reads sound wasteful, but labels may come in any order, B is thousands, everything
// stays in L1, and it is one launch with a fixed order of summation: no sort, no atomics.
#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace m2k {
namespace {

constexpr int kWarpsPerBlock = 8;

__device__ __forceinline__ int64_t index_at(const IndexVector& v, int64_t i) {
  return v.wide ? static_cast<const int64_t*>(v.data)[i] : static_cast<const int32_t*>(v.data)[i];
}

__device__ __forceinline__ double warp_sum(double v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

__global__ void __launch_bounds__(kWarpsPerBlock * 32) advantage_kernel(GroupAdvantageArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= a.num_rows) return;
  if (a.valid && !a.valid[row]) {
    if (lane == 0) a.advantage[row] = 0.0f;
    return;
  }
  const int64_t label = index_at(a.group, row);
  double sum = 0.0, count = 0.0;
  for (int64_t j = lane; j < a.num_rows; j += 32) {
    if (index_at(a.group, j) == label && (!a.valid || a.valid[j])) {
      sum += a.reward[j];
      count += 1.0;
    }
  }
  const double n = warp_sum(count);
  const double mean = warp_sum(sum) / n;
  double scale = a.leave_one_out && n > 1.0 ? n / (n - 1.0) : 1.0;
  if (a.divide_by_std) {
    double squares = 0.0;
    for (int64_t j = lane; j < a.num_rows; j += 32) {
      if (index_at(a.group, j) == label && (!a.valid || a.valid[j])) {
        const double d = a.reward[j] - mean;
        squares += d * d;
      }
    }
    squares = warp_sum(squares);
    scale /= (n > 1.0 ? sqrt(squares / (n - 1.0)) : 0.0) + a.eps;
  }
  const double d = a.reward[row] - mean;
  if (lane == 0) a.advantage[row] = d == 0.0 ? 0.0f : static_cast<float>(d * scale);
}

}  // namespace

int group_advantage_sm90(const GroupAdvantageArgs& a, void* stream) {
  if (a.num_rows == 0) return 0;
  const unsigned grid = static_cast<unsigned>((a.num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
  advantage_kernel<<<grid, kWarpsPerBlock * 32, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace m2k
