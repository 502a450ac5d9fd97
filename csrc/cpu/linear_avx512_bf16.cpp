#include "cpu/linear_kernel.h"

namespace steerserve {

extern const LinearKernel linear_kernel_avx512_bf16 = linear_kernel<PairsAvx512>;

}  // namespace steerserve
