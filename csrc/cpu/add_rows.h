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

// A cache line of weights as vectors, and as many sums beside them, in an order that is the line's own affair.
template <class V, class W>
struct Line {
  static constexpr int kVectors = 64 / sizeof(W) / V::width;

  static void load_weights(const W* from, V* weights) {
    for (int v = 0; v < kVectors; ++v) weights[v] = V::load(from + v * V::width);
  }
  static void load_sums(const float* from, V* sums) {
    for (int v = 0; v < kVectors; ++v) sums[v] = V::load(from + v * V::width);
  }
  static void store_sums(const V* sums, float* to) {
    for (int v = 0; v < kVectors; ++v) sums[v].store(to + v * V::width);
  }
};

#if defined(__AVX512F__)
// Elements 0, 2, 4, ... and 1, 3, 5, ...: to widen these takes one instruction each, neighbours take two.
template <>
struct Line<VecAvx512, BFloat16> {
  static constexpr int kVectors = 2;

  static void load_weights(const BFloat16* from, VecAvx512* weights) {
    const __m512i pairs = _mm512_loadu_si512(from);
    weights[0].v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    weights[1].v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
  }
  static void load_sums(const float* from, VecAvx512* sums) {
    const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    sums[0].v = _mm512_permutex2var_ps(low, even, high);
    sums[1].v = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
  }
  static void store_sums(const VecAvx512* sums, float* to) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_ps(to, _mm512_permutex2var_ps(sums[0].v, low, sums[1].v));
    _mm512_storeu_ps(to + 16,
                     _mm512_permutex2var_ps(sums[0].v, _mm512_add_epi32(low, _mm512_set1_epi32(8)), sums[1].v));
  }
};
#endif

// sum[i] += Σ_j scale[j] · u[j][i] for `num_columns` i and J rows j.
template <class V, int J, class W>
void add_rows(const float* scale, const W* const* u, const W* const* next, int64_t num_columns, float* sum) {
  using L = Line<V, W>;
  V factor[J];
  for (int j = 0; j < J; ++j) factor[j] = V::splat(scale[j]);
  int64_t i = 0;
  for (; i + L::kVectors * V::width <= num_columns; i += L::kVectors * V::width) {
    V total[L::kVectors], weights[L::kVectors];
    L::load_sums(sum + i, total);
    for (int j = 0; j < J; ++j) {
      __builtin_prefetch(next[j] + i);
      L::load_weights(u[j] + i, weights);
      for (int v = 0; v < L::kVectors; ++v) total[v] = multiply_add(factor[j], weights[v], total[v]);
    }
    L::store_sums(total, sum + i);
  }
  for (; i < num_columns; i += V::width) {
    const int64_t rest = num_columns - i;
    const auto add = [&](auto... count) {
      V total = V::load(sum + i, count...);
      for (int j = 0; j < J; ++j) total = multiply_add(factor[j], V::load(u[j] + i, count...), total);
      total.store(sum + i, count...);
    };
    if (rest < V::width)
      add(rest);
    else
      add();
  }
}

// sum[0 .. num_columns) plus the terms given to add(); complete after finish().
template <class V, class W>
class RowSum {
 public:
  RowSum(int64_t num_columns, float* sum) : num_columns_(num_columns), sum_(sum) {}

  void add(float scale, const W* row) {
    if (pending_ == 2 * kGroup) add_group<kGroup>(row_ + kGroup);
    scale_[pending_] = scale;
    row_[pending_++] = row;
  }

  // `after`: kGroup rows that will be wanted next, if they are known.
  void finish(const W* const* after = nullptr) {
    if (pending_ > kGroup) add_group<kGroup>(row_ + kGroup);
    add_rest<kGroup>(after ? after : row_);
  }

  static constexpr int kGroup = 8;

 private:
  // Adds those that wait, at most J of them.
  template <int J>
  void add_rest(const W* const* next) {
    if (pending_ >= J) return add_group<J>(next);
    if constexpr (J > 1) add_rest<J - 1>(next);
  }

  // Adds the first J of those that wait, while the J of `next` are fetched.
  template <int J>
  void add_group(const W* const* next) {
    add_rows<V, J>(scale_, row_, next, num_columns_, sum_);
    pending_ -= J;
    for (int j = 0; j < pending_; ++j) scale_[j] = scale_[j + J], row_[j] = row_[j + J];
  }

  int64_t num_columns_;
  float* sum_;
  int pending_ = 0;
  float scale_[2 * kGroup];
  const W* row_[2 * kGroup] = {};
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
