// What the kernels share: loads, conversions, warp and block sums.
//
// The kernels are plain C++17 CUDA without inline assembly, so that the same files also run on a CPU, one fiber per
// thread, under an emulation that defines SIMT_EMULATION and the three macros below.
//
// A kernel is instantiated per weight type and per way to load weights: V = 16 bytes' worth of them, or V = 1 where
// the address or the length of a row does not allow that. Activations are converted as they come into shared memory
// or registers and as they leave, where a branch on their type costs nothing.
#pragma once

#ifndef SIMT_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SHARED_ARRAY(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared)
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

#include <cmath>
#include <cstdint>

#include "ops.h"

namespace steerserve {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Numbers ----

__device__ inline bool is_finite(float value) { return fabsf(value) < INFINITY; }

__device__ inline float load(const void* address, DType type, int64_t i) {
  if (type == DType::bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(address)[i]);
  if (type == DType::float16) return __half2float(static_cast<const __half*>(address)[i]);
  return static_cast<const float*>(address)[i];
}

// Four elements as loaded, from an address that is a multiple of their size; widened when used.
template <class T>
struct Four;

template <>
struct Four<float> {
  float4 raw;
  __device__ float4 widen() const { return raw; }
};

template <>
struct Four<__nv_bfloat16> {
  uint2 raw;
  __device__ float4 widen() const {
    return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16),
                       __uint_as_float(raw.y & 0xffff0000u));
  }
};

template <>
struct Four<__half> {
  uint2 raw;
  __device__ static float widen(unsigned bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
  __device__ float4 widen() const {
    return make_float4(widen(raw.x), widen(raw.x >> 16), widen(raw.y), widen(raw.y >> 16));
  }
};

// Stores `value` rounded to `type`, and returns what was stored.
__device__ inline float store(void* address, DType type, int64_t i, float value) {
  if (type == DType::bfloat16) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
    static_cast<__nv_bfloat16*>(address)[i] = rounded;
    return __bfloat162float(rounded);
  }
  if (type == DType::float16) {
    const __half rounded = __float2half_rn(value);
    static_cast<__half*>(address)[i] = rounded;
    return __half2float(rounded);
  }
  static_cast<float*>(address)[i] = value;
  return value;
}

// ---- Weights: V of them as loaded, widened when used ----

template <class W, int V>
struct Pack;

template <>
struct Pack<float, 4> {
  float4 raw;
  __device__ static Pack load(const float* p) { return {__ldg(reinterpret_cast<const float4*>(p))}; }
  __device__ float operator[](int i) const { return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w; }
};

template <>
struct Pack<__nv_bfloat16, 8> {
  uint4 raw;
  __device__ static Pack load(const __nv_bfloat16* p) { return {__ldg(reinterpret_cast<const uint4*>(p))}; }
  __device__ float operator[](int i) const {
    const unsigned word = i < 2 ? raw.x : i < 4 ? raw.y : i < 6 ? raw.z : raw.w;
    return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  }
};

template <>
struct Pack<float, 1> {
  float raw;
  __device__ static Pack load(const float* p) { return {__ldg(p)}; }
  __device__ float operator[](int) const { return raw; }
};

template <>
struct Pack<__nv_bfloat16, 1> {
  __nv_bfloat16 raw;
  __device__ static Pack load(const __nv_bfloat16* p) { return {__ldg(p)}; }
  __device__ float operator[](int) const { return __bfloat162float(raw); }
};

// ---- A row in shared memory, as float32 ----
//
// A lane reads the V elements that meet its V weights, 16 bytes at a time. Eight consecutive floats a lane would put
// lanes 0 and 4 of a quarter warp on the same banks, so for V = 8 the row lies in two planes: the first four of each
// eight, then the last four. `size` is the row's length, a multiple of V.

template <int V>
__device__ inline int place(int i, int size) {
  return V < 8 ? i : i / 8 * 4 + i % 4 + (i % 8 < 4 ? 0 : size / 2);
}

// Up to 16 bytes: N = 4 elements from i on, a multiple of 4, or N = 1.
template <int V, int N>
__device__ inline void read_part(const float* row, int i, int size, float (&out)[N]) {
  if constexpr (N == 1) {
    out[0] = row[i];
  } else {
    const float4 four = *reinterpret_cast<const float4*>(row + place<V>(i, size));
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
  }
}

template <int V>
__device__ inline void read(const float* row, int i, int size, float (&out)[V]) {
  constexpr int N = V == 1 ? 1 : 4;
#pragma unroll
  for (int part = 0; part < V; part += N) {
    float elements[N];
    read_part<V>(row, i + part, size, elements);
#pragma unroll
    for (int j = 0; j < N; ++j) out[part + j] = elements[j];
  }
}

template <int V>
__device__ inline void write(float* row, int i, int size, const float (&values)[V]) {
  if constexpr (V == 1) {
    row[i] = values[0];
  } else {
#pragma unroll
    for (int part = 0; part < V; part += 4) {
      *reinterpret_cast<float4*>(row + place<V>(i + part, size)) =
          make_float4(values[part], values[part + 1], values[part + 2], values[part + 3]);
    }
  }
}

// ---- Sums, each in one fixed order; every thread gets the total ----

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// `partial` is shared memory for one float a warp. It is free again when this returns.
template <int kThreads>
__device__ float block_sum(float value, float* partial) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) total += partial[warp];
  __syncthreads();
  return total;
}

// What normalizes a row, from its elements `at(0 .. d − 1)`; see ops.h.
struct RowStatistics {
  float norm, mean, deviation;
};

template <int kThreads, class At>
__device__ float row_norm(int d, float* partial, At at) {
  float squares = 0.0f;
  for (int i = threadIdx.x; i < d; i += kThreads) {
    const float element = at(i);
    squares = fmaf(element, element, squares);
  }
  return sqrtf(block_sum<kThreads>(squares, partial));
}

template <int kThreads, class At>
__device__ RowStatistics row_statistics(int d, float* partial, At at) {
  const float norm = row_norm<kThreads>(d, partial, at);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < d; i += kThreads) sum += at(i);
  const float mean = block_sum<kThreads>(sum, partial) / d;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < d; i += kThreads) {
    const float difference = at(i) - mean;
    squares = fmaf(difference, difference, squares);
  }
  return {norm, mean, sqrtf(block_sum<kThreads>(squares, partial) / (d - 1))};
}

// s of ops.h.
__device__ inline float normalization_scale(uint8_t kind, const RowStatistics& row, int d) {
  if (kind == kConstantNormRescale) return row.norm / sqrtf(static_cast<float>(d));
  if (kind == kLayerNorm) return row.deviation + 1e-5f;
  return 1.0f;
}

// ---- Entries of a plan ----

struct Range {
  int begin, end;
  bool valid;
};

// Segment i of a ragged array of `size` elements; empty where the bounds are not what they should be.
__device__ inline Range segment(const int32_t* ptr, int64_t i, int64_t size) {
  const int begin = ptr[i], end = ptr[i + 1];
  const bool valid = 0 <= begin && begin <= end && end <= size;
  return {valid ? begin : 0, valid ? end : 0, valid};
}

// f' − f; 0 where f is not finite.
__device__ inline float edit_of(uint8_t op, float f, float value) {
  if (!is_finite(f)) return 0.0f;
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

// ---- Launching ----

// Dynamic shared memory beyond what every kernel may have, which is 48 KB with the kernel's static shared memory, has
// to be asked for. The card refuses what it does not have.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 40 * 1024) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  return error;
}

// Calls `launch` with a Weights<W, V> for the weight type, and for 16-byte loads where `base` addresses and d allow.
template <class W_, int V_>
struct Weights {
  using W = W_;
  static constexpr int V = V_;
};

inline bool loads_16_bytes(const void* weights, DType type, int64_t d) {
  const int64_t row_bytes = d * (type == DType::bfloat16 ? 2 : 4);
  return reinterpret_cast<uintptr_t>(weights) % 16 == 0 && row_bytes % 16 == 0;
}

template <class Launch>
cudaError_t with_weights(DType type, bool vectorized, Launch launch) {
  if (type == DType::bfloat16)
    return vectorized ? launch(Weights<__nv_bfloat16, 8>{}) : launch(Weights<__nv_bfloat16, 1>{});
  if (type == DType::float32) return vectorized ? launch(Weights<float, 4>{}) : launch(Weights<float, 1>{});
  return cudaErrorInvalidValue;
}

}  // namespace steerserve
