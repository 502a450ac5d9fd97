#include "cpu/steer_delta_kernel.h"

namespace steerserve {

SteerRow steer_row_avx2(bool x_is_bf16) { return steer_row_for<VecAvx2>(x_is_bf16); }

}  // namespace steerserve
