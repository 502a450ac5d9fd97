// Sums of scaled weight rows, the decode half of every operator.
//
// Rows are streamed whole, eight side by side, which spares most loads and stores of the sum; meanwhile the next eight
// are fetched into cache, for rows are too short and too scattered for the hardware prefetchers. Terms are added in
// the order in which they come, whatever the grouping: a sum does not depend on how its columns were cut.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/vec.h"

namespace steerserve {
namespace {

// sum[i] += Σ_j scale[j] · u[j][i] for `num_columns` i and J rows j.
template <class V, int J, class W>
void add_rows(const float* scale, const W* const* u, const W* const* next, int64_t num_columns, float* sum) {
  V factor[J];
  for (int j = 0; j < J; ++j) factor[j] = V::splat(scale[j]);
  int64_t i = 0;
  for (; i + V::width <= num_columns; i += V::width) {
    V total = V::load(sum + i);
    for (int j = 0; j < J; ++j) {
      __builtin_prefetch(next[j] + i);
      total = multiply_add(factor[j], V::load(u[j] + i), total);
    }
    total.store(sum + i);
  }
  if (i < num_columns) {
    const int64_t rest = num_columns - i;
    V total = V::load(sum + i, rest);
    for (int j = 0; j < J; ++j) total = multiply_add(factor[j], V::load(u[j] + i, rest), total);
    total.store(sum + i, rest);
  }
}

// sum[0 .. num_columns) plus the terms given to add(); complete after finish().
template <class V, class W>
class RowSum {
 public:
  RowSum(int64_t num_columns, float* sum) : num_columns_(num_columns), sum_(sum) {}

  void add(float scale, const W* row) {
    if (pending_ == 2 * kGroup) {
      add_rows<V, kGroup>(scale_, row_, row_ + kGroup, num_columns_, sum_);
      drop(kGroup);
    }
    scale_[pending_] = scale;
    row_[pending_++] = row;
  }

  void finish() {
    while (pending_ >= kGroup) {
      add_rows<V, kGroup>(scale_, row_, pending_ == 2 * kGroup ? row_ + kGroup : row_, num_columns_, sum_);
      drop(kGroup);
    }
    for (int j = 0; j < pending_; ++j) add_rows<V, 1>(scale_ + j, row_ + j, row_ + j, num_columns_, sum_);
  }

 private:
  static constexpr int kGroup = 8;

  void drop(int count) {
    pending_ -= count;
    for (int j = 0; j < pending_; ++j) scale_[j] = scale_[j + count], row_[j] = row_[j + count];
  }

  int64_t num_columns_;
  float* sum_;
  int pending_ = 0;
  float scale_[2 * kGroup];
  const W* row_[2 * kGroup];
};

// sum[0 .. end − begin) += Σ_i scale[i] · W[indices[i], begin .. end), for W [·, d].
template <class V, class W>
void add_scaled_rows(const int32_t* indices, const float* scale, int64_t count, const W* weights, int64_t d,
                     int64_t begin, int64_t end, float* sum) {
  RowSum<V, W> total(end - begin, sum);
  for (int64_t i = 0; i < count; ++i) total.add(scale[i], weights + indices[i] * d + begin);
  total.finish();
}

}  // namespace
}  // namespace steerserve
