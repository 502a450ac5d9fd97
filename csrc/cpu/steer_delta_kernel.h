// The body of steer_delta for one row, over a vector type of vec.h; ops.h has the maths.
//
// Per stage: widen x to fp32 (bf16 only, into scratch), probe all encoder rows, add up the scores, decide the edits,
// add the decoder rows of the entries that change something, round x back. x stays in the first-level cache; what
// costs is streaming rows of the bank. See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/add_rows.h"
#include "cpu/edit.h"
#include "cpu/row_stats.h"
#include "cpu/vec.h"
#include "ops.h"

namespace steerserve {
namespace {

// What the entries of a stage share.
struct StageInput {
  float* x;
  float norm;
  float scale[kNumNormalizations];  // only of the kinds that some entry uses
};

template <class V>
StageInput read_stage(const SteerDeltaArgs& args, float* x, int64_t begin, int64_t end) {
  StageInput input{x, norm<V>(x, args.d), {}};
  bool used[kNumNormalizations] = {};
  for (int64_t entry = begin; entry < end; ++entry) used[args.normalization[args.slot[entry]]] = true;
  for (int kind = 0; kind < kNumNormalizations; ++kind)
    if (used[kind]) input.scale[kind] = normalization_scale<V>(static_cast<Normalization>(kind), x, args.d, input.norm);
  return input;
}

inline float scale_of(const SteerDeltaArgs& args, const StageInput& input, int64_t entry) {
  return input.scale[args.normalization[args.slot[entry]]];
}

inline float activate(float pre, float threshold, float x_norm, float max_norm) {
  if (!__builtin_isfinite(pre)) return pre;
  if (__builtin_isnan(threshold) || __builtin_isnan(max_norm)) return __builtin_nanf("");
  return pre > threshold && x_norm <= max_norm ? pre : 0.0f;
}

// Encoder rows streamed side by side: enough to share each load of x, few enough for the hardware prefetchers.
constexpr int kProbesAtOnce = 4;

// Activations of entries [begin, begin + J).
template <class V, class W, int J>
void probe(const SteerDeltaArgs& args, const StageInput& input, int64_t begin) {
  const W* w[J];
  float products[J];
  for (int j = 0; j < J; ++j) w[j] = static_cast<const W*>(args.W_enc) + args.slot[begin + j] * args.d;
  dot<V, J>(input.x, w, args.d, products);
  for (int j = 0; j < J; ++j) {
    const int64_t entry = begin + j, slot = args.slot[entry];
    const float pre = products[j] / scale_of(args, input, entry) + args.b_enc[slot];
    args.activation[entry] = activate(pre, args.threshold[slot], input.norm, args.max_norm[slot]);
  }
}

inline void add_scores(const SteerDeltaArgs& args, int64_t begin, int64_t end) {
  for (int64_t entry = begin; entry < end; ++entry)
    if (args.op[entry] == kMonitor && args.score_index[entry] >= 0)
      args.score[args.score_index[entry]] += args.value[entry] * args.activation[entry];
}

// Returns whether any edit is not zero.
inline bool decide_edits(const SteerDeltaArgs& args, int64_t begin, int64_t end) {
  bool changes = false;
  for (int64_t entry = begin; entry < end; ++entry) {
    const int32_t gate = args.score_index[entry];
    const bool shut = gate >= 0 && args.score[gate] <= args.score_threshold[gate];
    args.edit[entry] = shut ? 0.0f : edit_of(args.op[entry], args.activation[entry], args.value[entry]);
    changes |= args.edit[entry] != 0.0f;
  }
  return changes;
}

// x += Σ scale · edit · decoder row over the entries that change something.
template <class V, class W>
void apply(const SteerDeltaArgs& args, const StageInput& input, int64_t begin, int64_t end) {
  RowSum<V, W> sum(args.d, input.x);
  for (int64_t entry = begin; entry < end; ++entry)
    if (args.edit[entry] != 0.0f)
      sum.add(args.edit[entry] * scale_of(args, input, entry),
              static_cast<const W*>(args.W_dec) + args.slot[entry] * args.d);
  sum.finish();
}

template <class V, class T, class W>
void steer_row_of(const SteerDeltaArgs& args, int64_t row, float* scratch) {
  T* x = static_cast<T*>(args.x) + row * args.x_row_stride;
  for (int64_t stage = row * args.num_stages; stage < (row + 1) * args.num_stages; ++stage) {
    const int64_t begin = args.ptr[stage], end = args.ptr[stage + 1];
    if (begin == end) continue;
    const StageInput input = read_stage<V>(args, widen_row(x, args.d, scratch), begin, end);
    args.x_norm[stage] = input.norm;
    int64_t entry = begin;
    for (; entry + kProbesAtOnce <= end; entry += kProbesAtOnce) probe<V, W, kProbesAtOnce>(args, input, entry);
    for (; entry < end; ++entry) probe<V, W, 1>(args, input, entry);
    add_scores(args, begin, end);
    if (!decide_edits(args, begin, end)) continue;
    apply<V, W>(args, input, begin, end);
    narrow_row(input.x, args.d, x);
  }
}

// `scratch` holds d floats; it is used only if x is not float.
template <class V>
void steer_row(const SteerDeltaArgs& args, int64_t row, float* scratch) {
  with_types(args.x_type, args.w_type,
             [&](auto x, auto w) { steer_row_of<V, decltype(x), decltype(w)>(args, row, scratch); });
}

}  // namespace
}  // namespace steerserve
