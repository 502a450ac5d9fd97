// Kernels with one bug each, and beside each the correct twin: the proof that the emulation sees what it is there for.
//
//     canaries bug NAME     runs one broken kernel: reported by the emulation or a sanitizer, or its result is wrong
//     canaries fixed        runs all twins, whose results must be right and which nothing may report
//
// tests/kernels/test_simt.py says which build must see which bug.
#include <cstdio>
#include <functional>
#include <numeric>
#include <string>

#include "simt/memory.h"

namespace {

// As many threads as the kernels have: not every TSan tells so many apart, and then these tests must fail.
constexpr int kThreads = 512, kBlocks = 2, kSize = kBlocks * kThreads;
constexpr unsigned kAllLanes = ~0u;

struct Data {
  const int* in;   // [kSize], 0 .. 6
  int* out;        // [kSize]
  int* partial;    // [kBlocks]
  unsigned* done;  // [1], 0
};

__device__ int global_index() { return blockIdx.x * kThreads + threadIdx.x; }

// out[i] = the input of the next thread of the block.
template <bool kBug>
__global__ void missing_barrier(Data data) {
  SHARED_ARRAY(int, shared, kThreads);
  shared[threadIdx.x] = data.in[global_index()];
  if (!kBug) __syncthreads();
  data.out[global_index()] = shared[(threadIdx.x + 1) % kThreads];
}

// The same twice: the array is written again while others may still read it.
template <bool kBug>
__global__ void missing_barrier_before_reuse(Data data) {
  SHARED_ARRAY(int, shared, kThreads);
  int value = data.in[global_index()];
  for (int round = 0; round < 2; ++round) {
    shared[threadIdx.x] = value;
    __syncthreads();
    value = shared[(threadIdx.x + 1) % kThreads];
    if (!kBug) __syncthreads();
  }
  data.out[global_index()] = value;
}

// out[i] = the input of the next lane of the warp.
template <bool kBug>
__global__ void missing_syncwarp(Data data) {
  SHARED_ARRAY(int, shared, kThreads);
  shared[threadIdx.x] = data.in[global_index()];
  if (!kBug) __syncwarp();
  data.out[global_index()] = shared[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

// A shuffle says when lanes meet, but does not make their writes visible.
template <bool kBug>
__global__ void shuffle_as_syncwarp(Data data) {
  SHARED_ARRAY(int, shared, kThreads);
  shared[threadIdx.x] = data.in[global_index()];
  if (kBug) {
    __shfl_sync(kAllLanes, 0, 0);
  } else {
    __syncwarp();
  }
  data.out[global_index()] = shared[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

// out[i] = the sum of the warp's first 24 inputs.
template <bool kBug>
__global__ void divergent_shuffle(Data data) {
  const bool adds = threadIdx.x % 32 < 24;
  int sum = adds ? data.in[global_index()] : 0;
  if (!kBug || adds)
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  __syncwarp();
  data.out[global_index()] = kBug ? __shfl_sync(kAllLanes, sum, 0) : sum;
}

// out[i] = the input of the last lane, which has returned.
template <bool kBug>
__global__ void shuffle_from_returned_lane(Data data) {
  if (kBug && threadIdx.x % 32 == 31) return;
  data.out[global_index()] = __shfl_sync(kAllLanes, data.in[global_index()], 31);
}

// out[i] = whether any lane of the warp's lower half has an input of 6.
template <bool kBug>
__global__ void lane_outside_its_mask(Data data) {
  const unsigned lower = 0xffff;
  int any = 0;
  if (kBug || threadIdx.x % 32 < 16) any = __ballot_sync(lower, data.in[global_index()] == 6) != 0;
  data.out[global_index()] = __shfl_sync(kAllLanes, any, 0);
}

// out[i] = the first input of the block, loaded by its first warp.
template <bool kBug>
__global__ void barrier_in_a_branch(Data data) {
  SHARED_ARRAY(int, first, 1);
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) first[0] = data.in[global_index()];
    if (kBug) __syncthreads();
  }
  if (!kBug || threadIdx.x >= 32) __syncthreads();
  data.out[global_index()] = first[0];
}

template <bool kBug>
__global__ void returned_before_barrier(Data data) {
  SHARED_ARRAY(int, first, 1);
  if (threadIdx.x == 0) first[0] = data.in[global_index()];
  if (threadIdx.x >= 32) data.out[global_index()] = data.in[blockIdx.x * kThreads];
  if (kBug && threadIdx.x >= 32) return;
  __syncthreads();
  data.out[global_index()] = first[0];
}

// out[i] = how many inputs of the block are i mod 7.
template <bool kBug>
__global__ void unguarded_histogram(Data data) {
  SHARED_ARRAY(int, count, 7);
  if (threadIdx.x < 7) count[threadIdx.x] = 0;
  __syncthreads();
  if (kBug) {
    count[data.in[global_index()]] += 1;
  } else {
    atomicAdd(&count[data.in[global_index()]], 1);
  }
  __syncthreads();
  data.out[global_index()] = count[global_index() % 7];
}

template <bool kBug>
__global__ void uninitialized_shared(Data data) {
  SHARED_ARRAY(int, count, 7);
  if (!kBug && threadIdx.x < 7) count[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&count[data.in[global_index()]], 1);
  __syncthreads();
  data.out[global_index()] = count[global_index() % 7];
}

template <bool kBug>
__global__ void shared_overrun(Data data) {
  SHARED_ARRAY(int, shared, kThreads);
  int* const last = shared + kThreads - 1;
  shared[threadIdx.x] = data.in[global_index()];
  if (kBug && threadIdx.x == 0) last[1] = 0;
  __syncthreads();
  data.out[global_index()] = shared[(threadIdx.x + 1) % kThreads];
}

template <bool kBug>
__global__ void dynamic_shared_overrun(Data data) {
  DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = data.in[global_index()];
  __syncthreads();
  data.out[global_index()] = shared[(threadIdx.x + 1) % (kThreads + kBug)];
}

template <bool kBug>
__global__ void global_overrun(Data data) {
  const int next = global_index() + 1;
  data.out[global_index()] = data.in[kBug || next < kSize ? next : 0];
}

// out[4 i .. 4 i + 3] = four inputs, loaded at once.
template <bool kBug>
__global__ void misaligned_vector(Data data) {
  if (global_index() >= kSize / 4) return;
  const int first = 4 * global_index() + (kBug && global_index() == 3);
  const int4 four = __ldg(reinterpret_cast<const int4*>(data.in + first));
  int* const out = data.out + 4 * global_index();
  out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
}

template <bool kBug>
__global__ void shift_too_far(Data data) {
  const int lane = threadIdx.x % 32;
  const unsigned below = kBug ? (1u << (lane + 1)) - 1 : ~0u >> (31 - lane);
  data.out[global_index()] = __popc(below);
}

// All blocks write out[i].
template <bool kBug>
__global__ void race_between_blocks(Data data) {
  const int i = kBug ? threadIdx.x : global_index();
  data.out[i] = data.in[i];
  if (kBug) data.out[kThreads + i] = data.in[kThreads + i];
}

// out[i] = the sum of the blocks' first inputs, made by the last block to finish from what all left in global memory.
template <bool kReleases, bool kAcquires>
__device__ void sum_of_blocks(Data data) {
  SHARED_ARRAY(int, is_last, 1);
  if (threadIdx.x == 0) {
    data.partial[blockIdx.x] = data.in[global_index()];
    if (kReleases) __threadfence();
    is_last[0] = atomicAdd(data.done, 1u) == kBlocks - 1;
    if (!kReleases) __threadfence();  // too late
    if (kAcquires) __threadfence();
  }
  __syncthreads();
  if (!is_last[0]) return;
  int sum = 0;
  for (int block = 0; block < kBlocks; ++block) sum += data.partial[block];
  for (int i = threadIdx.x; i < kSize; i += kThreads) data.out[i] = sum;
}

template <bool kBug>
__global__ void missing_fence_before_flag(Data data) {
  sum_of_blocks<!kBug, true>(data);
}

template <bool kBug>
__global__ void missing_fence_after_flag(Data data) {
  sum_of_blocks<true, !kBug>(data);
}

// out[i] = in[i], through more shared memory than a kernel has that did not ask.
template <bool kBug>
__global__ void unasked_shared(Data data) {
  data.out[global_index()] = data.in[global_index()];
}

struct Canary {
  const char* name;
  void (*bug)(Data);
  void (*fixed)(Data);
  std::function<int(const int* in, int i)> expected;
  size_t shared_bytes = 0;
};

int next_in(const int* in, int i, int distance, int group) { return in[i / group * group + (i + distance) % group]; }

int count_in_block(const int* in, int i) {
  const int* const block = in + i / kThreads * kThreads;
  return std::count(block, block + kThreads, i % 7);
}

int first_of_blocks(const int* in, int) {
  int sum = 0;
  for (int block = 0; block < kBlocks; ++block) sum += in[block * kThreads];
  return sum;
}

#define CANARY(name, ...) {#name, name<true>, name<false>, __VA_ARGS__}

const Canary kCanaries[] = {
    CANARY(missing_barrier, [](const int* in, int i) { return next_in(in, i, 1, kThreads); }),
    CANARY(missing_barrier_before_reuse, [](const int* in, int i) { return next_in(in, i, 2, kThreads); }),
    CANARY(missing_syncwarp, [](const int* in, int i) { return next_in(in, i, 1, 32); }),
    CANARY(shuffle_as_syncwarp, [](const int* in, int i) { return next_in(in, i, 1, 32); }),
    CANARY(divergent_shuffle,
           [](const int* in, int i) {
             const int* const warp = in + i / 32 * 32;
             return std::accumulate(warp, warp + 24, 0);
           }),
    CANARY(shuffle_from_returned_lane, [](const int* in, int i) { return in[i / 32 * 32 + 31]; }),
    CANARY(lane_outside_its_mask,
           [](const int* in, int i) {
             const int* const warp = in + i / 32 * 32;
             return std::count(warp, warp + 16, 6) > 0;
           }),
    CANARY(barrier_in_a_branch, [](const int* in, int i) { return in[i / kThreads * kThreads]; }),
    CANARY(returned_before_barrier, [](const int* in, int i) { return in[i / kThreads * kThreads]; }),
    CANARY(unguarded_histogram, count_in_block),
    CANARY(uninitialized_shared, count_in_block),
    CANARY(shared_overrun, [](const int* in, int i) { return next_in(in, i, 1, kThreads); }),
    CANARY(
        dynamic_shared_overrun, [](const int* in, int i) { return next_in(in, i, 1, kThreads); },
        kThreads * sizeof(int)),
    CANARY(global_overrun, [](const int* in, int i) { return in[(i + 1) % kSize]; }),
    CANARY(misaligned_vector, [](const int* in, int i) { return in[i]; }),
    CANARY(shift_too_far, [](const int*, int i) { return i % 32 + 1; }),
    CANARY(race_between_blocks, [](const int* in, int i) { return in[i]; }),
    CANARY(missing_fence_before_flag, first_of_blocks),
    CANARY(missing_fence_after_flag, first_of_blocks),
    CANARY(
        unasked_shared, [](const int* in, int i) { return in[i]; }, 64 * 1024),
};

// Prints what is wrong, if anything is.
bool run(const Canary& canary, bool bug, simt::Order order) {
  simt::set_order(order);
  simt::DeviceArray<int> in(kSize), out(kSize), partial(kBlocks);
  simt::DeviceArray<unsigned> done(1);
  for (int i = 0; i < kSize; ++i) in[i] = i * i % 7 + (i == 40);
  done[0] = 0;
  const auto kernel = bug ? canary.bug : canary.fixed;
  if (!bug) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, canary.shared_bytes);
  const Data data{in.begin(), out.begin(), partial.begin(), done.begin()};
  LAUNCH(kernel, kBlocks, kThreads, canary.shared_bytes, nullptr, data);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    std::printf("%s: launch refused with error %d\n", canary.name, error);
    return false;
  }
  for (int i = 0; i < kSize; ++i) {
    const int expected = canary.expected(in.begin(), i);
    if (out[i] == expected) continue;
    std::printf("%s: wrong result: out[%d] is %d, not %d\n", canary.name, i, out[i], expected);
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const bool bug = argc == 3 && std::string(argv[1]) == "bug";
  if (!bug && !(argc == 2 && std::string(argv[1]) == "fixed")) return 2;
  bool found = false, right = true;
  for (const Canary& canary : kCanaries) {
    if (bug && std::string(argv[2]) != canary.name) continue;
    found = true;
    for (const auto order : {simt::Order::forward, simt::Order::reverse, simt::Order::random})
      right = run(canary, bug, order) && right;
    if (!bug) std::printf("ran %s\n", canary.name);
  }
  return found ? !right : 2;
}
