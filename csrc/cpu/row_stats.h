// What an SAE needs to know of a whole row before it reads features: its norm, and the scale of its normalization.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/vec.h"
#include "ops.h"

namespace steerserve {
namespace {

// out[j] = x · w[j] for J rows at once, so that x is loaded once for all of them. The order of additions within a
// row does not depend on J: a feature has the same activation wherever it stands in its plan.
template <class V, int J, class X, class W>
void dot(const X* x, const W* const* w, int64_t d, float* out) {
  V even[J], odd[J];
  for (int j = 0; j < J; ++j) even[j] = odd[j] = V::splat(0.0f);
  int64_t i = 0;
  for (; i + 2 * V::width <= d; i += 2 * V::width) {
    const V x0 = V::load(x + i), x1 = V::load(x + i + V::width);
    for (int j = 0; j < J; ++j) {
      even[j] = multiply_add(x0, V::load(w[j] + i), even[j]);
      odd[j] = multiply_add(x1, V::load(w[j] + i + V::width), odd[j]);
    }
  }
  if (i + V::width <= d) {
    const V x0 = V::load(x + i);
    for (int j = 0; j < J; ++j) even[j] = multiply_add(x0, V::load(w[j] + i), even[j]);
    i += V::width;
  }
  if (i < d) {
    const V x0 = V::load(x + i, d - i);
    for (int j = 0; j < J; ++j) odd[j] = multiply_add(x0, V::load(w[j] + i, d - i), odd[j]);
  }
  for (int j = 0; j < J; ++j) out[j] = (even[j] + odd[j]).sum();
}

template <class V, class X>
float norm(const X* x, int64_t d) {
  float square;
  dot<V, 1>(x, &x, d, &square);
  return __builtin_sqrtf(square);
}

template <class V>
float mean(const float* x, int64_t d) {
  V sums = V::splat(0.0f);
  int64_t i = 0;
  for (; i + V::width <= d; i += V::width) sums = sums + V::load(x + i);
  float total = sums.sum();
  for (; i < d; ++i) total += x[i];
  return total / d;
}

// With divisor d − 1, like torch.std; NaN for d = 1.
template <class V>
float standard_deviation(const float* x, int64_t d) {
  const float center = mean<V>(x, d);
  const V minus_center = V::splat(-center);
  V squares = V::splat(0.0f);
  int64_t i = 0;
  for (; i + V::width <= d; i += V::width) {
    const V difference = V::load(x + i) + minus_center;
    squares = multiply_add(difference, difference, squares);
  }
  float total = squares.sum();
  for (; i < d; ++i) total += (x[i] - center) * (x[i] - center);
  return __builtin_sqrtf(total / (d - 1));
}

// s of ops.h.
template <class V>
float normalization_scale(Normalization kind, const float* x, int64_t d, float x_norm) {
  if (kind == kConstantNormRescale) return x_norm / __builtin_sqrtf(static_cast<float>(d));
  if (kind == kLayerNorm) return standard_deviation<V>(x, d) + 1e-5f;
  return 1.0f;
}

}  // namespace
}  // namespace steerserve
