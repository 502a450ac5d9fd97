// sae_encode on a GPU. ops.h has the maths; here is how it is laid out.
//
// Two kernels. The first reads the weights once and leaves a bitmap of the active features and their values; the
// second makes the sparse rows.
//
// encode_kernel: one block computes 32 features, one word of the bitmap, for R rows: the blocks of one word are next to
// each other, so that its weights come from memory once and for further rows from the second-level cache. x passes
// through shared memory as float32, a chunk of columns at a time. A warp keeps the sums of 4 features x R rows in
// registers, its lanes striding through the columns by 16 bytes of weights, so that a weight is loaded and widened once
// and used R times. At the end the lanes' sums are added by halving: a lane hands half of its sums to a partner and
// takes over the other half, 62 shuffles for 64 sums in place of 320. Bias, threshold and ballot follow, and only what
// is active is stored.
//
// finish_kernel: one block a row. |x| is computed and checked; the k largest are found, if there is a k, by exact radix
// selection: three rounds over the digits (11, 11, 10 bits) of the values' bits, made to sort like unsigned numbers,
// each a histogram in shared memory; of features equal to the last one in, those of lowest index stay. Then each thread
// counts the bits of its own words, a scan gives it its place, and it writes its features in ascending order.
//
// The scratch has room for every feature of up to 64 rows (more rows go 64 at a time), but only the active ones are
// written and read: at 100 of them a row 100 floats, and a bit a feature.
//
// Every sum is made in one order that depends neither on R nor on the chunk (a multiple of a warp's stride), so that
// a row has the same bits in every batch. Integer atomics count the histogram, whose result no order changes.
// Hazards: a chunk may be overwritten only after all warps have used it; a word of the bitmap is rewritten by one lane
// after its whole warp has read it, and then read by other threads, with a barrier between.
//
// Roofline on paper, not measured (H100 SXM, 3.35 TB/s, 132 SMs of 128 float32 operations a clock at 1.75 GHz: 29.6
// T multiply-adds a second), bfloat16 weights:
//
//                                      bytes    multiply-adds    at full bandwidth   at full arithmetic
//     Gemma-2-2B/16k    1 row        75.5 MB          0.04 G              22.5 µs               1.3 µs
//                      16 rows       75.6 MB          0.60 G              22.6 µs              20.4 µs
//     Llama-3-8B/131k   1 row        1.07 GB          0.54 G               321 µs                18 µs
//                      16 rows       1.07 GB          8.59 G               321 µs               290 µs
//
// To these come two launches and the second kernel, 3 to 5 µs (about 20 µs more for a top-k over 131k features of which
// half are positive). At one row bandwidth is all that counts. At 16 rows both limits are equal, and with the loads
// from shared memory, the widening of weights (1 instruction a weight) and the staging of x on top, 1.3 to 1.6 times
// the table is what to expect. Beyond 16 rows arithmetic is the limit and time grows in proportion: 64 rows of
// Gemma-2-2B take at least 82 µs, 1024 rows 1.3 ms. A matrix product on tensor cores has an order of magnitude more
// arithmetic and is the better choice there, at the price of the dense array.
//
// occupancy: encode_kernel R=1: 256 threads, 4 blocks per SM
// occupancy: encode_kernel R=4: 256 threads, 3 blocks per SM
// occupancy: encode_kernel R=8: 256 threads, 2 blocks per SM
// occupancy: encode_kernel R=16: 256 threads, 2 blocks per SM
// occupancy: finish_kernel: 1024 threads, 1 block per SM
#pragma once

#include "cuda/common.cuh"

namespace steerserve {

constexpr int kEncodeThreads = 256;
constexpr int kFeaturesPerWarp = 4;
constexpr int kFeaturesPerBlock = kEncodeThreads / kWarpSize * kFeaturesPerWarp;
static_assert(kFeaturesPerBlock == 32, "a block makes one word of the bitmap");

constexpr int kFinishThreads = 1024;
constexpr int kFinishWarps = kFinishThreads / kWarpSize;
constexpr int64_t kRowsPerLaunch = 64;

// The rows of one launch: what sae_encode and sae_splice have in common.
struct EncodeRows {
  const void* x;  // [num_x_rows, d]
  DType x_type;
  int64_t x_row_stride, num_x_rows, d;
  const int32_t* rows;  // [num_rows], null: row i is row i of x
  int64_t num_rows;
  const float* scale;  // [num_rows] s of each row, null: 1
  const void* W_enc;
  DType w_type;
  const float* b_enc;
  const float* threshold;
  int64_t d_sae;
  float max_norm;
  int64_t k;
  int32_t* indices;
  float* values;
  int64_t capacity;
  int32_t* count;
  float* pre;        // scratch [num_rows, num_words, 32], written where active
  unsigned* active;  // scratch [num_rows, num_words], bits
  int64_t num_words;
};

inline int64_t num_bitmap_words(int64_t d_sae) { return (d_sae + 31) / 32; }

inline int64_t sae_encode_workspace(int64_t num_rows, int64_t d_sae) {
  const int64_t rows = num_rows < kRowsPerLaunch ? num_rows : kRowsPerLaunch;
  return rows * num_bitmap_words(d_sae) * (32 * sizeof(float) + sizeof(unsigned));
}

// Which row of x row i is; −1 if `rows` names one that x does not have.
__device__ inline int64_t row_of(const EncodeRows& args, int64_t i) {
  const int64_t row = args.rows ? args.rows[i] : i;
  return 0 <= row && row < args.num_x_rows ? row : -1;
}

// ---- encode_kernel ----

// Columns of x in shared memory at a time: 4 to 32 KB for R rows, a multiple of every stride of a warp.
template <int R>
constexpr int kChunk = R < 8 ? 1024 : 512;

// Part of x as it comes into shared memory: columns [begin, begin + size) of up to R rows, zeros where there are none.
struct Stage {
  const int* source;  // [R] row of x, or −1
  int begin, size;
  float* target;  // [R, kChunk]
};

// Four elements at a time, each thread the same columns of every kRowsApart-th row, with loads of four rows under way.
template <class T, int V, int R>
__device__ void stage4(const EncodeRows& args, const Stage& part) {
  constexpr int kSteps = kChunk<R> / 4, kRowsApart = kEncodeThreads / kSteps, kAtOnce = R < 4 ? R : 4;
  const int column = static_cast<int>(threadIdx.x) % kSteps * 4;
  if (column >= part.size) return;
  const bool inside = part.begin + column < static_cast<int>(args.d);
  const T* const x = static_cast<const T*>(args.x) + part.begin + column;
#pragma unroll 1
  for (int first = threadIdx.x / kSteps; first < R; first += kRowsApart * kAtOnce) {
    Four<T> elements[kAtOnce];
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      const int source = part.source[first + t * kRowsApart];
      elements[t] = Four<T>{};
      if (inside && source >= 0) elements[t] = *reinterpret_cast<const Four<T>*>(x + source * args.x_row_stride);
    }
    float* const target = part.target + first * kChunk<R> + place<V>(column, kChunk<R>);
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t)
      *reinterpret_cast<float4*>(target + t * kRowsApart * kChunk<R>) = elements[t].widen();
  }
}

// One element at a time, where rows do not allow more.
template <int V, int R>
__device__ void stage1(const EncodeRows& args, const Stage& part) {
#pragma unroll 1
  for (int i = threadIdx.x; i < R * kChunk<R>; i += kEncodeThreads) {
    const int column = i % kChunk<R>, source = part.source[i / kChunk<R>];
    if (column >= part.size) continue;
    const bool inside = source >= 0 && part.begin + column < static_cast<int>(args.d);
    part.target[i / kChunk<R> * kChunk<R> + place<V>(column, kChunk<R>)] =
        inside ? load(args.x, args.x_type, source * args.x_row_stride + part.begin + column) : 0.0f;
  }
}

template <int V, int R>
__device__ void stage(const EncodeRows& args, const Stage& part) {
  const int64_t four = args.x_type == DType::float32 ? 16 : 8;  // bytes of four elements
  const bool aligned = V > 1 && reinterpret_cast<uintptr_t>(args.x) % four == 0 && args.x_row_stride % 4 == 0;
  if (!aligned) return stage1<V, R>(args, part);
  if (args.x_type == DType::bfloat16) return stage4<__nv_bfloat16, V, R>(args, part);
  if (args.x_type == DType::float16) return stage4<__half, V, R>(args, part);
  return stage4<float, V, R>(args, part);
}

// sum[row · F + feature] += over V columns, from column `i` of the chunk on.
template <class W, int V, int R>
__device__ inline void multiply(const Pack<W, V> (&weights)[kFeaturesPerWarp], const float* x, int i,
                                float (&sum)[R * kFeaturesPerWarp]) {
  constexpr int kStep = V == 1 ? 1 : 4;
#pragma unroll
  for (int part = 0; part < V; part += kStep) {
#pragma unroll
    for (int row = 0; row < R; ++row) {
      float elements[kStep];
      read_part<V>(x + row * kChunk<R>, i + part, kChunk<R>, elements);
#pragma unroll
      for (int feature = 0; feature < kFeaturesPerWarp; ++feature) {
#pragma unroll
        for (int j = 0; j < kStep; ++j)
          sum[row * kFeaturesPerWarp + feature] =
              fmaf(weights[feature][part + j], elements[j], sum[row * kFeaturesPerWarp + feature]);
      }
    }
  }
}

// Adds N sums over the lanes of a warp. Lane l ends with the totals of sums l·N/32 .. (l + 1)·N/32 in front; if there
// are fewer sums than lanes, 32/N lanes end with the same total each. kLeft sums are not yet shared out, and lanes
// kOffset apart exchange next.
template <int N, int kLeft = N, int kOffset = kWarpSize / 2>
__device__ inline void add_over_lanes(float (&sum)[N]) {
  constexpr int kHalf = kLeft / 2;
  const bool upper = threadIdx.x & kOffset;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float given = upper ? sum[i] : sum[i + kHalf], kept = upper ? sum[i + kHalf] : sum[i];
    sum[i] = kept + __shfl_xor_sync(kAllLanes, given, kOffset);
  }
  if constexpr (kHalf == 0) sum[0] += __shfl_xor_sync(kAllLanes, sum[0], kOffset);
  if constexpr (kOffset > 1) add_over_lanes<N, kHalf == 0 ? 1 : kHalf, kOffset / 2>(sum);
}

// Stores what is active of the rows that this warp finishes, one feature a lane, from x · w as the warps left it:
// products [warp, row, feature of the warp].
template <int R>
__device__ void store_active(const EncodeRows& args, const float* products) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first = blockIdx.x * R;
  const int64_t word = blockIdx.y, feature = word * 32 + lane;
  const bool exists = feature < args.d_sae;
  const float bias = exists ? args.b_enc[feature] : 0.0f, threshold = exists ? args.threshold[feature] : INFINITY;
  for (int row = warp; row < R && first + row < args.num_rows; row += kEncodeThreads / kWarpSize) {
    const float scale = args.scale ? args.scale[first + row] : 1.0f;
    const int product = (lane / kFeaturesPerWarp * R + row) * kFeaturesPerWarp + lane % kFeaturesPerWarp;
    const float value = products[product] / scale + bias;
    const bool passes = exists && !(value <= threshold);
    const unsigned active = __ballot_sync(kAllLanes, passes);
    const int64_t target = (first + row) * args.num_words + word;
    // A NaN goes along: it tells finish_row that the row is broken.
    if (passes) args.pre[target * 32 + lane] = value > threshold ? value : NAN;
    if (lane == 0) args.active[target] = active;
  }
}

template <int R>
constexpr int kEncodeBlocksPerSm = R < 4 ? 4 : (R < 8 ? 3 : 2);

template <class W, int V, int R>
__global__ void __launch_bounds__(kEncodeThreads, kEncodeBlocksPerSm<R>) encode_kernel(const EncodeRows args) {
  SHARED_ARRAY(float, x, R* kChunk<R>);
  SHARED_ARRAY(float, products, R * 32);
  SHARED_ARRAY(int, source, R);
  constexpr int kStride = kWarpSize * V, kSums = R * kFeaturesPerWarp;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, d = static_cast<int>(args.d);
  const int first = blockIdx.x * R;
  const int64_t feature = static_cast<int64_t>(blockIdx.y) * 32 + warp * kFeaturesPerWarp;
  const int num_features = static_cast<int>(args.d_sae - feature);  // from this warp's first on
  const W* const w = static_cast<const W*>(args.W_enc) + feature * d;

  if (threadIdx.x < R) {
    const int row = first + threadIdx.x;
    source[threadIdx.x] = row < args.num_rows ? static_cast<int>(row_of(args, row)) : -1;
  }
  __syncthreads();
  float sum[kSums] = {};
  for (int begin = 0; begin < d; begin += kChunk<R>) {
    const int rest = (d - begin + kStride - 1) / kStride * kStride, size = rest < kChunk<R> ? rest : kChunk<R>;
    stage<V, R>(args, {source, begin, size, x});
    __syncthreads();
#pragma unroll 1
    for (int i = lane * V; i < size; i += kStride) {
      Pack<W, V> weights[kFeaturesPerWarp];
#pragma unroll
      for (int j = 0; j < kFeaturesPerWarp; ++j) {
        const bool exists = begin + i < d && j < num_features;
        weights[j] = exists ? Pack<W, V>::load(w + static_cast<unsigned>(j * d + begin + i)) : Pack<W, V>{};
      }
      multiply<W, V, R>(weights, x, i, sum);
    }
    __syncthreads();
  }
  add_over_lanes<kSums>(sum);
  constexpr int kOwn = kSums < kWarpSize ? 1 : kSums / kWarpSize, kShare = kSums < kWarpSize ? kWarpSize / kSums : 1;
  if (threadIdx.x % kShare == 0) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) products[threadIdx.x / kShare * kOwn + i] = sum[i];
  }
  __syncthreads();
  store_active<R>(args, products);
}

// ---- finish_kernel ----

// Where this thread's `value` elements begin if each thread's follow those of the threads before it, and the number of
// all. `partial` is shared memory for one int a warp; it is free again when this returns.
__device__ inline int block_scan(int value, int* partial, int* total) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int inclusive = value;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  if (lane == kWarpSize - 1) partial[warp] = inclusive;
  __syncthreads();
  int before = inclusive - value;
  *total = 0;
  for (int other = 0; other < kFinishWarps; ++other) {
    before += other < warp ? partial[other] : 0;
    *total += partial[other];
  }
  __syncthreads();
  return before;
}

// Bits that compare as unsigned numbers the way the floats compare; −0 and 0 are equal.
__device__ inline unsigned sortable(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One row's bitmap and values; each thread owns the words [own_begin, own_end).
struct ActiveFeatures {
  unsigned* words;
  const float* pre;
  int num_words, own_begin, own_end;
};

__device__ inline ActiveFeatures active_features(const EncodeRows& args, int64_t row) {
  const int num_words = static_cast<int>(args.num_words);
  const int per_thread = (num_words + kFinishThreads - 1) / kFinishThreads;
  const auto clamp = [=](int word) { return word < num_words ? word : num_words; };
  const int begin = clamp(static_cast<int>(threadIdx.x) * per_thread);
  return {args.active + row * num_words, args.pre + row * num_words * 32, num_words, begin, clamp(begin + per_thread)};
}

constexpr int kMaxDigits = 2048;

struct Selection {
  unsigned* histogram;  // [kMaxDigits]
  int* partial;         // [kFinishWarps]
  unsigned* found;      // [2]: the digit; how many are still wanted of those that have it
};

// The digit (the bits from `shift` on, `num_digits` values) at which, counted from the largest key down, the `wanted`th
// key is found among the active features whose higher bits are `prefix`. Returns the digit and reduces `wanted` by the
// keys with larger digits.
__device__ inline unsigned select_digit(const ActiveFeatures& row, unsigned prefix, unsigned prefix_mask, int shift,
                                        int num_digits, const Selection& shared, int* wanted) {
  const int lane = threadIdx.x % kWarpSize;
  for (int digit = threadIdx.x; digit < num_digits; digit += kFinishThreads) shared.histogram[digit] = 0;
  __syncthreads();
#pragma unroll 4
  for (int word = threadIdx.x / kWarpSize; word < row.num_words; word += kFinishWarps) {
    if (!(row.words[word] >> lane & 1)) continue;
    const unsigned key = sortable(row.pre[word * 32 + lane]);
    if ((key & prefix_mask) == prefix) atomicAdd(&shared.histogram[key >> shift & (num_digits - 1)], 1u);
  }
  __syncthreads();
  const int per_thread = num_digits / kFinishThreads,
            last = num_digits - 1 - static_cast<int>(threadIdx.x) * per_thread;
  int own = 0, total;
  for (int i = 0; i < per_thread; ++i) own += static_cast<int>(shared.histogram[last - i]);
  int before = block_scan(own, shared.partial, &total);
  if (before < *wanted && *wanted <= before + own) {
    int digit = last;
    while (before + static_cast<int>(shared.histogram[digit]) < *wanted)
      before += static_cast<int>(shared.histogram[digit--]);
    shared.found[0] = static_cast<unsigned>(digit), shared.found[1] = static_cast<unsigned>(*wanted - before);
  }
  __syncthreads();
  const unsigned digit = shared.found[0];
  *wanted = static_cast<int>(shared.found[1]);
  return digit;
}

// Clears the bits of all active features but the k largest.
__device__ inline void keep_largest(const ActiveFeatures& row, int k, const Selection& shared) {
  int own = 0, total;
  for (int word = row.own_begin; word < row.own_end; ++word) own += __popc(row.words[word]);
  block_scan(own, shared.partial, &total);
  if (total <= k) return;

  int wanted = k;
  unsigned cut = select_digit(row, 0, 0, 21, 2048, shared, &wanted) << 21;
  cut |= select_digit(row, cut, ~0u << 21, 10, 2048, shared, &wanted) << 10;
  cut |= select_digit(row, cut, ~0u << 10, 0, 1024, shared, &wanted);

  const int lane = threadIdx.x % kWarpSize;
  for (int word = threadIdx.x / kWarpSize; word < row.num_words; word += kFinishWarps) {
    const bool stays = (row.words[word] >> lane & 1) && sortable(row.pre[word * 32 + lane]) >= cut;
    const unsigned kept = __ballot_sync(kAllLanes, stays);
    __syncwarp();
    if (lane == 0) row.words[word] = kept;
  }
  __syncthreads();

  // Of those equal to the cut, the first `wanted` stay.
  const auto is_tied = [&](int word, int bit) { return sortable(row.pre[word * 32 + bit]) == cut; };
  int tied = 0;
  for (int word = row.own_begin; word < row.own_end; ++word) {
    for (unsigned bits = row.words[word]; bits; bits &= bits - 1) tied += is_tied(word, __ffs(bits) - 1);
  }
  int rank = block_scan(tied, shared.partial, &total);
  if (total == wanted) return;
  for (int word = row.own_begin; word < row.own_end; ++word) {
    unsigned kept = row.words[word];
    for (unsigned bits = kept; bits; bits &= bits - 1) {
      if (is_tied(word, __ffs(bits) - 1) && rank++ >= wanted) kept &= ~(bits & -bits);
    }
    row.words[word] = kept;
  }
}

// Writes the row's features in ascending order, and returns their number.
__device__ inline int emit(const EncodeRows& args, int64_t i, const ActiveFeatures& row, int* partial) {
  int own = 0, total;
  for (int word = row.own_begin; word < row.own_end; ++word) own += __popc(row.words[word]);
  int64_t position = block_scan(own, partial, &total);
  for (int word = row.own_begin; word < row.own_end; ++word) {
    for (unsigned bits = row.words[word]; bits && position < args.capacity; bits &= bits - 1, ++position) {
      const int feature = word * 32 + __ffs(bits) - 1;
      args.indices[i * args.capacity + position] = feature;
      args.values[i * args.capacity + position] = row.pre[feature];
    }
  }
  return total;
}

// Whether a feature of the row is NaN. For a whole block.
__device__ inline bool has_nan(const ActiveFeatures& row) {
  bool found = false;
  for (int word = row.own_begin; word < row.own_end; ++word) {
    for (unsigned bits = row.words[word]; bits; bits &= bits - 1) {
      const float value = row.pre[word * 32 + __ffs(bits) - 1];
      found |= value != value;
    }
  }
  return __syncthreads_or(found);
}

// Makes sparse row i, unless it is `broken` already, and returns its count; `norm` becomes |x|. For a whole block.
__device__ inline int finish_row(const EncodeRows& args, int64_t i, bool broken, float* norm) {
  SHARED_ARRAY(float, norm_partial, kFinishWarps);
  SHARED_ARRAY(unsigned, histogram, kMaxDigits);
  SHARED_ARRAY(int, partial, kFinishWarps);
  SHARED_ARRAY(unsigned, found, 2);
  const int64_t source = row_of(args, i);
  *norm = NAN;
  int count = -1;
  if (source >= 0 && !broken) {
    const auto at = [&](int j) { return load(args.x, args.x_type, source * args.x_row_stride + j); };
    *norm = row_norm<kFinishThreads>(static_cast<int>(args.d), norm_partial, at);
  }
  if (is_finite(*norm)) {
    const ActiveFeatures row = active_features(args, i);
    count = has_nan(row) ? -1 : 0;
    if (count == 0 && *norm <= args.max_norm) {
      if (args.k > 0) keep_largest(row, static_cast<int>(args.k), {histogram, partial, found});
      count = emit(args, i, row, partial);
    }
  }
  if (threadIdx.x == 0) args.count[i] = count;
  return count;
}

__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(const EncodeRows args) {
  float norm;
  finish_row(args, blockIdx.x, false, &norm);
}

// ---- Launching ----

template <int R>
cudaError_t launch_encode(const EncodeRows& args, cudaStream_t stream) {
  return with_weights(args.w_type, loads_16_bytes(args.W_enc, args.w_type, args.d), [&](auto weights) {
    using Type = decltype(weights);
    const dim3 grid(static_cast<unsigned>((args.num_rows + R - 1) / R), static_cast<unsigned>(args.num_words));
    LAUNCH((encode_kernel<typename Type::W, Type::V, R>), grid, kEncodeThreads, 0, stream, args);
    return cudaGetLastError();
  });
}

inline cudaError_t launch_encode(const EncodeRows& args, cudaStream_t stream) {
  if (args.num_words == 0) return cudaSuccess;
  if (args.num_rows == 1) return launch_encode<1>(args, stream);
  if (args.num_rows <= 4) return launch_encode<4>(args, stream);
  if (args.num_rows <= 8) return launch_encode<8>(args, stream);
  return launch_encode<16>(args, stream);
}

inline cudaError_t launch(const SaeEncodeArgs& args, cudaStream_t stream) {
  const int64_t num_words = num_bitmap_words(args.d_sae);
  float* const pre = static_cast<float*>(args.workspace);
  for (int64_t first = 0; first < args.num_rows; first += kRowsPerLaunch) {
    const int64_t left = args.num_rows - first, num_rows = left < kRowsPerLaunch ? left : kRowsPerLaunch;
    const int64_t x_bytes = first * args.x_row_stride * (args.x_type == DType::float32 ? 4 : 2);
    const EncodeRows rows = {static_cast<const char*>(args.x) + x_bytes,
                             args.x_type,
                             args.x_row_stride,
                             num_rows,
                             args.d,
                             nullptr,
                             num_rows,
                             nullptr,
                             args.W_enc,
                             args.w_type,
                             args.b_enc,
                             args.threshold,
                             args.d_sae,
                             args.max_norm,
                             args.k,
                             args.indices + first * args.capacity,
                             args.values + first * args.capacity,
                             args.capacity,
                             args.count + first,
                             pre,
                             reinterpret_cast<unsigned*>(pre + num_rows * num_words * 32),
                             num_words};
    const cudaError_t error = launch_encode(rows, stream);
    if (error != cudaSuccess) return error;
    LAUNCH(finish_kernel, static_cast<unsigned>(num_rows), kFinishThreads, 0, stream, rows);
    if (const cudaError_t finish_error = cudaGetLastError(); finish_error != cudaSuccess) return finish_error;
  }
  return cudaSuccess;
}

}  // namespace steerserve
