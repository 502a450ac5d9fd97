// steer_delta on a GPU. ops.h has the maths; here is how it is laid out.
//
// One block edits one row, all stages in turn, with the row as float32 in shared memory. Rows without entries return
// after reading their bounds. A stage is
//
//     statistics   |x|, and mean and deviation if an entry's SAE normalizes by them: block sums in a fixed order
//     probe        a warp takes every 16th entry; its lanes check up to 32 entries at once, one a lane, then share
//                  the dot product of one entry after another, then apply the activation one a lane again
//     scores       one lane adds the monitors' terms, in the order of the entries
//     edit         a thread takes an entry; edits that are not zero go to a list, in the order of the entries
//     add          a thread owns V columns and adds the list's decoder rows in order, in place
//     store        rounds the row to its own type, also for the next stage
//
// Most entries of most rows do not fire, and their decoder rows are never read: hence the list. It holds one edit a
// thread, so a stage with more entries goes through edit and add several times.
//
// Nothing but the row's own entries decides an order of additions, so a row's bits depend on nothing else. There are
// no atomics. Hazards: `activation` and `score` are written by some threads of a block and read by others, with a
// barrier between; the list may be rewritten only after all columns have read it; the row changes only after every
// probe of the stage, since all entries read the same x.
//
// A bad slot, op, normalization, score_index or a value that is not finite makes the activation NaN, which edits
// nothing, and a monitor's NaN reaches its score, which opens the gates. A stage with bad bounds reports a NaN norm.
//
// Roofline on paper, not measured (H100 SXM, 3.35 TB/s; one SM takes at most about 64 B a clock from the second-level
// cache, 110 GB/s). A row with n entries of which m edit reads (n + m)·d weights: with bfloat16 weights, n = 64 and
// m = 8, 0.33 MB for Gemma-2-2B (d 2304) and 0.59 MB for Llama-3-8B (d 4096), and does 2·(n + m)·d operations, which
// are nothing. One row is one SM: 3.0 and 5.4 µs at its own limit, plus about 2 µs of launch and dependent loads. 16
// rows run side by side in the same time: 5.3 MB and 9.4 MB take 1.6 and 2.8 µs of the whole card's bandwidth. If all
// 64 edit, 5.4 and 9.5 µs. Splitting a row over SMs would save some of this at one row, for a second launch.
//
// occupancy: steer_delta_kernel: 512 threads, 2 blocks per SM with 16 KB of dynamic shared memory each (d = 4096)
#pragma once

#include "cuda/common.cuh"

namespace steerserve {

constexpr int kSteerThreads = 512;
constexpr int kSteerWarps = kSteerThreads / kWarpSize;

__device__ inline bool is_slot(const SteerDeltaArgs& args, int slot) { return 0 <= slot && slot < args.num_slots; }

// The entry's slot, or −1 if the entry is bad. All loads first, or each would wait for the test of another.
__device__ inline int checked_slot(const SteerDeltaArgs& args, int entry, const Range& scores) {
  const int slot = args.slot[entry], score_index = args.score_index[entry];
  const uint8_t op = args.op[entry];
  const float value = args.value[entry];
  const bool is_scored = scores.begin <= score_index && score_index < scores.end;
  const bool valid = is_slot(args, slot) && op < kNumSteerOps && is_finite(value) && (is_scored || score_index == -1);
  return valid && args.normalization[slot] < kNumNormalizations ? slot : -1;
}

__device__ inline float activate(const SteerDeltaArgs& args, int slot, float product, const RowStatistics& row) {
  const float scale = normalization_scale(args.normalization[slot], row, static_cast<int>(args.d));
  const float pre = product / scale + args.b_enc[slot], threshold = args.threshold[slot],
              max_norm = args.max_norm[slot];
  if (!is_finite(pre)) return pre;
  if (threshold != threshold || max_norm != max_norm) return NAN;
  return pre > threshold && row.norm <= max_norm ? pre : 0.0f;
}

// x · w, over a warp.
template <class W, int V>
__device__ float dot(const W* w, const float* x, int d) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) % kWarpSize * V; i < d; i += kWarpSize * V) {
    const Pack<W, V> weights = Pack<W, V>::load(w + i);
    float elements[V];
    read<V>(x, i, d, elements);
#pragma unroll
    for (int j = 0; j < V; ++j) sum = fmaf(weights[j], elements[j], sum);
  }
  return warp_sum(sum);
}

// Writes the activations of all entries of a stage.
template <class W, int V>
__device__ void probe(const SteerDeltaArgs& args, const Range& entries, const Range& scores, const float* x,
                      const RowStatistics& row) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, d = static_cast<int>(args.d);
  const W* const bank = static_cast<const W*>(args.W_enc);
  for (int first = entries.begin + warp; first < entries.end; first += kSteerThreads) {
    const int entry = first + kSteerWarps * lane;
    const int slot = entry < entries.end ? checked_slot(args, entry, scores) : -1;
    float product = 0.0f;
    for (int j = 0; j < kWarpSize && first + kSteerWarps * j < entries.end; ++j) {
      const int turn = __shfl_sync(kAllLanes, slot, j);
      if (turn < 0) continue;
      const float total = dot<W, V>(bank + static_cast<int64_t>(turn) * d, x, d);
      if (lane == j) product = total;
    }
    if (entry < entries.end) args.activation[entry] = slot < 0 ? NAN : activate(args, slot, product, row);
  }
}

// Adds the terms of a stage's monitors to the row's scores. For one warp; its first lane does the additions.
__device__ inline void add_scores(const SteerDeltaArgs& args, const Range& entries, const Range& scores) {
  const int lane = threadIdx.x % kWarpSize;
  int current = -1;
  float total = 0.0f;
  for (int first = entries.begin; first < entries.end; first += kWarpSize) {
    const int entry = first + lane;
    int score_index = -1;
    float value = 0.0f, f = 0.0f;
    if (entry < entries.end && args.op[entry] == kMonitor) {
      const int index = args.score_index[entry];
      if (scores.begin <= index && index < scores.end) score_index = index;
      value = args.value[entry], f = args.activation[entry];
    }
    for (unsigned feeding = __ballot_sync(kAllLanes, score_index >= 0); feeding; feeding &= feeding - 1) {
      const int j = __ffs(feeding) - 1, next = __shfl_sync(kAllLanes, score_index, j);
      const float weight = __shfl_sync(kAllLanes, value, j), feature = __shfl_sync(kAllLanes, f, j);
      if (lane != 0) continue;
      if (next != current) {
        if (current >= 0) args.score[current] = total;
        current = next;
        total = args.score[next];
      }
      total = fmaf(weight, feature, total);
    }
  }
  if (lane == 0 && current >= 0) args.score[current] = total;
}

// Writes the edit of one entry and returns it times its scale. A bad entry's activation is NaN: none of its indices
// may be used.
__device__ inline float edit_entry(const SteerDeltaArgs& args, int entry, const RowStatistics& row) {
  const float f = args.activation[entry];
  float edit = edit_of(args.op[entry], f, args.value[entry]), scale = 1.0f;
  if (edit != 0.0f) {
    const int gate = args.score_index[entry];
    if (gate >= 0 && args.score[gate] <= args.score_threshold[gate]) edit = 0.0f;
    scale = normalization_scale(args.normalization[args.slot[entry]], row, static_cast<int>(args.d));
  }
  args.edit[entry] = edit;
  return scale * edit;
}

// Edits that change something, in the order of their entries.
struct EditList {
  int* slot;       // [kSteerThreads]
  float* scale;    // [kSteerThreads]
  int* num_edits;  // [kSteerWarps]
};

// Lists the edits of entries [first, first + kSteerThreads), and returns their number.
__device__ inline int list_edits(const SteerDeltaArgs& args, int first, int end, const RowStatistics& row,
                                 const EditList& list) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, entry = first + threadIdx.x;
  const float scale = entry < end ? edit_entry(args, entry, row) : 0.0f;
  const unsigned editing = __ballot_sync(kAllLanes, scale != 0.0f);
  if (lane == 0) list.num_edits[warp] = __popc(editing);
  __syncthreads();
  int before = __popc(editing & ((1u << lane) - 1)), total = 0;
  for (int other = 0; other < kSteerWarps; ++other) {
    before += other < warp ? list.num_edits[other] : 0;
    total += list.num_edits[other];
  }
  if (scale != 0.0f) list.slot[before] = args.slot[entry], list.scale[before] = scale;
  __syncthreads();
  return total;
}

template <class W, int V>
__device__ void add_rows(const SteerDeltaArgs& args, const EditList& list, int num_edits, float* x) {
  const int d = static_cast<int>(args.d);
  for (int column = threadIdx.x * V; column < d; column += kSteerThreads * V) {
    const W* const bank = static_cast<const W*>(args.W_dec) + column;
    float sum[V];
    read<V>(x, column, d, sum);
#pragma unroll 4
    for (int j = 0; j < num_edits; ++j) {
      const Pack<W, V> u = Pack<W, V>::load(bank + static_cast<int64_t>(list.slot[j]) * d);
      const float scale = list.scale[j];
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] = fmaf(scale, u[k], sum[k]);
    }
    write<V>(x, column, d, sum);
  }
}

template <class W, int V>
__global__ void __launch_bounds__(kSteerThreads, 2) steer_delta_kernel(const SteerDeltaArgs args) {
  DYNAMIC_SHARED(float, x);  // [d]
  SHARED_ARRAY(float, partial, kSteerWarps);
  SHARED_ARRAY(int, edit_slot, kSteerThreads);
  SHARED_ARRAY(float, edit_scale, kSteerThreads);
  SHARED_ARRAY(int, num_edits, kSteerWarps);
  const EditList list = {edit_slot, edit_scale, num_edits};
  const int64_t n = blockIdx.x;
  const int d = static_cast<int>(args.d);
  const Range scores = segment(args.score_ptr, n, args.num_scores);
  bool loaded = false;

  for (int s = 0; s < args.num_stages; ++s) {
    const int64_t stage = n * args.num_stages + s;
    const Range entries = segment(args.ptr, stage, args.nnz);
    if (!entries.valid && threadIdx.x == 0) args.x_norm[stage] = NAN;
    if (entries.begin == entries.end) continue;

    if (!loaded) {
      for (int i = threadIdx.x; i < d; i += kSteerThreads)
        x[place<V>(i, d)] = load(args.x, args.x_type, n * args.x_row_stride + i);
      loaded = true;
    }
    bool normalized = false;
    for (int entry = entries.begin + threadIdx.x; entry < entries.end; entry += kSteerThreads) {
      const int slot = args.slot[entry];
      normalized |= is_slot(args, slot) && args.normalization[slot] == kLayerNorm;
    }
    const auto at = [&](int i) { return x[place<V>(i, d)]; };
    const RowStatistics row = __syncthreads_or(normalized)
                                  ? row_statistics<kSteerThreads>(d, partial, at)
                                  : RowStatistics{row_norm<kSteerThreads>(d, partial, at), 0.0f, 0.0f};
    if (threadIdx.x == 0) args.x_norm[stage] = row.norm;

    probe<W, V>(args, entries, scores, x, row);
    __syncthreads();
    if (scores.begin < scores.end) {
      if (threadIdx.x < kWarpSize) add_scores(args, entries, scores);
      __syncthreads();
    }

    bool changed = false;
    for (int first = entries.begin; first < entries.end; first += kSteerThreads) {
      const int count = list_edits(args, first, entries.end, row, list);
      if (count == 0) continue;
      add_rows<W, V>(args, list, count, x);
      changed = true;
      __syncthreads();
    }
    if (!changed) continue;
    // The next stage meets at a barrier before it reads x.
    for (int i = threadIdx.x; i < d; i += kSteerThreads)
      x[place<V>(i, d)] = store(args.x, args.x_type, n * args.x_row_stride + i, x[place<V>(i, d)]);
  }
}

inline cudaError_t launch(const SteerDeltaArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0 || args.nnz == 0) return cudaSuccess;
  const bool vectorized =
      loads_16_bytes(args.W_enc, args.w_type, args.d) && loads_16_bytes(args.W_dec, args.w_type, args.d);
  return with_weights(args.w_type, vectorized, [&](auto weights) {
    using Type = decltype(weights);
    const auto kernel = steer_delta_kernel<typename Type::W, Type::V>;
    const size_t shared_bytes = args.d * sizeof(float);
    const cudaError_t error = allow_shared(kernel, shared_bytes);
    if (error != cudaSuccess) return error;
    LAUNCH(kernel, static_cast<unsigned>(args.num_rows), kSteerThreads, shared_bytes, stream, args);
    return cudaGetLastError();
  });
}

}  // namespace steerserve
