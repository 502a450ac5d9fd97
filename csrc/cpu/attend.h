// attend on the CPU: what the launch (attend.cpp) and the kernel share; ops.h has the maths.
//
// A step is cut into tiles, a few queries of one row that read the same KV head: they share its loads. A tile passes
// over the keys of its row, kKeys at a time, with a running maximum and sum (an online softmax), all in float.
#pragma once

#include <cstdint>

#include "ops.h"

namespace steerserve {

constexpr int64_t kKeys = 64;  // tiles of keys begin at multiples of it

// Queries [begin, end) of a run: tokens of one row at consecutive positions. Query i is that of the run's token i / G
// and of its head i % G among the G heads that share a KV head.
struct AttendTile {
  int64_t first_token;  // of the run
  int64_t begin, end;
};

struct AttendKernel {
  int64_t max_queries;  // of a tile
  // Floats of scratch that a tile of `num_queries` needs.
  int64_t (*scratch_size)(int64_t num_queries, int64_t d_head);
  void (*attend)(const AttendArgs& args, const AttendTile& tile, int64_t kv_head, float* scratch);
};

// For bfloat16 at level amx of simd.h, d_head a multiple of 32 and block_size of 16.
extern const AttendKernel attend_kernel_amx;

}  // namespace steerserve
