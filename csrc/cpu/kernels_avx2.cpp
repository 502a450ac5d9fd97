#include "cpu/kernel_table.h"

namespace steerserve {

extern const Kernels kernels_avx2 = kernels_over<VecAvx2>;

}  // namespace steerserve
