// sae_encode on the CPU: the parts that the launch (sae_encode.cpp) and the kernels share; ops.h has the maths.
//
// Each thread owns a range of features and passes all rows over it, a panel of features at a time: a panel is small
// enough to stay in the second-level cache while every row of the batch meets it, so weights come from memory once a
// batch. Pre-activations of a panel live in a small tile; what is active leaves it as a run, a short sorted list for
// one row (runs.h).
//
//     batch      rows widened or packed once, for all threads
//     panel      kernel: tile of pre-activations, threshold, runs          no synchronisation
//     row        its runs, end to end; of these the k largest
//
// A pre-activation is summed in an order fixed by d alone: it depends neither on the rest of the batch nor on threads.
//
// Roofline. At one row every weight is used once: 2 operations for 2 or 4 bytes, so the bound is the read bandwidth
// of memory, d_sae · d · sizeof(weight) / bandwidth. A batch shares the reads. Where memory gives a core 7 bytes a
// cycle, arithmetic becomes the bound at about 20 rows in float (64 operations a cycle) and 150 in bfloat16 with AMX
// (1024).
#pragma once

#include <cstdint>

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
  const void* packed;
  const RowStats* stats;
  int64_t panel_size;
};

// One way to multiply rows with features.
struct EncodeKernel {
  int64_t granule;    // features multiplied together: panels begin at multiples of it
  int64_t row_group;  // rows packed, and multiplied, together
  // Bytes of a packed batch.
  int64_t (*packed_size)(int64_t num_rows, int64_t d);
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
