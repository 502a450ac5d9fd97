#include "cpu/steer_delta_kernel.h"

namespace steerserve {

SteerRow steer_row_scalar(bool x_is_bf16) { return steer_row_for<VecScalar>(x_is_bf16); }

}  // namespace steerserve
