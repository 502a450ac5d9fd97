// The body of sae_decode for some columns of one row, over a vector type of vec.h; ops.h has the maths.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/add_rows.h"
#include "cpu/vec.h"
#include "ops.h"

namespace steerserve {
namespace {

inline bool is_known(const SaeDecodeArgs& args, int64_t row) {
  return 0 <= args.count[row] && args.count[row] <= args.capacity;
}

// Fetches the list of the row that will be decoded next.
inline void fetch_list(const SaeDecodeArgs& args, int64_t row) {
  if (row >= args.num_rows || !is_known(args, row)) return;
  const int64_t first = row * args.capacity;
  for (int64_t i = first; i < first + args.count[row]; i += 16) {
    __builtin_prefetch(args.indices + i);
    __builtin_prefetch(args.values + i);
  }
}

// The weights that a row's decode begins with. False if there are none.
template <class W, int N>
bool first_weights(const SaeDecodeArgs& args, int64_t row, const W* weights, const W* (&rows)[N]) {
  if (row >= args.num_rows || !is_known(args, row) || args.count[row] == 0) return false;
  const int32_t* indices = args.indices + row * args.capacity;
  for (int j = 0; j < N; ++j) rows[j] = weights + indices[j < args.count[row] ? j : args.count[row] - 1] * args.d;
  return true;
}

template <class V, class T, class W>
void decode_columns_of(const SaeDecodeArgs& args, int64_t row, int64_t begin, int64_t end, float* scratch) {
  T* out = static_cast<T*>(args.out) + row * args.out_row_stride + begin;
  const int64_t count = args.count[row];
  if (!is_known(args, row)) {
    for (int64_t i = 0; i < end - begin; ++i) narrow(__builtin_nanf(""), out + i);
    return;
  }
  fetch_list(args, row + 1);
  float* sum = sum_in(out, scratch);
  for (int64_t i = begin; i < end; ++i) sum[i - begin] = args.b_dec[i];
  const W* weights = static_cast<const W*>(args.W_dec) + begin;
  const int32_t* indices = args.indices + row * args.capacity;
  const float* values = args.values + row * args.capacity;
  RowSum<V, W> total(end - begin, sum);
  for (int64_t i = 0; i < count; ++i) total.add(values[i], weights + indices[i] * args.d);
  const W* next[RowSum<V, W>::kGroup];
  total.finish(first_weights(args, row + 1, weights, next) ? next : nullptr);
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
