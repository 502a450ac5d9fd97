// Products by multiply-adds over a vector type of vec.h: the kernel for any types of rows and weights.
//
// Rows are packed once as V::Packed: widened to float, or, to be multiplied in pairs, as bfloat16. The inner tile
// multiplies kFeatures features with up to kRows rows along d, one vector accumulator a product: enough products that
// loads do not bound it, few enough for the registers. d is cut into blocks so that the rows of a tile stay in the
// first-level cache while a panel's features pass.
//
// Nothing is prefetched by hand: a panel is one stretch of memory, which the hardware follows at full bandwidth, and
// prefetches for the next panel, tried, take the line buffers that this one's loads need. See vec.h for why nothing
// here may have external linkage.
#pragma once

#include "cpu/product.h"
#include "cpu/vec.h"

namespace steerserve {
namespace {

constexpr int kFeatures = 4;

// With kFeatures, as many sums as leave registers for the operands.
template <class V>
constexpr int kRows = V::Sum::width == 1 ? 2 : V::Sum::width / 8 * 3;

// Elements of a row that are multiplied before the next features come: kRows of them fill half of the cache.
template <class V>
constexpr int64_t kMaxBlock = 4096 / sizeof(typename V::Packed);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A packed row is d elements; rows are padded so that they do not fall on the same cache sets.
inline int64_t packed_stride(int64_t d) { return ceil_div(d, 32) * 32 + 32; }

template <class V>
int64_t packed_size(int64_t num_rows, int64_t d) {
  return num_rows * packed_stride(d) * sizeof(typename V::Packed);
}

// Packs the row that begins at element `first` of x.
inline void pack_into(float* packed, const void* x, DType type, int64_t first, int64_t d) {
  with_types(type, type, [&](auto x_type, auto) {
    const auto* row = static_cast<const decltype(x_type)*>(x) + first;
    for (int64_t c = 0; c < d; ++c) packed[c] = widen(row[c]);
  });
}

inline void pack_into(BFloat16* packed, const void* x, DType, int64_t first, int64_t d) {
  __builtin_memcpy(packed, static_cast<const BFloat16*>(x) + first, d * sizeof(BFloat16));
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

// body(W()) for the storage types of weights that V multiplies rows with.
template <class V, class Body>
void with_weights(DType type, Body body) {
  if constexpr (V::width == V::Sum::width)
    with_types(type, type, [&](auto, auto w) { body(w); });
  else
    body(BFloat16());
}

// body(Count<n>()) for n = 1 .. N.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <int N, class Body>
void with_count(int64_t n, Body body) {
  if constexpr (N > 1)
    if (n < N) return with_count<N - 1>(n, body);
  body(Count<N>());
}

// product[r][j] += x[r] · w[j] for R rows and the first `num_features` of kFeatures features, over `count` of their
// elements. w names a feature that may be read even where there is none.
template <class V, int R, class W>
void multiply_tile(const typename V::Packed* x, int64_t x_stride, const W* const (&w)[kFeatures], int64_t num_features,
                   int64_t count, float* product, int64_t product_stride) {
  typename V::Sum sum[R][kFeatures];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kFeatures; ++j) sum[r][j] = V::Sum::splat(0.0f);
  const auto multiply_at = [&](int64_t i, auto... rest) {
    V weights[kFeatures];
    for (int j = 0; j < kFeatures; ++j) weights[j] = V::load(w[j] + i, rest...);
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

// Features [begin, end) with rows x[0 .. R): the tile of one panel and row group.
template <class V, int R, class W>
void multiply_panel(const Product& product, const typename V::Packed* x, int64_t begin, int64_t end, float* tile) {
  const int64_t d = product.d, x_stride = packed_stride(d);
  const int64_t num_blocks = d <= kMaxBlock<V> ? 1 : ceil_div(d, kMaxBlock<V>);
  const int64_t block = ceil_div(ceil_div(d, num_blocks), 32) * 32;
  const W* weights = static_cast<const W*>(product.weights);
  // Weights that no other rows will meet are read in the order they lie in.
  const int64_t sweep = product.num_rows == R ? kFeatures : end - begin;
  for (int64_t i = 0; i < R * product.panel_size; ++i) tile[i] = 0.0f;
  for (int64_t first = begin; first < end; first += sweep) {
    const int64_t last = first + sweep < end ? first + sweep : end;
    for (int64_t c = 0; c < d; c += block)
      for (int64_t j = first; j < last; j += kFeatures) {
        const int64_t num_features = last - j < kFeatures ? last - j : kFeatures;
        const W* features[kFeatures];  // the last one several times where there are fewer
        for (int64_t i = 0; i < kFeatures; ++i)
          features[i] = weights + (j + (i < num_features ? i : num_features - 1)) * d + c;
        multiply_tile<V, R>(x + c, x_stride, features, num_features, d - c < block ? d - c : block, tile + (j - begin),
                            product.panel_size);
      }
  }
}

// finish(Block) for every panel of features [begin, end) and group of rows; `tile` has room for one.
template <class V, class Finish>
void multiply(const Product& product, int64_t begin, int64_t end, float* tile, Finish finish) {
  const int64_t num_groups = ceil_div(product.num_rows, kRows<V>);
  for (int64_t first = begin, panel = 0; first < end; first += product.panel_size, ++panel) {
    const int64_t last = first + product.panel_size < end ? first + product.panel_size : end;
    for (int64_t group = 0; group < num_groups; ++group) {
      const int64_t row_begin = group * product.num_rows / num_groups,
                    row_end = (group + 1) * product.num_rows / num_groups;
      const auto* x = static_cast<const typename V::Packed*>(product.packed) + row_begin * packed_stride(product.d);
      with_weights<V>(product.w_type, [&](auto w) {
        with_count<kRows<V>>(row_end - row_begin, [&](auto rows) {
          multiply_panel<V, decltype(rows)::value, decltype(w)>(product, x, first, last, tile);
        });
      });
      finish(Block{tile, panel, first, last - first, row_begin, row_end});
    }
  }
}

}  // namespace
}  // namespace steerserve
