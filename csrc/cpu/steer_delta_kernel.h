// The body of steer_delta for one row, over a vector type of vec.h; steer_delta.h has the maths.
//
// Per stage: widen x to fp32 (bf16 only, into scratch), probe all encoder rows, add the decoder rows of the entries
// that changed something, round x back. x stays in the first-level cache; what costs is streaming rows of the bank.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/steer_delta.h"
#include "cpu/vec.h"

namespace steerserve {
namespace {

// Rows of the bank streamed side by side: enough to share each load of x, few enough for the hardware prefetchers.
constexpr int kRowsAtOnce = 4;

struct BFloat16 {
  uint16_t bits;
};

// A row as fp32: where it lies if it is fp32 already, else a copy in scratch.
inline float* widen(float* x, int64_t, float*) { return x; }

inline float* widen(const BFloat16* x, int64_t d, float* scratch) {
  for (int64_t i = 0; i < d; ++i) scratch[i] = __builtin_bit_cast(float, static_cast<uint32_t>(x[i].bits) << 16);
  return scratch;
}

inline void narrow(const float*, int64_t, float*) {}

// Round to nearest, ties to even; a NaN stays one.
inline void narrow(const float* row, int64_t d, BFloat16* x) {
  for (int64_t i = 0; i < d; ++i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, row[i]);
    const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    x[i].bits = static_cast<uint16_t>((is_nan ? bits | 0x400000 : rounded) >> 16);
  }
}

// out[j] = x · w[j] for J rows at once, so that x is loaded once for all of them. The order of additions within a
// row does not depend on J: a feature has the same activation wherever it stands in its plan.
template <class V, int J>
void dot(const float* x, const float* const* w, int64_t d, float* out) {
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

// A NaN fails every comparison, so the tests are for what makes f zero.
inline float activate(float pre, float threshold, float x_norm, float max_norm) {
  return __builtin_isfinite(pre) && (pre <= threshold || x_norm > max_norm) ? 0.0f : pre;
}

inline float edit_of(uint8_t op, float f, float value) {
  if (!__builtin_isfinite(f)) return 0.0f;
  switch (op) {
    case kClamp:
      return f > 0.0f ? value - f : 0.0f;
    case kClampAlways:
      return value - f;
    case kClip:
      return f > value ? value - f : 0.0f;
    case kScale:
      return value * f - f;
    case kAdd:
      return value;
    default:
      return 0.0f;
  }
}

// Activations and edits of entries [begin, begin + J). Returns whether any edit is not zero.
template <class V, int J>
bool probe(const SteerDeltaArgs& args, const float* x, float x_norm, int64_t begin) {
  const float* w[J];
  float products[J];
  for (int j = 0; j < J; ++j) w[j] = args.W_enc + args.slot[begin + j] * args.d;
  dot<V, J>(x, w, args.d, products);
  bool changes = false;
  for (int j = 0; j < J; ++j) {
    const int64_t entry = begin + j, slot = args.slot[entry];
    const float f = activate(products[j] + args.b_enc[slot], args.threshold[slot], x_norm, args.max_norm[slot]);
    args.activation[entry] = f;
    args.edit[entry] = edit_of(args.op[entry], f, args.value[entry]);
    changes |= args.edit[entry] != 0.0f;
  }
  return changes;
}

// x += Σ edit[j] · u[j] over J decoder rows. Terms are added in the order of j, whatever J is.
template <class V, int J>
void add_rows(const float* edit, const float* const* u, int64_t d, float* x) {
  V scale[J];
  for (int j = 0; j < J; ++j) scale[j] = V::splat(edit[j]);
  int64_t i = 0;
  for (; i + V::width <= d; i += V::width) {
    V sum = V::load(x + i);
    for (int j = 0; j < J; ++j) sum = multiply_add(scale[j], V::load(u[j] + i), sum);
    sum.store(x + i);
  }
  if (i < d) {
    V sum = V::load(x + i, d - i);
    for (int j = 0; j < J; ++j) sum = multiply_add(scale[j], V::load(u[j] + i, d - i), sum);
    sum.store(x + i, d - i);
  }
}

// x += Σ edit · decoder row over the entries that change something.
template <class V>
void apply(const SteerDeltaArgs& args, int64_t begin, int64_t end, float* x) {
  const float* u[kRowsAtOnce];
  float edit[kRowsAtOnce];
  int num_rows = 0;
  for (int64_t entry = begin; entry < end; ++entry) {
    if (args.edit[entry] == 0.0f) continue;
    edit[num_rows] = args.edit[entry];
    u[num_rows++] = args.W_dec + args.slot[entry] * args.d;
    if (num_rows == kRowsAtOnce) {
      add_rows<V, kRowsAtOnce>(edit, u, args.d, x);
      num_rows = 0;
    }
  }
  for (int j = 0; j < num_rows; ++j) add_rows<V, 1>(edit + j, u + j, args.d, x);
}

template <class V, class T>
void steer_row(const SteerDeltaArgs& args, int64_t row, float* scratch) {
  T* x = static_cast<T*>(args.x) + row * args.x_row_stride;
  for (int64_t stage = row * args.num_stages; stage < (row + 1) * args.num_stages; ++stage) {
    const int64_t begin = args.ptr[stage], end = args.ptr[stage + 1];
    if (begin == end) continue;
    float* wide = widen(x, args.d, scratch);
    float square;
    dot<V, 1>(wide, &wide, args.d, &square);
    const float x_norm = __builtin_sqrtf(square);
    args.x_norm[stage] = x_norm;
    bool changes = false;
    int64_t entry = begin;
    for (; entry + kRowsAtOnce <= end; entry += kRowsAtOnce)
      changes |= probe<V, kRowsAtOnce>(args, wide, x_norm, entry);
    for (; entry < end; ++entry) changes |= probe<V, 1>(args, wide, x_norm, entry);
    if (!changes) continue;
    apply<V>(args, begin, end, wide);
    narrow(wide, args.d, x);
  }
}

template <class V>
SteerRow steer_row_for(bool x_is_bf16) {
  return x_is_bf16 ? steer_row<V, BFloat16> : steer_row<V, float>;
}

}  // namespace
}  // namespace steerserve
