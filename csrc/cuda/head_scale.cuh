// head_scale on a GPU. ops.h has the maths; here is how it is laid out.
//
// One block edits one row; rows without entries return after reading their bounds. Warp w owns the heads that are w
// modulo the number of warps: it goes through the row's entries in order, 32 at a time, one a lane, and takes those of
// its heads, so that entries of one head apply in order and heads side by side. A lane owns the columns that are its
// index modulo 32, so it reads only what it has written itself, and no barrier is needed. Each norm is a sum over a
// warp in a fixed order.
//
// A bad head or a scale that is not finite gives a NaN norm and writes nothing. Where the bounds are bad, the row has
// no entries.
//
// Roofline on paper, not measured (H100 SXM, 3.35 TB/s): 64 heads of 128 bfloat16, read and written, are 32 KB a row:
// 0.5 MB and 0.2 µs for 16 rows. What remains is the launch and four dependent loads, about 3 µs.
//
// occupancy: head_scale_kernel: 256 threads, 6 blocks per SM
#pragma once

#include "cuda/common.cuh"

namespace steerserve {

constexpr int kHeadThreads = 256;
constexpr int kHeadWarps = kHeadThreads / kWarpSize;

// Scales the head that starts at element `begin` of z, and returns its norm before. For one warp.
__device__ inline float scale_head(const HeadScaleArgs& args, int64_t begin, float scale) {
  float squares = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x % kWarpSize; i < args.d_head; i += kWarpSize) {
    const float element = load(args.z, args.z_type, begin + i);
    squares = fmaf(element, element, squares);
  }
  if (scale != 1.0f) {
    for (int i = threadIdx.x % kWarpSize; i < args.d_head; i += kWarpSize)
      store(args.z, args.z_type, begin + i, scale * load(args.z, args.z_type, begin + i));
  }
  return sqrtf(warp_sum(squares));
}

__global__ void __launch_bounds__(kHeadThreads, 6) head_scale_kernel(const HeadScaleArgs args) {
  const int64_t n = blockIdx.x;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Range entries = segment(args.ptr, n, args.nnz);
  for (int first = entries.begin; first < entries.end; first += kWarpSize) {
    const int entry = first + lane;
    int head = -1;
    float scale = 0.0f;
    if (entry < entries.end) {
      head = args.head[entry], scale = args.scale[entry];
      const bool valid = 0 <= head && head < args.num_heads && is_finite(scale);
      if (!valid && warp == 0) args.z_norm[entry] = NAN;
      if (!valid || head % kHeadWarps != warp) head = -1;
    }
    for (unsigned mine = __ballot_sync(kAllLanes, head >= 0); mine; mine &= mine - 1) {
      const int j = __ffs(mine) - 1;
      const int64_t begin = n * args.z_row_stride + __shfl_sync(kAllLanes, head, j) * args.d_head;
      const float norm = scale_head(args, begin, __shfl_sync(kAllLanes, scale, j));
      if (lane == 0) args.z_norm[first + j] = norm;
    }
  }
}

inline cudaError_t launch(const HeadScaleArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0 || args.nnz == 0) return cudaSuccess;
  LAUNCH(head_scale_kernel, static_cast<unsigned>(args.num_rows), kHeadThreads, 0, stream, args);
  return cudaGetLastError();
}

}  // namespace steerserve
