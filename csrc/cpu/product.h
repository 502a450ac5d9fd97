// Products of rows with the rows of a weight matrix: what sae_encode and linear have in common.
//
// Each thread owns a range of features (rows of the weight matrix) and passes the whole batch over it, a panel of
// features at a time: a panel is small enough to stay in the second-level cache while every row of the batch meets it,
// so weights come from memory once a batch. The products of a panel with a group of rows lie in a small tile, which the
// operator finishes before the next group comes.
//
// A product is summed in an order fixed by d alone: it depends neither on the rest of the batch nor on threads.
//
// Roofline. At one row every weight is used once: 2 operations for 2 or 4 bytes, so the bound is the read bandwidth
// of memory, num_features · d · sizeof(weight) / bandwidth. A batch shares the reads. Where memory gives a core 7 bytes
// a cycle, arithmetic becomes the bound at about 20 rows in float (64 operations a cycle) and 150 in bfloat16 with AMX
// (1024).
#pragma once

#include <cstdint>

#include "ops.h"

namespace steerserve {

// How a kernel wants its operands.
struct Packing {
  int64_t granule;    // features multiplied together: ranges and panels begin at multiples of it
  int64_t row_group;  // rows packed, and multiplied, together
  // Bytes of a packed batch.
  int64_t (*size)(int64_t num_rows, int64_t d);
};

struct Product {
  const void* packed;  // the batch as the kernel's `pack` left it
  int64_t num_rows, d;
  const void* weights;  // [·, d]
  DType w_type;
  int64_t panel_size;  // features
};

// A finished tile: products [row_end − row_begin, panel_size] of features [first, first + count).
struct Block {
  float* tile;
  int64_t panel;  // counted from the first of the thread
  int64_t first, count;
  int64_t row_begin, row_end;
};

int64_t panel_size(const Packing& packing, int64_t num_rows, int64_t d, DType w_type);

// The features of thread `thread` of `team` are [first_feature(thread), first_feature(thread + 1)).
int64_t first_feature(const Packing& packing, int64_t num_features, int thread, int team);

}  // namespace steerserve
