// A vector of floats in the three widths that kernels are compiled for.
//
// A kernel is written once as a template over one of these types; the file that instantiates it is compiled
// with the matching instruction set. Hazard: whatever such a file shares with others (an inline function, a
// std:: template) may be emitted there with AVX instructions and then be chosen by the linker for everyone.
// Hence the anonymous namespace, and no standard library in kernel headers.
//
// Memory holds float or bfloat16; arithmetic is float: load widens. Products (product_kernel.h) are of packed rows of
// V::Packed and summed in vectors V::Sum. Bit i of greater(a, b) tells whether a[i] > b[i],
// of unordered(a, b) whether either is NaN. load(p, count) reads the first `count` < width elements and sets the others
// to zero; store(p, count) likewise writes only those. Neither touches memory beyond them. greatest(a, b) is b where
// either is NaN. add_exponent(a, b) is a · 2ⁿ where b is n + 1.5 · 2²³, the float in which a rounded n lies as bits.
#pragma once

#include <cstdint>

#include "ops.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace steerserve {
namespace {

struct BFloat16 {
  uint16_t bits;
};

inline float widen(float f) { return f; }
inline float widen(BFloat16 b) { return __builtin_bit_cast(float, static_cast<uint32_t>(b.bits) << 16); }

inline void narrow(float f, float* to) { *to = f; }

// Round to nearest, ties to even; a NaN stays one.
inline void narrow(float f, BFloat16* to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, f);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = static_cast<uint16_t>((is_nan ? bits | 0x400000 : rounded) >> 16);
}

// A row as float: where it lies if it is float already, else a copy in scratch.
inline float* widen_row(float* x, int64_t, float*) { return x; }

inline float* widen_row(const BFloat16* x, int64_t d, float* scratch) {
  for (int64_t i = 0; i < d; ++i) scratch[i] = widen(x[i]);
  return scratch;
}

// Where to sum up a row that will be stored in `out`: there if it is float, else in scratch.
inline float* sum_in(float* out, float*) { return out; }
inline float* sum_in(BFloat16*, float* scratch) { return scratch; }

// The way back, of a row that widen_row or sum_in gave.
inline void narrow_row(const float*, int64_t, float*) {}

inline void narrow_row(const float* row, int64_t d, BFloat16* x) {
  for (int64_t i = 0; i < d; ++i) narrow(row[i], x + i);
}

// body(T(), W()) for the storage types of activations and weights.
template <class Body>
void with_types(DType x_type, DType w_type, Body body) {
  const bool narrow_x = x_type == DType::bfloat16, narrow_w = w_type == DType::bfloat16;
  if (narrow_x && narrow_w) return body(BFloat16(), BFloat16());
  if (narrow_x) return body(BFloat16(), float());
  if (narrow_w) return body(float(), BFloat16());
  return body(float(), float());
}

struct VecScalar {
  using Packed = float;
  using Sum = VecScalar;
  static constexpr int64_t width = 1;
  float v;
  static VecScalar splat(float f) { return {f}; }
  template <class T>
  static VecScalar load(const T* p) {
    return {widen(*p)};
  }
  template <class T>
  static VecScalar load(const T*, int64_t) {
    return {0.0f};
  }
  void store(float* p) const { *p = v; }
  void store(float*, int64_t) const {}
  float sum() const { return v; }
  friend VecScalar operator+(VecScalar a, VecScalar b) { return {a.v + b.v}; }
  friend VecScalar operator-(VecScalar a, VecScalar b) { return {a.v - b.v}; }
  friend VecScalar operator*(VecScalar a, VecScalar b) { return {a.v * b.v}; }
  friend VecScalar operator/(VecScalar a, VecScalar b) { return {a.v / b.v}; }
  friend VecScalar greatest(VecScalar a, VecScalar b) { return {a.v > b.v ? a.v : b.v}; }
  friend VecScalar add_exponent(VecScalar a, VecScalar b) {
    const uint32_t n = __builtin_bit_cast(uint32_t, b.v) << 23;
    return {__builtin_bit_cast(float, __builtin_bit_cast(uint32_t, a.v) + n)};
  }
  friend VecScalar multiply_add(VecScalar a, VecScalar b, VecScalar c) { return {a.v * b.v + c.v}; }
  friend uint32_t greater(VecScalar a, VecScalar b) { return a.v > b.v; }
  friend uint32_t unordered(VecScalar a, VecScalar b) { return __builtin_isunordered(a.v, b.v); }
};

#if defined(__AVX2__)
struct VecAvx2 {
  using Packed = float;
  using Sum = VecAvx2;
  static constexpr int64_t width = 8;
  __m256 v;
  static VecAvx2 splat(float f) { return {_mm256_set1_ps(f)}; }
  static VecAvx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecAvx2 load(const float* p, int64_t count) { return {_mm256_maskload_ps(p, mask(count))}; }
  static VecAvx2 load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static VecAvx2 load(const BFloat16* p, int64_t count) {
    BFloat16 whole[width] = {};
    for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
    return load(whole);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t count) const { _mm256_maskstore_ps(p, mask(count), v); }
  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  friend VecAvx2 operator+(VecAvx2 a, VecAvx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend VecAvx2 operator-(VecAvx2 a, VecAvx2 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend VecAvx2 operator*(VecAvx2 a, VecAvx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend VecAvx2 operator/(VecAvx2 a, VecAvx2 b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend VecAvx2 greatest(VecAvx2 a, VecAvx2 b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend VecAvx2 add_exponent(VecAvx2 a, VecAvx2 b) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(b.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), n))};
  }
  friend VecAvx2 multiply_add(VecAvx2 a, VecAvx2 b, VecAvx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend uint32_t unordered(VecAvx2 a, VecAvx2 b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)));
  }
  friend uint32_t greater(VecAvx2 a, VecAvx2 b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
  }

 private:
  static __m256i mask(int64_t count) {
    static constexpr int32_t lanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + 8 - count));
  }
};
#endif

#if defined(__AVX512F__)
struct VecAvx512 {
  using Packed = float;
  using Sum = VecAvx512;
  static constexpr int64_t width = 16;
  __m512 v;
  static VecAvx512 splat(float f) { return {_mm512_set1_ps(f)}; }
  static VecAvx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecAvx512 load(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(mask(count), p)}; }
  static VecAvx512 load(const BFloat16* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static VecAvx512 load(const BFloat16* p, int64_t count) { return widened(_mm256_maskz_loadu_epi16(mask(count), p)); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t count) const { _mm512_mask_storeu_ps(p, mask(count), v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
  friend VecAvx512 operator+(VecAvx512 a, VecAvx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend VecAvx512 operator-(VecAvx512 a, VecAvx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend VecAvx512 operator*(VecAvx512 a, VecAvx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend VecAvx512 operator/(VecAvx512 a, VecAvx512 b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend VecAvx512 greatest(VecAvx512 a, VecAvx512 b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend VecAvx512 add_exponent(VecAvx512 a, VecAvx512 b) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(b.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), n))};
  }
  friend VecAvx512 multiply_add(VecAvx512 a, VecAvx512 b, VecAvx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend uint32_t greater(VecAvx512 a, VecAvx512 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  friend uint32_t unordered(VecAvx512 a, VecAvx512 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }

 private:
  static VecAvx512 widened(__m256i bf16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16))};
  }
  static __mmask16 mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
};
#endif

#if defined(__AVX512BF16__)
// Pairs of bfloat16, two of which multiply_add multiplies and adds to one of 16 sums; denormals count as zero.
struct PairsAvx512 {
  using Packed = BFloat16;
  using Sum = VecAvx512;
  static constexpr int64_t width = 32;
  __m512i v;
  static PairsAvx512 load(const BFloat16* p) { return {_mm512_loadu_si512(p)}; }
  static PairsAvx512 load(const BFloat16* p, int64_t count) { return {_mm512_maskz_loadu_epi16((1u << count) - 1, p)}; }
  friend VecAvx512 multiply_add(PairsAvx512 a, PairsAvx512 b, VecAvx512 c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};
#endif

}  // namespace
}  // namespace steerserve
