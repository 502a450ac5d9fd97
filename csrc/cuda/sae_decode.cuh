// sae_decode on a GPU. ops.h has the maths; here is how it is laid out.
//
// A decode reads a few dozen scattered decoder rows of a few KB and does two operations an element: what counts is how
// many loads are in flight. One block makes one tile of a row's columns: as wide as 8 lanes' 16-byte loads, 128 bytes,
// the least that reads memory in whole lines. A single row of d = 2304 then already spreads over 36 blocks, and the 32
// groups of 8 lanes in a block share out the entries, each with four loads in flight.
//
// Group g adds entries g, g + 32, ... in order; then the groups of a warp are added by shuffles and the warps through
// shared memory, each in a fixed order, so a row's bits depend on its own entries only. The bias comes last.
//
// An index that is out of range makes the row NaN and reads nothing; nor does a value of 0.
//
// Roofline on paper, not measured (H100 SXM, 3.35 TB/s): with bfloat16 weights and 100 active features a row reads
// 0.46 MB for Gemma-2-2B/16k (d 2304) and 0.82 MB for Llama-3-8B/131k (d 4096): 0.14 and 0.25 µs at full bandwidth, so
// one row costs a launch and four dependent loads, about 3 to 4 µs. 16 rows read 7.4 and 13 MB if they share no
// feature: 2.2 and 3.9 µs. 0.5 and 0.8 million operations a row are nothing.
//
// occupancy: sae_decode_kernel: 256 threads, 4 blocks per SM
#pragma once

#include "cuda/common.cuh"

namespace steerserve {

constexpr int kDecodeThreads = 256;
constexpr int kTileLanes = 8;                         // of a group
constexpr int kGroups = kDecodeThreads / kTileLanes;  // that share the entries of a row
constexpr int kTermsAtOnce = 4;                       // of a group
constexpr int kMaxTileColumns = kTileLanes * 16 / 2;  // of bfloat16
constexpr int kTileSums = kDecodeThreads / 32 * kMaxTileColumns;

template <int V>
constexpr int kTileColumns = kTileLanes * V;

template <int V>
__host__ __device__ int64_t num_tiles(int64_t d) {
  return (d + kTileColumns<V> - 1) / kTileColumns<V>;
}

// A decoder matrix [num_features, d], at the first column of a thread.
template <class W>
struct DecoderColumns {
  const W* weights;
  int64_t num_features, d;
};

// sum += value(j) · row index(j) of the decoder, over this thread's share of the terms 0 .. count. The loads of a turn
// are all under way before the first is used: an unrolled loop would wait for one term's index, then for its row, ...
template <class W, int V, class Index, class Value>
__device__ void add_terms(const DecoderColumns<W>& decoder, int count, Index index, Value value, float (&sum)[V]) {
  for (int first = threadIdx.x / kTileLanes; first < count; first += kGroups * kTermsAtOnce) {
    float scale[kTermsAtOnce];
    int feature[kTermsAtOnce];
#pragma unroll
    for (int t = 0; t < kTermsAtOnce; ++t) {
      const int j = first + t * kGroups;
      scale[t] = j < count ? value(j) : 0.0f;
      feature[t] = j < count ? index(j) : 0;
    }
    Pack<W, V> u[kTermsAtOnce];
#pragma unroll
    for (int t = 0; t < kTermsAtOnce; ++t) {
      if (scale[t] == 0.0f) continue;
      const bool known = 0 <= feature[t] && feature[t] < decoder.num_features;
      if (!known) scale[t] = NAN;
      u[t] = known ? Pack<W, V>::load(decoder.weights + feature[t] * decoder.d) : Pack<W, V>{};
    }
#pragma unroll
    for (int t = 0; t < kTermsAtOnce; ++t) {
      if (scale[t] == 0.0f) continue;
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] = fmaf(scale[t], u[t][k], sum[k]);
    }
  }
}

// The sum over all groups of a block, of column threadIdx.x of the tile; for the first kTileColumns<V> threads.
// `sums` is shared memory for kTileSums floats.
template <int V>
__device__ float tile_sum(float (&sum)[V], float* sums) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    for (int offset = kWarpSize / 2; offset >= kTileLanes; offset /= 2)
      sum[k] += __shfl_xor_sync(kAllLanes, sum[k], offset);
    if (lane < kTileLanes) sums[warp * kTileColumns<V> + lane * V + k] = sum[k];
  }
  __syncthreads();
  float total = 0.0f;
  if (threadIdx.x < kTileColumns<V>) {
    for (int other = 0; other < kDecodeThreads / kWarpSize; ++other)
      total += sums[other * kTileColumns<V> + threadIdx.x];
  }
  return total;
}

template <class W, int V>
__global__ void __launch_bounds__(kDecodeThreads, 4) sae_decode_kernel(const SaeDecodeArgs args) {
  SHARED_ARRAY(float, sums, kTileSums);
  const int64_t n = blockIdx.x / num_tiles<V>(args.d);
  const int64_t tile = blockIdx.x % num_tiles<V>(args.d) * kTileColumns<V>;
  const int64_t column = tile + threadIdx.x % kTileLanes * V;
  const int count = args.count[n];
  const bool known = 0 <= count && count <= args.capacity;

  float sum[V] = {};
  if (column < args.d) {
    const int32_t* const indices = args.indices + n * args.capacity;
    const float* const values = args.values + n * args.capacity;
    const DecoderColumns<W> decoder = {static_cast<const W*>(args.W_dec) + column, args.d_sae, args.d};
    add_terms<W, V>(
        decoder, known ? count : 0, [=](int j) { return indices[j]; }, [=](int j) { return values[j]; }, sum);
  }
  const float total = tile_sum<V>(sum, sums);
  const int64_t own = tile + threadIdx.x;
  if (threadIdx.x < kTileColumns<V> && own < args.d)
    store(args.out, args.out_type, n * args.out_row_stride + own, known ? total + args.b_dec[own] : NAN);
}

inline cudaError_t launch(const SaeDecodeArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0 || args.d == 0) return cudaSuccess;
  return with_weights(args.w_type, loads_16_bytes(args.W_dec, args.w_type, args.d), [&](auto weights) {
    using Type = decltype(weights);
    const int64_t num_blocks = args.num_rows * num_tiles<Type::V>(args.d);
    LAUNCH((sae_decode_kernel<typename Type::W, Type::V>), static_cast<unsigned>(num_blocks), kDecodeThreads, 0, stream,
           args);
    return cudaGetLastError();
  });
}

}  // namespace steerserve
