#include "cpu/kernel_table.h"

namespace steerserve {

extern const Kernels kernels_scalar = kernels_over<VecScalar>;

}  // namespace steerserve
