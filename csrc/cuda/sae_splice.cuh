// sae_splice on a GPU. ops.h has the maths; here is how it is laid out.
//
// The encode is sae_encode's first kernel, on the rows of x that `rows` names, and the decode is sae_decode's sum;
// between and around them:
//
//     scale_kernel    one block a row: s and μ, for SAEs that normalize; the encode divides its products by s
//     finish_kernel   sae_encode's sparse rows and |x|, then the entries: a thread looks an entry's feature up among
//                     the row's active ones, which ascend, by binary search, and writes its activation and edit
//     splice_kernel   one block a tile of a row's columns: Σ_j f_j u_j + Σ_i e_i u_i over the entries' edits, in the
//                     decode's order, then bias, s and μ, into x
//
// The edits are added beside the features instead of changing their values: the sum is the same, and `values` stay
// those of the encode. Edits of zero read nothing, so an entry costs one decoder row when it acts.
//
// More than 64 rows go 64 at a time, as in sae_encode. Within a group x is written only by the last kernel, each
// element by the one thread that may read it there; groups name different rows.
//
// A bad feature, op or value makes the activation NaN, which edits nothing. Bad bounds in `ptr` and a row that x does
// not have leave the row alone, with count −1 and a NaN norm.
//
// Roofline on paper, not measured: sae_encode's and sae_decode's, with bfloat16 weights and 100 active features. One
// row of Gemma-2-2B/16k 22.5 + 0.14 µs, of Llama-3-8B/131k 321 + 0.25 µs at full bandwidth of an H100 SXM (3.35 TB/s),
// and 16 rows 22.6 + 2.2 and 321 + 3.9 µs (1.3 to 1.6 times that by arithmetic, see sae_encode.cuh); three launches or
// four come to 4 to 6 µs. A dense encode and decode reads both matrices: 45 and 642 µs.
//
// occupancy: scale_kernel: 256 threads, 6 blocks per SM
// occupancy: splice_finish_kernel: 1024 threads, 1 block per SM
// occupancy: splice_kernel: 256 threads, 4 blocks per SM
#pragma once

#include "cuda/sae_decode.cuh"
#include "cuda/sae_encode.cuh"

namespace steerserve {

constexpr int kScaleThreads = 256;

// Scratch that sae_splice needs beside sae_encode's.
struct SpliceScratch {
  float* scale;  // [num_rows] s, null where no SAE input is normalized
  float* mean;   // [num_rows] μ
};

inline int64_t sae_splice_workspace(int64_t num_rows, int64_t d_sae) {
  const int64_t rows = num_rows < kRowsPerLaunch ? num_rows : kRowsPerLaunch;
  return sae_encode_workspace(num_rows, d_sae) + rows * 2 * sizeof(float);
}

__global__ void __launch_bounds__(kScaleThreads, 6)
    scale_kernel(const EncodeRows rows, const Normalization normalization, const SpliceScratch scratch) {
  SHARED_ARRAY(float, partial, kScaleThreads / kWarpSize);
  const int64_t i = blockIdx.x, source = row_of(rows, i);
  const auto at = [&](int j) { return load(rows.x, rows.x_type, source * rows.x_row_stride + j); };
  RowStatistics row = {NAN, NAN, NAN};
  if (source >= 0) row = row_statistics<kScaleThreads>(static_cast<int>(rows.d), partial, at);
  if (threadIdx.x == 0) {
    scratch.scale[i] = normalization_scale(normalization, row, static_cast<int>(rows.d));
    scratch.mean[i] = normalization == kLayerNorm ? row.mean : 0.0f;
  }
}

// The value of `feature` in a sparse row, 0 where it is not active.
__device__ inline float value_of(const int32_t* indices, const float* values, int count, int feature) {
  int begin = 0, end = count;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (indices[middle] < feature)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin < count && indices[begin] == feature ? values[begin] : 0.0f;
}

__global__ void __launch_bounds__(kFinishThreads, 1)
    splice_finish_kernel(const EncodeRows rows, const SaeSpliceArgs args) {
  const int64_t i = blockIdx.x;
  const Range entries = segment(args.ptr, i, args.nnz);
  float norm;
  const int count = finish_row(rows, i, !entries.valid, &norm);
  if (threadIdx.x == 0) args.x_norm[i] = norm;
  __syncthreads();
  const bool known = 0 <= count && count <= args.capacity;
  const int32_t* const indices = args.indices + i * args.capacity;
  const float* const values = args.values + i * args.capacity;
  for (int entry = entries.begin + threadIdx.x; entry < entries.end; entry += kFinishThreads) {
    const int feature = args.feature[entry];
    const uint8_t op = args.op[entry];
    const float value = args.value[entry];
    const bool valid = 0 <= feature && feature < args.d_sae && op < kNumSteerOps && is_finite(value);
    const float f = known && valid ? value_of(indices, values, count, feature) : NAN;
    args.activation[entry] = f;
    args.edit[entry] = edit_of(op, f, value);
  }
}

template <class W, int V>
__global__ void __launch_bounds__(kDecodeThreads, 4)
    splice_kernel(const EncodeRows rows, const SaeSpliceArgs args, const SpliceScratch scratch) {
  SHARED_ARRAY(float, sums, kTileSums);
  const int64_t i = blockIdx.x / num_tiles<V>(args.d);
  const int64_t tile = blockIdx.x % num_tiles<V>(args.d) * kTileColumns<V>;
  const int64_t column = tile + threadIdx.x % kTileLanes * V;
  const int count = args.count[i];
  if (count < 0 || count > args.capacity) return;

  float sum[V] = {};
  if (column < args.d) {
    const DecoderColumns<W> decoder = {static_cast<const W*>(args.W_dec) + column, args.d_sae, args.d};
    const int32_t* const indices = args.indices + i * args.capacity;
    const float* const values = args.values + i * args.capacity;
    add_terms<W, V>(decoder, count, [=](int j) { return indices[j]; }, [=](int j) { return values[j]; }, sum);
    const Range entries = segment(args.ptr, i, args.nnz);
    const int32_t* const features = args.feature + entries.begin;
    const float* const edits = args.edit + entries.begin;
    add_terms<W, V>(
        decoder, entries.end - entries.begin, [=](int j) { return features[j]; }, [=](int j) { return edits[j]; }, sum);
  }
  const float total = tile_sum<V>(sum, sums);
  const int64_t own = tile + threadIdx.x;
  if (threadIdx.x >= kTileColumns<V> || own >= args.d) return;

  const int64_t element = row_of(rows, i) * args.x_row_stride + own;
  const float scale = scratch.scale ? scratch.scale[i] : 1.0f;
  if (args.x_norm[i] <= args.max_norm) {
    const float mean = scratch.scale ? scratch.mean[i] : 0.0f;
    store(args.x, args.x_type, element, fmaf(scale, total + args.b_dec[own], mean));
  } else if (total != 0.0f) {
    store(args.x, args.x_type, element, fmaf(scale, total, load(args.x, args.x_type, element)));
  }
}

// Rows [first, first + num_rows) of `args`, as arguments of their own.
inline SaeSpliceArgs some_rows(SaeSpliceArgs args, int64_t first, int64_t num_rows) {
  args.rows += first, args.num_rows = num_rows, args.ptr += first;
  args.indices += first * args.capacity, args.values += first * args.capacity, args.count += first;
  args.x_norm += first;
  return args;
}

inline EncodeRows encode_rows(const SaeSpliceArgs& args, const SpliceScratch& scratch, float* pre) {
  const int64_t num_words = num_bitmap_words(args.d_sae);
  return {args.x,          args.x_type,   args.x_row_stride,
          args.num_x_rows, args.d,        args.rows,
          args.num_rows,   scratch.scale, args.W_enc,
          args.w_type,     args.b_enc,    args.threshold,
          args.d_sae,      args.max_norm, args.k,
          args.indices,    args.values,   args.capacity,
          args.count,      pre,           reinterpret_cast<unsigned*>(pre + args.num_rows * num_words * 32),
          num_words};
}

inline cudaError_t launch_group(const SaeSpliceArgs& args, cudaStream_t stream) {
  float* const pre = static_cast<float*>(args.workspace);
  float* const after = pre + sae_encode_workspace(args.num_rows, args.d_sae) / static_cast<int64_t>(sizeof(float));
  SpliceScratch scratch = {nullptr, nullptr};
  if (args.normalization != kNone) scratch = {after, after + args.num_rows};
  const EncodeRows rows = encode_rows(args, scratch, pre);
  const unsigned num_rows = static_cast<unsigned>(args.num_rows);
  if (scratch.scale) LAUNCH(scale_kernel, num_rows, kScaleThreads, 0, stream, rows, args.normalization, scratch);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (const cudaError_t error = launch_encode(rows, stream); error != cudaSuccess) return error;
  LAUNCH(splice_finish_kernel, num_rows, kFinishThreads, 0, stream, rows, args);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  return with_weights(args.w_type, loads_16_bytes(args.W_dec, args.w_type, args.d), [&](auto weights) {
    using Type = decltype(weights);
    const unsigned num_blocks = num_rows * static_cast<unsigned>(num_tiles<Type::V>(args.d));
    LAUNCH((splice_kernel<typename Type::W, Type::V>), num_blocks, kDecodeThreads, 0, stream, rows, args, scratch);
    return cudaGetLastError();
  });
}

inline cudaError_t launch(const SaeSpliceArgs& args, cudaStream_t stream) {
  for (int64_t first = 0; first < args.num_rows; first += kRowsPerLaunch) {
    const int64_t left = args.num_rows - first, num_rows = left < kRowsPerLaunch ? left : kRowsPerLaunch;
    const cudaError_t error = launch_group(some_rows(args, first, num_rows), stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace steerserve
