// The CPU kernels as compiled for avx512: CMakeLists.txt gives this file its -march.
#include "policy_block.h"

namespace m2k {
const CpuKernels kAvx512Kernels = {"avx512", policy_block};
}  // namespace m2k
