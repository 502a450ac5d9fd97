// Parts of the definitions in ops.h that several drivers need, in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simt/testing.h"

namespace simt {

// A row of activations, and what SAEs scale it by.
struct Row {
  std::vector<double> x;
  double norm = 0, mean = 0, deviation = 0;

  explicit Row(const std::vector<double>& elements) : x(elements) {
    double squares = 0, distance = 0;
    for (const double element : x) squares += element * element, mean += element / x.size();
    for (const double element : x) distance += (element - mean) * (element - mean);
    norm = std::sqrt(squares);
    deviation = std::sqrt(distance / (x.size() - 1.0));
  }

  double scale(uint8_t normalization) const {
    if (normalization == steerserve::kConstantNormRescale) return norm / std::sqrt(x.size());
    if (normalization == steerserve::kLayerNorm) return deviation + 1e-5;
    return 1;
  }

  double dot(const Tensor& weights, int64_t feature) const {
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) sum += x[i] * weights[feature * x.size() + i];
    return sum;
  }
};

// f' of ops.h.
inline double edited(uint8_t op, double f, double value) {
  switch (op) {
    case steerserve::kClamp:
      return f > 0 ? value : f;
    case steerserve::kClampAlways:
      return value;
    case steerserve::kClip:
      return std::min(f, value);
    case steerserve::kScale:
      return value * f;
    case steerserve::kAdd:
      return f + value;
    default:
      return f;
  }
}

struct Encoder {
  Tensor W_enc;
  DeviceArray<float> b_enc, threshold;
  float max_norm = static_cast<float>(kInfinity);
  int k = 0;
};

struct Feature {
  int index;
  double value;
};

// The active features of a row, in ascending order.
inline std::vector<Feature> encode(const Encoder& encoder, const Row& row, double scale) {
  std::vector<Feature> active;
  if (!(static_cast<float>(row.norm) <= encoder.max_norm)) return active;
  for (size_t j = 0; j < encoder.b_enc.size(); ++j) {
    const double pre = row.dot(encoder.W_enc, j) / scale + encoder.b_enc[j];
    if (pre > encoder.threshold[j]) active.push_back({static_cast<int>(j), pre});
  }
  if (encoder.k > 0 && active.size() > size_t(encoder.k)) {
    std::stable_sort(active.begin(), active.end(), [](auto a, auto b) { return a.value > b.value; });
    active.resize(encoder.k);
    std::sort(active.begin(), active.end(), [](auto a, auto b) { return a.index < b.index; });
  }
  return active;
}

// A sparse row as ops.h says it is stored: nothing where |x| is not finite, and nothing beyond count or capacity.
inline void check_sparse_row(size_t n, int64_t capacity, bool is_finite, const std::vector<Feature>& active,
                             const int32_t* indices, const float* values, int32_t count, double relative) {
  check_value("count", n, count, is_finite ? double(active.size()) : -1);
  for (int64_t j = 0; j < capacity; ++j) {
    const bool stored = is_finite && size_t(j) < active.size();
    check_value("index", n * capacity + j, indices[j], stored ? active[j].index : -1);
    check_output("value", n * capacity + j, values[j], stored ? active[j].value : kUnwritten,
                 stored ? relative * (1 + std::abs(active[j].value)) : 0);
  }
}

}  // namespace simt
