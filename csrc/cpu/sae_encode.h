// sae_encode on the CPU: the parts that the launch (sae_encode.cpp) and the kernels share; ops.h has the maths.
//
// Pre-activations of a panel (product.h) live in a small tile; what is active leaves it as a run, a short sorted list
// for one row (runs.h).
//
//     batch      rows widened or packed once, for all threads
//     panel      kernel: tile of pre-activations, threshold, runs          no synchronisation
//     row        its runs, end to end; of these the k largest
#pragma once

#include <cstdint>

#include "cpu/product.h"
#include "cpu/runs.h"
#include "ops.h"

namespace steerserve {

struct RowStats {
  float norm;
  float scale;  // s of ops.h
  float mean;   // only under kLayerNorm
};

// A batch made ready for a kernel.
struct EncodeBatch {
  const SaeEncodeArgs& args;
  Product product;
  const RowStats* stats;
};

// One way to multiply rows with features.
struct EncodeKernel {
  Packing packing;
  // Packs one group, rows [begin, end) of the batch; `wide` has room for d floats.
  void (*pack)(const SaeEncodeArgs& args, const int32_t* rows, Normalization normalization, int64_t begin, int64_t end,
               void* packed, RowStats* stats, float* wide);
  // Finds the active ones of features [begin, end); `tile` has room for a panel of a row group.
  void (*encode)(const EncodeBatch& batch, int64_t begin, int64_t end, float* tile, Runs& runs);
};

// For bfloat16 rows and weights, at level amx of simd.h; d_sae must not be less than its granule.
extern const EncodeKernel encode_kernel_amx;

// sae_encode for rows[0 .. num_rows) of x, or all if `rows` is null, normalized; also tells what is known of each row.
void encode_rows(const SaeEncodeArgs& args, const int32_t* rows, Normalization normalization, RowStats* stats,
                 int num_threads);

}  // namespace steerserve
