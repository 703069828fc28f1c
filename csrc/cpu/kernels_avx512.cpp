// The CPU kernels as compiled for avx512: CMakeLists.txt gives this file its -march.
#include "policy_block.h"

#include "head_rows.h"
#include "head_tiles.h"

namespace m2k {
const CpuKernels kAvx512Kernels = {"avx512", policy_block, head_stats,
                                    head_merge, head_grad, head_tiles, head_lanes};
}  // namespace m2k
