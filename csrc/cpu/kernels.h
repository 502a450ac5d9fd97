// The kernels of one instruction set, as a table; kernels_<isa>.cpp compiles it once for each.
#pragma once

#include "cpu/attend.h"
#include "cpu/linear.h"
#include "cpu/sae_encode.h"
#include "cpu/sae_splice.h"
#include "ops.h"

namespace steerserve {

struct Kernels {
  void (*steer_row)(const SteerDeltaArgs& args, int64_t row, float* scratch);
  void (*decode_columns)(const SaeDecodeArgs& args, int64_t row, int64_t begin, int64_t end, float* scratch);
  EncodeKernel encode;
  void (*splice_columns)(const SaeSpliceArgs& args, const SpliceRow& row, int64_t i, int64_t begin, int64_t end,
                         float* sum);
  void (*scale_heads)(const HeadScaleArgs& args, int64_t row);
  LinearKernel linear;
  AttendKernel attend;
};

// Those of the level in use (see simd.h).
const Kernels& kernels();

extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512;

}  // namespace steerserve
