// sae_splice on the CPU: what the launch (sae_splice.cpp) and the kernel share; ops.h has the maths.
//
// A full encode (sae_encode.h), the edits of each row against its sorted list of active features, and a sparse decode
// that overwrites x. Against a dense encode and decode it reads half of the weights.
#pragma once

#include <cstdint>

#include "cpu/sae_encode.h"
#include "ops.h"

namespace steerserve {

// One row to be rewritten.
struct SpliceRow {
  RowStats stats;
  bool is_known;  // its features are: neither broken nor more than the capacity
  // Edits that change something.
  const int32_t* features;
  const float* edits;
  int64_t num_edits;
};

}  // namespace steerserve
