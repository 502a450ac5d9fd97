#include "cpu/kernel_table.h"

namespace steerserve {

extern const Kernels kernels_avx512 = kernels_over<VecAvx512>;

}  // namespace steerserve
