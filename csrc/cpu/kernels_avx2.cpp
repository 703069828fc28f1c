// The CPU kernels as compiled for avx2: CMakeLists.txt gives this file its -march.
#include "policy_block.h"

namespace m2k {
const CpuKernels kAvx2Kernels = {"avx2", policy_block};
}  // namespace m2k
