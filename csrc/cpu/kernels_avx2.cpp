// The CPU kernels as compiled for avx2: CMakeLists.txt gives this file its -march.
#include "policy_block.h"

#include "head_rows.h"

namespace m2k {
const CpuKernels kAvx2Kernels = {"avx2", policy_block, head_stats, head_merge, head_grad};
}  // namespace m2k
