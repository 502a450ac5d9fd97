// attend for one tile of queries, over a vector type of vec.h.
//
// Scores are products of queries with keys as in product_kernel.h, whose inner tile takes keys wherever they lie. A
// value row is loaded once for as many queries as registers hold sums of. Limits, not zeros, keep out what a query must
// not see: a weight of zero times a value that is not finite would be NaN. See vec.h for why nothing here may have
// external linkage.
#pragma once

#include "cpu/attend.h"
#include "cpu/product_kernel.h"

namespace steerserve {
namespace {

// exp(x), to a few units in the last place, for x at most 88; a NaN stays one. Below −87 it is exp(−87).
template <class V>
V exp(V x) {
  // x = n ln 2 + r: adding 1.5 · 2²³ rounds x / ln 2 to the integer n, and leaves it in the low bits.
  const V magic = V::splat(12582912.0f);
  x = greatest(V::splat(-87.0f), x);
  const V shifted = multiply_add(x, V::splat(1.44269504f), magic), n = shifted - magic;
  V r = multiply_add(n, V::splat(-0.693359375f), x);  // ln 2 in two parts, the first of which times n is exact
  r = multiply_add(n, V::splat(2.12194440e-4f), r);
  V sum = V::splat(1.0f / 5040);
  constexpr float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float term : terms) sum = multiply_add(sum, r, V::splat(term));
  return add_exponent(sum, shifted);
}

// c · tanh(x / c)
template <class V>
V soft_cap(V x, float cap) {
  const V zero = V::splat(0.0f), limit = V::splat(-40.0f);  // tanh is ±1 beyond ±20
  V twice = greatest(limit, x * V::splat(2.0f / cap));
  twice = zero - greatest(limit, zero - twice);
  const V e = exp(twice), one = V::splat(1.0f);
  return V::splat(cap) * ((e - one) / (e + one));
}

template <class V>
float exp_of(float x) {
  float lanes[V::width];
  exp(V::splat(x)).store(lanes);
  return lanes[0];
}

template <class V>
float greatest_lane(V v) {
  float lanes[V::width];
  v.store(lanes);
  float greatest = lanes[0];
  for (int i = 1; i < V::width; ++i) greatest = lanes[i] > greatest ? lanes[i] : greatest;
  return greatest;
}

// The queries of a tile.
class Queries {
 public:
  Queries(const AttendArgs& args, const AttendTile& tile, int64_t kv_head)
      : args_(args), tile_(tile), kv_head_(kv_head), group_(args.num_heads / args.state.num_kv_heads) {}

  int64_t count() const { return tile_.end - tile_.begin; }
  int64_t token(int64_t i) const { return tile_.first_token + (tile_.begin + i) / group_; }
  int64_t position(int64_t i) const { return args_.state.position[token(i)]; }

  // The first position that query i sees; the last is its own. Both grow with i.
  int64_t first_visible(int64_t i) const {
    return args_.window && position(i) >= args_.window ? position(i) - args_.window + 1 : 0;
  }

  template <class T>
  const T* row(const HeadsView& view, int64_t i) const {
    return static_cast<const T*>(view.data) + token(i) * view.token_stride + head(i) * view.head_stride;
  }

  template <class T>
  T* out_row(int64_t i) const {
    return static_cast<T*>(args_.out) + (token(i) * args_.num_heads + head(i)) * args_.state.d_head;
  }

 private:
  int64_t head(int64_t i) const { return kv_head_ * group_ + (tile_.begin + i) % group_; }

  const AttendArgs& args_;
  const AttendTile& tile_;
  int64_t kv_head_, group_;
};

// Enough queries to share each load of a key; few enough for their sums to stay in the first-level cache.
constexpr int64_t kMaxQueries = 24;

// Vectors of a value row whose sums stay in registers, with kRows<V> queries.
template <class V>
constexpr int kColumns = V::width == 16 ? 4 : 2;

template <class V, class T>
class TileAttention {
 public:
  TileAttention(const AttendArgs& args, const AttendTile& tile, int64_t kv_head, float* scratch)
      : args_(args),
        tile_(args, tile, kv_head),
        kv_head_(kv_head),
        num_queries_(tile_.count()),
        d_(args.state.d_head),
        stride_(packed_stride(d_)),
        queries_(scratch),
        sums_(queries_ + num_queries_ * stride_),
        weights_(sums_ + num_queries_ * stride_),
        greatest_(weights_ + num_queries_ * kKeys),
        total_(greatest_ + num_queries_) {}

  static int64_t scratch_size(int64_t num_queries, int64_t d_head) {
    return num_queries * (2 * packed_stride(d_head) + kKeys + 2);
  }

  void run() {
    for (int64_t i = 0; i < num_queries_; ++i) load_query(i);
    const int64_t last = tile_.position(num_queries_ - 1);
    for (int64_t first = tile_.first_visible(0) / kKeys * kKeys; first <= last; first += kKeys) attend_keys(first);
    for (int64_t i = 0; i < num_queries_; ++i) store(i);
  }

 private:
  void load_query(int64_t i) {
    const T* q = tile_.template row<T>(args_.q, i);
    float *query = queries_ + i * stride_, *sum = sums_ + i * stride_;
    for (int64_t c = 0; c < d_; ++c) query[c] = widen(q[c]) * args_.scale;
    for (int64_t c = 0; c < d_; ++c) sum[c] = 0.0f;
    greatest_[i] = -__FLT_MAX__;
    total_[i] = 0.0f;
  }

  // Adds the keys [first, first + kKeys) to the queries that see any of them.
  void attend_keys(int64_t first) {
    // Both limits of what query i sees grow with i.
    const auto begin_of = [&](int64_t i) {
      return tile_.first_visible(i) > first ? tile_.first_visible(i) - first : 0;
    };
    const auto end_of = [&](int64_t i) {
      return tile_.position(i) + 1 - first < kKeys ? tile_.position(i) + 1 - first : kKeys;
    };
    int64_t begin = 0, end = num_queries_;
    while (begin < end && end_of(begin) <= 0) ++begin;
    while (begin < end && begin_of(end - 1) >= kKeys) --end;
    if (begin == end) return;
    find_keys(first, begin_of(begin), end_of(end - 1));
    for (int64_t i = begin; i < end; i += kRows<V>) {
      const int64_t rows = end - i < kRows<V> ? end - i : kRows<V>, last = i + rows - 1;
      with_count<kRows<V>>(rows, [&](auto r) { score<r.value>(i, begin_of(i), end_of(last)); });
      for (int64_t row = i; row <= last; ++row) weigh(row, begin_of(row), end_of(row));
      // Keys that all of these queries see are added to all at once; those before and behind, query by query.
      int64_t common_begin = begin_of(last), common_end = end_of(i);
      if (common_begin >= common_end) common_begin = common_end = kKeys;
      for (int64_t row = i; row <= last; ++row)
        add_values<1>(row, begin_of(row), common_begin < end_of(row) ? common_begin : end_of(row));
      with_count<kRows<V>>(rows, [&](auto r) { add_values<r.value>(i, common_begin, common_end); });
      for (int64_t row = i; row <= last; ++row) add_values<1>(row, common_end, end_of(row));
    }
  }

  // Where the keys [begin, end) from position `first` lie.
  void find_keys(int64_t first, int64_t begin, int64_t end) {
    const AttentionState& state = args_.state;
    const int32_t* blocks = state.block_table + state.row[tile_.token(0)] * state.max_blocks;
    int64_t block = (first + begin) / state.block_size, place = (first + begin) % state.block_size;
    for (int64_t j = begin; j < end; ++j) {
      offset_[j] = ((blocks[block] * state.num_kv_heads + kv_head_) * state.block_size + place) * d_;
      if (++place == state.block_size) ++block, place = 0;
    }
  }

  template <int R>
  void score(int64_t i, int64_t begin, int64_t end) {
    const T* keys = static_cast<const T*>(args_.state.k_cache);
    float* scores = weights_ + i * kKeys;
    for (int64_t j = 0; j < R * kKeys; ++j) scores[j] = 0.0f;
    for (int64_t j = begin; j < end; j += kFeatures) {
      const int64_t count = end - j < kFeatures ? end - j : kFeatures;
      const T* key[kFeatures];
      for (int64_t k = 0; k < kFeatures; ++k) key[k] = keys + offset_[j + (k < count ? k : count - 1)];
      multiply_tile<V, R>(queries_ + i * stride_, stride_, key, count, d_, scores + j, kKeys);
    }
  }

  // Turns scores of query i into weights relative to the greatest score so far.
  void weigh(int64_t i, int64_t begin, int64_t end) {
    float* weights = weights_ + i * kKeys;
    if (args_.softcap > 0.0f)
      for (int64_t j = begin / V::width * V::width; j < end; j += V::width)
        soft_cap(V::load(weights + j), args_.softcap).store(weights + j);
    for (int64_t j = begin / V::width * V::width; j < begin; ++j) weights[j] = -__builtin_inff();
    const int64_t padded_end = ceil_div(end, V::width) * V::width;
    for (int64_t j = end; j < padded_end; ++j) weights[j] = -__builtin_inff();
    V greatest_lanes = V::splat(greatest_[i]);
    for (int64_t j = begin / V::width * V::width; j < end; j += V::width)
      greatest_lanes = greatest(greatest_lanes, V::load(weights + j));
    const float now = greatest_lane(greatest_lanes);
    V total = V::splat(0.0f);
    for (int64_t j = begin / V::width * V::width; j < end; j += V::width) {
      const V weight = exp(V::load(weights + j) - V::splat(now));
      weight.store(weights + j);
      total = total + weight;
    }
    if (now != greatest_[i]) rescale(i, exp_of<V>(greatest_[i] - now));
    greatest_[i] = now;
    total_[i] += total.sum();
  }

  void rescale(int64_t i, float factor) {
    float* sum = sums_ + i * stride_;
    for (int64_t c = 0; c < d_; ++c) sum[c] *= factor;
    total_[i] *= factor;
  }

  // Adds weighted values [begin, end) to queries i .. i + R.
  template <int R>
  void add_values(int64_t i, int64_t begin, int64_t end) {
    if (begin >= end) return;
    int64_t c = 0;
    for (; c + kColumns<V> * V::width <= d_; c += kColumns<V> * V::width) add_columns<R, kColumns<V>>(i, begin, end, c);
    for (; c + V::width <= d_; c += V::width) add_columns<R, 1>(i, begin, end, c);
    if (c < d_) add_columns<R, 1>(i, begin, end, c, d_ - c);
  }

  // C vectors of columns, or the first `rest` columns of one.
  template <int R, int C, class... Rest>
  void add_columns(int64_t i, int64_t begin, int64_t end, int64_t column, Rest... rest) {
    const T* values = static_cast<const T*>(args_.state.v_cache) + column;
    float* sums = sums_ + i * stride_ + column;
    V sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] = V::load(sums + r * stride_ + c * V::width, rest...);
    for (int64_t j = begin; j < end; ++j) {
      V value[C];
      for (int c = 0; c < C; ++c) value[c] = V::load(values + offset_[j] + c * V::width, rest...);
      for (int r = 0; r < R; ++r) {
        const V weight = V::splat(weights_[(i + r) * kKeys + j]);
        for (int c = 0; c < C; ++c) sum[r][c] = multiply_add(weight, value[c], sum[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c].store(sums + r * stride_ + c * V::width, rest...);
  }

  void store(int64_t i) {
    T* out = tile_.template out_row<T>(i);
    for (int64_t c = 0; c < d_; ++c) narrow(sums_[i * stride_ + c] / total_[i], out + c);
  }

  const AttendArgs& args_;
  const Queries tile_;
  const int64_t kv_head_, num_queries_, d_, stride_;
  float *const queries_, *const sums_;    // [num_queries, stride]: scaled queries; weighted sums of values
  float* const weights_;                  // [num_queries, kKeys]: scores, then weights
  float *const greatest_, *const total_;  // [num_queries]: score and sum of weights so far
  int64_t offset_[kKeys];                 // of each key of the tile, in elements of the cache
};

template <class V>
void attend_tile(const AttendArgs& args, const AttendTile& tile, int64_t kv_head, float* scratch) {
  with_types(args.state.type, args.state.type,
             [&](auto t, auto) { TileAttention<V, decltype(t)>(args, tile, kv_head, scratch).run(); });
}

template <class V>
constexpr AttendKernel attend_kernel{kMaxQueries, TileAttention<V, float>::scratch_size, attend_tile<V>};

}  // namespace
}  // namespace steerserve
