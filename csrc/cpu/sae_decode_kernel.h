// The body of sae_decode for some columns of one row, over a vector type of vec.h; ops.h has the maths.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/add_rows.h"
#include "cpu/vec.h"
#include "ops.h"

namespace steerserve {
namespace {

template <class V, class T, class W>
void decode_columns_of(const SaeDecodeArgs& args, int64_t row, int64_t begin, int64_t end, float* scratch) {
  T* out = static_cast<T*>(args.out) + row * args.out_row_stride + begin;
  const int64_t count = args.count[row];
  if (count < 0 || count > args.capacity) {
    for (int64_t i = 0; i < end - begin; ++i) narrow(__builtin_nanf(""), out + i);
    return;
  }
  float* sum = sum_in(out, scratch);
  for (int64_t i = begin; i < end; ++i) sum[i - begin] = args.b_dec[i];
  add_scaled_rows<V>(args.indices + row * args.capacity, args.values + row * args.capacity, count,
                     static_cast<const W*>(args.W_dec), args.d, begin, end, sum);
  narrow_row(sum, end - begin, out);
}

// Columns [begin, end) of `row`. `scratch` holds end − begin floats; it is used only if the output is not float.
template <class V>
void decode_columns(const SaeDecodeArgs& args, int64_t row, int64_t begin, int64_t end, float* scratch) {
  with_types(args.out_type, args.w_type, [&](auto out, auto w) {
    decode_columns_of<V, decltype(out), decltype(w)>(args, row, begin, end, scratch);
  });
}

}  // namespace
}  // namespace steerserve
