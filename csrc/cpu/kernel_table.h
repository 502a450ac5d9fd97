// All kernels over one vector type. Included only by kernels_<isa>.cpp; see vec.h for why.
#pragma once

#include "cpu/attend_kernel.h"
#include "cpu/head_scale_kernel.h"
#include "cpu/kernels.h"
#include "cpu/linear_kernel.h"
#include "cpu/sae_decode_kernel.h"
#include "cpu/sae_encode_kernel.h"
#include "cpu/sae_splice_kernel.h"
#include "cpu/steer_delta_kernel.h"

namespace steerserve {
namespace {

template <class V>
constexpr Kernels kernels_over{steer_row<V>,   decode_columns<V>, encode_kernel<V>, splice_columns<V>,
                               scale_heads<V>, linear_kernel<V>,  attend_kernel<V>};

}  // namespace
}  // namespace steerserve
