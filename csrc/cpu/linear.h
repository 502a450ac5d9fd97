// linear on the CPU: what the launch (linear.cpp) and the kernels share; ops.h has the maths, product.h the plan.
#pragma once

#include "cpu/product.h"
#include "ops.h"

namespace steerserve {

struct LinearKernel {
  Packing packing;
  // Packs one group, rows [begin, end) of the batch.
  void (*pack)(const LinearArgs& args, int64_t begin, int64_t end, void* packed);
  // Writes features [begin, end) of every row; `tile` has room for a panel of a row group.
  void (*multiply)(const LinearArgs& args, const Product& product, int64_t begin, int64_t end, float* tile);
};

// For bfloat16, at the levels of simd.h of these names; for amx, d_out must not be less than its granule.
extern const LinearKernel linear_kernel_avx512_bf16;
extern const LinearKernel linear_kernel_amx;

}  // namespace steerserve
