// sae_encode over a vector type of vec.h: what is done before and after the products of product_kernel.h.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/product_kernel.h"
#include "cpu/row_stats.h"
#include "cpu/sae_encode.h"

namespace steerserve {
namespace {

// The statistics of a row from its float values.
template <class V>
RowStats row_stats(const float* x, int64_t d, Normalization normalization) {
  const float x_norm = norm<V>(x, d);
  return {x_norm, normalization_scale<V>(normalization, x, d, x_norm),
          normalization == kLayerNorm ? mean<V>(x, d) : 0.0f};
}

template <class V>
V load_at_most(const float* p, int64_t count) {
  return count < V::width ? V::load(p, count) : V::load(p);
}

// Writes to `run` the active ones of the `count` features from `first`, given their products with a row. Returns how
// many, or −1 if some feature can not be told. Places past `count` read as a pre-activation of 0 at a threshold of 0,
// which is not active.
template <class V>
int64_t select_active(const SaeEncodeArgs& args, const float* product, float inverse_scale, float floor, int64_t first,
                      int64_t count, const Run& run) {
  int64_t num_found = 0;
  uint32_t unknown = 0;
  const V scale = V::splat(inverse_scale), lowest = V::splat(floor);
  for (int64_t j = 0; j < count; j += V::width) {
    const int64_t rest = count - j;
    const V bias = load_at_most<V>(args.b_enc + first + j, rest);
    const V pre = multiply_add(load_at_most<V>(product + j, rest), scale, bias);
    const V threshold = load_at_most<V>(args.threshold + first + j, rest);
    unknown |= unordered(pre, threshold);
    uint32_t active = greater(pre, threshold) & greater(pre, lowest);
    if (!active) continue;
    float lanes[V::width];
    pre.store(lanes);
    for (; active; active &= active - 1) {
      const int lane = __builtin_ctz(active);
      run.indices[num_found] = static_cast<int32_t>(first + j + lane);
      run.values[num_found++] = lanes[lane];
    }
  }
  return unknown ? -1 : num_found;
}

// Hands a finished tile to the runs.
template <class V>
void find_active(const EncodeBatch& batch, const Block& block, Runs& runs) {
  for (int64_t row = block.row_begin; row < block.row_end; ++row) {
    const Run run = runs.open(block.panel, row);
    const float* products = block.tile + (row - block.row_begin) * batch.product.panel_size;
    runs.close(block.panel, row,
               select_active<V>(batch.args, products, 1.0f / batch.stats[row].scale, runs.floor(row), block.first,
                                block.count, run));
  }
}

template <class V>
void widen_rows(const SaeEncodeArgs& args, const int32_t* rows, Normalization normalization, int64_t begin, int64_t end,
                void* packed, RowStats* stats, float*) {
  for (int64_t i = begin; i < end; ++i) {
    float* wide = static_cast<float*>(packed) + i * packed_stride(args.d);
    pack_into(wide, args.x, args.x_type, (rows ? rows[i] : i) * args.x_row_stride, args.d);
    stats[i] = row_stats<V>(wide, args.d, normalization);
  }
}

template <class V>
void encode_features(const EncodeBatch& batch, int64_t begin, int64_t end, float* tile, Runs& runs) {
  multiply<V>(batch.product, begin, end, tile, [&](const Block& block) { find_active<V>(batch, block, runs); });
}

template <class V>
constexpr EncodeKernel encode_kernel{{kFeatures, kRows<V>, packed_size<V>}, widen_rows<V>, encode_features<V>};

}  // namespace
}  // namespace steerserve
