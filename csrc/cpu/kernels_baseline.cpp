// The CPU kernels as compiled for baseline: CMakeLists.txt gives this file its -march.
#include "policy_block.h"

namespace m2k {
const CpuKernels kBaselineKernels = {"baseline", policy_block};
}  // namespace m2k
