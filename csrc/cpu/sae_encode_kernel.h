// sae_encode by multiply-adds over a vector type of vec.h: the kernel for any types of x and weights.
//
// x is widened to float once. The inner tile multiplies kFeatures features with up to kRows rows along d, one
// vector accumulator a product: enough products that loads do not bound it, few enough for the registers. d is cut
// into blocks so that the rows of a tile stay in the first-level cache while a panel's features pass.
//
// Nothing is prefetched by hand: a panel is one stretch of memory, which the hardware follows at full bandwidth, and
// prefetches for the next panel, tried, take the line buffers that this one's loads need. See vec.h for why nothing
// here may have external linkage.
#pragma once

#include "cpu/row_stats.h"
#include "cpu/sae_encode.h"
#include "cpu/vec.h"

namespace steerserve {
namespace {

constexpr int kFeatures = 4;

// With kFeatures, as many sums as leave registers for the operands.
template <class V>
constexpr int kRows = V::width == 1 ? 2 : V::width / 8 * 3;

// Elements of a row that are multiplied before the next features come: kRows of them fill half of the cache.
constexpr int64_t kMaxBlock = 1024;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Hands a finished tile [num_rows, panel_size] to the runs.
template <class V>
void find_active(const EncodeBatch& batch, const float* tile, int64_t panel, int64_t first, int64_t count,
                 int64_t row_begin, int64_t row_end, Runs& runs) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const Run run = runs.open(panel, row);
    runs.close(panel, row,
               select_active<V>(batch.args, tile + (row - row_begin) * batch.panel_size, 1.0f / batch.stats[row].scale,
                                runs.floor(row), first, count, run));
  }
}

// A packed row is d floats; rows are padded so that they do not fall on the same cache sets.
inline int64_t packed_stride(int64_t d) { return ceil_div(d, 16) * 16 + 16; }

inline int64_t widened_size(int64_t num_rows, int64_t d) { return num_rows * packed_stride(d) * sizeof(float); }

template <class V>
void widen_rows(const SaeEncodeArgs& args, const int32_t* rows, Normalization normalization, int64_t begin, int64_t end,
                void* packed, RowStats* stats, float*) {
  for (int64_t i = begin; i < end; ++i) {
    float* wide = static_cast<float*>(packed) + i * packed_stride(args.d);
    const int64_t first = (rows ? rows[i] : i) * args.x_row_stride;
    with_types(args.x_type, args.w_type, [&](auto x_type, auto) {
      const auto* x = static_cast<const decltype(x_type)*>(args.x) + first;
      for (int64_t c = 0; c < args.d; ++c) wide[c] = widen(x[c]);
    });
    stats[i] = row_stats<V>(wide, args.d, normalization);
  }
}

// totals[j] = the sum of v[j]'s lanes, in an order that is the same for all j.
inline void sums_of(const VecScalar (&v)[kFeatures], float* totals) {
  for (int j = 0; j < kFeatures; ++j) totals[j] = v[j].v;
}

#if defined(__AVX2__)
inline void sums_of(const VecAvx2 (&v)[kFeatures], float* totals) {
  const __m256 ab = _mm256_hadd_ps(v[0].v, v[1].v), cd = _mm256_hadd_ps(v[2].v, v[3].v);
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
#endif

#if defined(__AVX512F__)
inline void sums_of(const VecAvx512 (&v)[kFeatures], float* totals) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0].v, v[1].v), _mm512_unpackhi_ps(v[0].v, v[1].v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2].v, v[3].v), _mm512_unpackhi_ps(v[2].v, v[3].v));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#endif

// product[r][j] += x[r] · w[j] for R rows and `num_features` <= kFeatures features, over `count` of their elements.
template <class V, int R, class W>
void multiply_tile(const float* x, int64_t x_stride, const W* w, int64_t d, int64_t num_features, int64_t count,
                   float* product, int64_t product_stride) {
  const W* feature[kFeatures];  // the last one several times where there are fewer
  for (int64_t j = 0; j < kFeatures; ++j) feature[j] = w + (j < num_features ? j : num_features - 1) * d;
  V sum[R][kFeatures];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kFeatures; ++j) sum[r][j] = V::splat(0.0f);
  const auto multiply_at = [&](int64_t i, auto... rest) {
    V weights[kFeatures];
    for (int j = 0; j < kFeatures; ++j) weights[j] = V::load(feature[j] + i, rest...);
    for (int r = 0; r < R; ++r) {
      const V values = V::load(x + r * x_stride + i, rest...);
      for (int j = 0; j < kFeatures; ++j) sum[r][j] = multiply_add(values, weights[j], sum[r][j]);
    }
  };
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) multiply_at(i);
  if (i < count) multiply_at(i, count - i);
  for (int r = 0; r < R; ++r) {
    float totals[kFeatures];
    sums_of(sum[r], totals);
    for (int64_t j = 0; j < num_features; ++j) product[r * product_stride + j] += totals[j];
  }
}

// All features [begin, end) with rows x[0 .. R): the tile of one panel and row group.
template <class V, int R, class W>
void multiply_panel(const EncodeBatch& batch, const float* x, int64_t begin, int64_t end, float* tile) {
  const int64_t d = batch.args.d, x_stride = packed_stride(d);
  const int64_t num_blocks = d <= kMaxBlock ? 1 : ceil_div(d, kMaxBlock);
  const int64_t block = ceil_div(ceil_div(d, num_blocks), 16) * 16;
  const W* weights = static_cast<const W*>(batch.args.W_enc);
  // Weights that no other rows will meet are read in the order they lie in.
  const int64_t sweep = batch.args.num_rows == R ? kFeatures : end - begin;
  for (int64_t i = 0; i < R * batch.panel_size; ++i) tile[i] = 0.0f;
  for (int64_t first = begin; first < end; first += sweep) {
    const int64_t last = first + sweep < end ? first + sweep : end;
    for (int64_t c = 0; c < d; c += block)
      for (int64_t j = first; j < last; j += kFeatures)
        multiply_tile<V, R>(x + c, x_stride, weights + j * d + c, d, last - j < kFeatures ? last - j : kFeatures,
                            d - c < block ? d - c : block, tile + (j - begin), batch.panel_size);
  }
}

// multiply_panel for `num_rows` <= R rows.
template <class V, int R, class W>
void multiply_rows(int64_t num_rows, const EncodeBatch& batch, const float* x, int64_t begin, int64_t end,
                   float* tile) {
  if constexpr (R > 1)
    if (num_rows < R) return multiply_rows<V, R - 1, W>(num_rows, batch, x, begin, end, tile);
  multiply_panel<V, R, W>(batch, x, begin, end, tile);
}

template <class V, class W>
void encode_features_of(const EncodeBatch& batch, int64_t begin, int64_t end, float* tile, Runs& runs) {
  const SaeEncodeArgs& args = batch.args;
  const int64_t num_groups = ceil_div(args.num_rows, kRows<V>);
  for (int64_t first = begin, panel = 0; first < end; first += batch.panel_size, ++panel) {
    const int64_t last = first + batch.panel_size < end ? first + batch.panel_size : end;
    for (int64_t group = 0; group < num_groups; ++group) {
      const int64_t row_begin = group * args.num_rows / num_groups, row_end = (group + 1) * args.num_rows / num_groups;
      const float* x = static_cast<const float*>(batch.packed) + row_begin * packed_stride(args.d);
      multiply_rows<V, kRows<V>, W>(row_end - row_begin, batch, x, first, last, tile);
      find_active<V>(batch, tile, panel, first, last - first, row_begin, row_end, runs);
    }
  }
}

template <class V>
void encode_features(const EncodeBatch& batch, int64_t begin, int64_t end, float* tile, Runs& runs) {
  with_types(DType::float32, batch.args.w_type,
             [&](auto, auto w) { encode_features_of<V, decltype(w)>(batch, begin, end, tile, runs); });
}

template <class V>
constexpr EncodeKernel encode_kernel{kFeatures, kRows<V>, widened_size, widen_rows<V>, encode_features<V>};

}  // namespace
}  // namespace steerserve
