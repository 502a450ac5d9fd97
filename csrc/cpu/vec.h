// A vector of floats in the three widths that kernels are compiled for.
//
// A kernel is written once as a template over one of these types; the file that instantiates it is compiled
// with the matching instruction set. Hazard: whatever such a file shares with others (an inline function, a
// std:: template) may be emitted there with AVX instructions and then be chosen by the linker for everyone.
// Hence the anonymous namespace, and no standard library in kernel headers.
//
// load(p, count) reads the first `count` < width elements and sets the others to zero; store(p, count) likewise
// writes only those. Neither touches memory beyond them.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace steerserve {
namespace {

struct VecScalar {
  static constexpr int64_t width = 1;
  float v;
  static VecScalar splat(float f) { return {f}; }
  static VecScalar load(const float* p) { return {*p}; }
  static VecScalar load(const float*, int64_t) { return {0.0f}; }
  void store(float* p) const { *p = v; }
  void store(float*, int64_t) const {}
  float sum() const { return v; }
  friend VecScalar operator+(VecScalar a, VecScalar b) { return {a.v + b.v}; }
  friend VecScalar multiply_add(VecScalar a, VecScalar b, VecScalar c) { return {a.v * b.v + c.v}; }
};

#if defined(__AVX2__)
struct VecAvx2 {
  static constexpr int64_t width = 8;
  __m256 v;
  static VecAvx2 splat(float f) { return {_mm256_set1_ps(f)}; }
  static VecAvx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecAvx2 load(const float* p, int64_t count) { return {_mm256_maskload_ps(p, mask(count))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t count) const { _mm256_maskstore_ps(p, mask(count), v); }
  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  friend VecAvx2 operator+(VecAvx2 a, VecAvx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend VecAvx2 multiply_add(VecAvx2 a, VecAvx2 b, VecAvx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

 private:
  static __m256i mask(int64_t count) {
    static constexpr int32_t lanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + 8 - count));
  }
};
#endif

#if defined(__AVX512F__)
struct VecAvx512 {
  static constexpr int64_t width = 16;
  __m512 v;
  static VecAvx512 splat(float f) { return {_mm512_set1_ps(f)}; }
  static VecAvx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecAvx512 load(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(mask(count), p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t count) const { _mm512_mask_storeu_ps(p, mask(count), v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
  friend VecAvx512 operator+(VecAvx512 a, VecAvx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend VecAvx512 multiply_add(VecAvx512 a, VecAvx512 b, VecAvx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

 private:
  static __mmask16 mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
};
#endif

}  // namespace
}  // namespace steerserve
