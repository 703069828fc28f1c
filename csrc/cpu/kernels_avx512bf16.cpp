// The LM head's GEMMs with AVX-512's bf16 dot products: CMakeLists.txt gives this file its -march.
#include "head_products_bf16.h"
#include "head_tiles.h"

namespace m2k {
const Bf16Kernels kBf16Kernels = {head_tiles_dot, head_dx_dot};
}  // namespace m2k
