// The LM head's GEMM with AVX-512's bf16 dot products: CMakeLists.txt gives this file its -march.
#include "head_tiles.h"

namespace m2k {
const HeadTilesFn kHeadTilesBf16 = head_tiles_dot;
}  // namespace m2k
