// The body of head_scale for one row, over a vector type of vec.h; ops.h has the maths.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/row_stats.h"
#include "cpu/vec.h"
#include "ops.h"

namespace steerserve {
namespace {

template <class V, class T>
void scale_heads_of(const HeadScaleArgs& args, int64_t row) {
  for (int64_t entry = args.ptr[row]; entry < args.ptr[row + 1]; ++entry) {
    T* z = static_cast<T*>(args.z) + row * args.z_row_stride + args.head[entry] * args.d_head;
    args.z_norm[entry] = norm<V>(z, args.d_head);
    if (args.scale[entry] == 1.0f) continue;
    for (int64_t i = 0; i < args.d_head; ++i) narrow(widen(z[i]) * args.scale[entry], z + i);
  }
}

template <class V>
void scale_heads(const HeadScaleArgs& args, int64_t row) {
  if (args.z_type == DType::bfloat16) return scale_heads_of<V, BFloat16>(args, row);
  scale_heads_of<V, float>(args, row);
}

}  // namespace
}  // namespace steerserve
