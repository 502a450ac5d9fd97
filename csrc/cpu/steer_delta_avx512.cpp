#include "cpu/steer_delta_kernel.h"

namespace steerserve {

SteerRow steer_row_avx512(bool x_is_bf16) { return steer_row_for<VecAvx512>(x_is_bf16); }

}  // namespace steerserve
