// The decode half of sae_splice for some columns of one row, over a vector type of vec.h; ops.h has the maths.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/add_rows.h"
#include "cpu/sae_splice.h"
#include "cpu/vec.h"

namespace steerserve {
namespace {

template <class V, class T, class W>
void splice_columns_of(const SaeSpliceArgs& args, const SpliceRow& row, int64_t i, int64_t begin, int64_t end,
                       float* sum) {
  const W* W_dec = static_cast<const W*>(args.W_dec);
  const auto [norm, scale, mean] = row.stats;
  const bool is_replaced = norm <= args.max_norm;
  for (int64_t c = begin; c < end; ++c) sum[c - begin] = is_replaced ? args.b_dec[c] : 0.0f;
  if (is_replaced)
    add_scaled_rows<V>(args.indices + i * args.capacity, args.values + i * args.capacity, args.count[i], W_dec, args.d,
                       begin, end, sum);
  add_scaled_rows<V>(row.features, row.edits, row.num_edits, W_dec, args.d, begin, end, sum);
  T* x = static_cast<T*>(args.x) + args.rows[i] * args.x_row_stride;
  for (int64_t c = begin; c < end; ++c) narrow(scale * sum[c - begin] + (is_replaced ? mean : widen(x[c])), x + c);
}

// Columns [begin, end) of the row that is the i-th of `rows`. `sum` holds end − begin floats.
template <class V>
void splice_columns(const SaeSpliceArgs& args, const SpliceRow& row, int64_t i, int64_t begin, int64_t end,
                    float* sum) {
  with_types(args.x_type, args.w_type,
             [&](auto x, auto w) { splice_columns_of<V, decltype(x), decltype(w)>(args, row, i, begin, end, sum); });
}

}  // namespace
}  // namespace steerserve
