// CUDA C++ for g++: everything a kernel and its launcher name, so that csrc/cuda/*.cuh compile and run on the CPU.
//
// Compiled in front of every source (-include), as nvcc does with cuda_runtime.h. NVIDIA's headers provide the types
// and, on the host, conversions and arithmetic of half precision; what needs a device is emulated here, on engine.h.
// Three things are spelled as macros in device code, because C++ has no syntax for them: SHARED_ARRAY, DYNAMIC_SHARED
// and LAUNCH.
//
// Not emulated, so not tested: inline PTX, cooperative groups, asynchronous copies, blocks that wait for one another,
// fast-math rounding, and everything about speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>

#include "simt/engine.h"

#define SIMT_EMULATION 1

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static_assert(false, "use SHARED_ARRAY: ASan does not see the end of a static array");
#define __launch_bounds__(...)

#define threadIdx (::simt::place().thread)
#define blockIdx (::simt::place().block)
#define blockDim (::simt::place().block_dim)
#define gridDim (::simt::place().grid_dim)

#define SHARED_ARRAY(T, name, size) \
  T(&name)[size] = *static_cast<T(*)[size]>(::simt::shared_array(__PRETTY_FUNCTION__, #name, sizeof(T[size])))
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::simt::dynamic_shared())
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::simt::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace simt {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
  const auto call = [&] { kernel(arguments...); };
  run_launch(
      {reinterpret_cast<const void*>(kernel), grid, block, shared_bytes},
      [](const void* closure) { (*static_cast<decltype(&call)>(closure))(); }, &call);
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// ----- barriers and fences -----

inline void __syncthreads(simt::Site site = simt::here()) { simt::wait_for_block("__syncthreads", false, site); }

inline int __syncthreads_or(int predicate, simt::Site site = simt::here()) {
  return simt::wait_for_block("__syncthreads_or", predicate != 0, site) > 0;
}

inline void __threadfence() { simt::fence(); }

// ----- collectives of a warp -----

namespace simt {

inline uint64_t no_result(const Lanes&, unsigned, unsigned) { return 0; }
inline uint64_t value_of_lane(const Lanes& lanes, unsigned, unsigned argument) { return lanes.value[argument]; }

inline uint64_t lanes_that_are_true(const Lanes& lanes, unsigned, unsigned) {
  uint64_t bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= uint64_t{lanes.value[i] != 0} << i;
  return bits;
}

inline constexpr Collective kSyncWarp{"__syncwarp", true, false, no_result};
inline constexpr Collective kShuffle{"__shfl_sync", false, true, value_of_lane};
inline constexpr Collective kShuffleXor{"__shfl_xor_sync", false, true, value_of_lane};
inline constexpr Collective kShuffleUp{"__shfl_up_sync", false, true, value_of_lane};
inline constexpr Collective kBallot{"__ballot_sync", false, false, lanes_that_are_true};

template <class T>
T shuffle(const Collective& collective, uint32_t mask, T value, unsigned source, Site site) {
  return from_bits<T>(wait_for_warp(collective, mask, to_bits(value), source, site));
}

}  // namespace simt

inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::here()) {
  simt::wait_for_warp(simt::kSyncWarp, mask, 0, 0, site);
}

// All 32 lanes are one group: kernels here do without the width argument.

template <class T>
T __shfl_sync(unsigned mask, T value, int source, simt::Site site = simt::here()) {
  return simt::shuffle(simt::kShuffle, mask, value, source % 32u, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, simt::Site site = simt::here()) {
  return simt::shuffle(simt::kShuffleXor, mask, value, (simt::lane() ^ bits) % 32u, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, simt::Site site = simt::here()) {
  const unsigned lane = simt::lane();
  return simt::shuffle(simt::kShuffleUp, mask, value, distance <= lane ? lane - distance : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::here()) {
  return static_cast<unsigned>(simt::wait_for_warp(simt::kBallot, mask, predicate != 0, 0, site));
}

// ----- atomics: relaxed, so that TSan accepts them beside one another but takes no order from them -----

template <class T>
T atomicAdd(T* address, T value) {
  simt::before_atomic(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// ----- loads, bits and arithmetic -----

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline unsigned __float_as_uint(float value) { return simt::from_bits<unsigned>(simt::to_bits(value)); }
inline float __uint_as_float(unsigned bits) { return simt::from_bits<float>(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
