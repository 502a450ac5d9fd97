// attend with AMX: the kernel for bfloat16 where heads are whole steps of 32 elements and blocks whole tiles of 16
// keys.
//
//     scores  [16 keys, 16 queries]     += keys, as they lie in a block    · queries, packed once
//     sums    [16 queries, 16 elements] += weights, rounded to bfloat16    · values, packed for each tile of keys
//
// Between the two each query is a lane of a vector. A tile of keys is packed for up to 32 queries. Of a tile that some
// query sees only in part, the rest has weight zero for it: a value that is not finite makes all queries NaN that share
// the tile, though some come before it in their row; such a row is lost anyway.
#include "cpu/attend_kernel.h"
#include "cpu/product_amx_kernel.h"

namespace steerserve {
namespace {

constexpr int64_t kMaxGroups = 2;  // of 16 queries
constexpr int64_t kTileSize = kTileBytes / sizeof(float);
constexpr int64_t kSteps = kKeys / kStep;

// What each tile of scratch holds, counted in tiles.
struct Layout {
  explicit Layout(int64_t d)
      : queries(0),
        scores(queries + kMaxGroups * d / kStep),
        weights(scores + kMaxGroups * kKeys / kTile),
        sums(weights + kMaxGroups * kSteps),
        values(sums + kMaxGroups * d / kTile),
        end(values + kSteps * d / kTile) {}

  int64_t queries;  // [group, step]: tiles B
  int64_t scores;   // [group, keys / 16]
  int64_t weights;  // [group, step]: tiles A
  int64_t sums;     // [group, d / 16]
  int64_t values;   // [step, d / 16]: tiles B
  int64_t end;
};

// Two vectors of float as one of pairs of bfloat16, rounded to the nearest. A NaN may become a number.
inline __m512i pair_up(__m512 even, __m512 odd) {
  const auto rounded = [](__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  };
  return _mm512_or_si512(_mm512_srli_epi32(rounded(even), 16),
                         _mm512_and_si512(rounded(odd), _mm512_set1_epi32(0xffff0000)));
}

// Sixteen queries: each is a lane.
struct Group {
  int64_t count;
  __m512i position;        // of a query; that of the last in lanes without one
  __m512i first_visible;   // position that it sees
  __m512 greatest, total;  // score and sum of weights so far
};

class AmxTileAttention {
 public:
  AmxTileAttention(const AttendArgs& args, const AttendTile& tile, int64_t kv_head, float* scratch)
      : args_(args),
        queries_(args, tile, kv_head),
        kv_head_(kv_head),
        d_(args.state.d_head),
        num_groups_(ceil_div(queries_.count(), kTile)),
        layout_(d_),
        scratch_(scratch) {}

  void run() {
    for (int64_t g = 0; g < num_groups_; ++g) load_group(g);
    for (int64_t i = 0; i < kMaxGroups * d_ / kTile * kTileSize; ++i) tile(layout_.sums)[i] = 0.0f;
    const int64_t last = queries_.position(queries_.count() - 1);
    for (int64_t first = queries_.first_visible(0) / kKeys * kKeys; first <= last; first += kKeys) attend_keys(first);
    for (int64_t i = 0; i < queries_.count(); ++i) store(i);
  }

 private:
  float* tile(int64_t index) const { return scratch_ + index * kTileSize; }

  void load_group(int64_t g) {
    const int64_t begin = g * kTile, rest = queries_.count() - begin;
    Group& group = groups_[g];
    group.count = rest < kTile ? rest : kTile;
    const BFloat16* q[kTile];
    alignas(64) int32_t position[kTile], first_visible[kTile];
    for (int64_t lane = 0; lane < kTile; ++lane) {
      const int64_t i = begin + (lane < group.count ? lane : group.count - 1);
      q[lane] = queries_.row<BFloat16>(args_.q, i);
      position[lane] = static_cast<int32_t>(queries_.position(i));
      first_visible[lane] = static_cast<int32_t>(queries_.first_visible(i));
    }
    interleave(q, group.count, d_, reinterpret_cast<char*>(tile(layout_.queries + g * d_ / kStep)));
    group.position = _mm512_load_si512(position);
    group.first_visible = _mm512_load_si512(first_visible);
    group.greatest = _mm512_set1_ps(-__FLT_MAX__);
    group.total = _mm512_setzero_ps();
  }

  // Adds keys [first, first + kKeys), as far as any query sees them.
  void attend_keys(int64_t first) {
    const int64_t last_query = queries_.count() - 1;
    const int64_t oldest = queries_.first_visible(0), newest = queries_.position(last_query);
    const int64_t begin = oldest > first ? oldest - first : 0;
    const int64_t end = newest + 1 - first < kKeys ? newest + 1 - first : kKeys;
    const bool all_see_all = queries_.position(0) + 1 - first >= kKeys && queries_.first_visible(last_query) <= first;
    find_blocks(first);
    score(begin, end);
    for (int64_t g = 0; g < num_groups_; ++g) {
      all_see_all ? weigh<false>(g, first, begin, end) : weigh<true>(g, first, begin, end);
    }
    pack_values(begin, end);
    add_values();
  }

  // Where each 16 keys of the tile begin, as far as there is a block for them.
  void find_blocks(int64_t first) {
    const AttentionState& state = args_.state;
    const int32_t* blocks = state.block_table + state.row[queries_.token(0)] * state.max_blocks;
    for (int64_t t = 0; t < kKeys / kTile; ++t) {
      const int64_t position = first + t * kTile;
      if (position > queries_.position(queries_.count() - 1)) break;
      offset_[t] = ((blocks[position / state.block_size] * state.num_kv_heads + kv_head_) * state.block_size +
                    position % state.block_size) *
                   d_;
    }
  }

  // Scores of keys [begin, end) and others of their 16, which are not to be looked at.
  void score(int64_t begin, int64_t end) {
    const auto* keys = static_cast<const BFloat16*>(args_.state.k_cache);
    const int64_t num_steps = d_ / kStep;
    for (int64_t t = begin / kTile; t < ceil_div(end, kTile); ++t) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t step = 0; step < num_steps; ++step) {
        _tile_loadd(4, keys + offset_[t] + step * kStep, d_ * sizeof(BFloat16));
        _tile_loadd(6, tile(layout_.queries + step), 64);
        _tile_dpbf16ps(0, 4, 6);
        if (num_groups_ == 1) continue;
        _tile_loadd(7, tile(layout_.queries + num_steps + step), 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, tile(layout_.scores + t), 64);
      if (num_groups_ > 1) _tile_stored(1, tile(layout_.scores + kKeys / kTile + t), 64);
    }
  }

  // Turns the scores of a group into weights relative to each query's greatest score so far.
  template <bool Hide>
  void weigh(int64_t g, int64_t first, int64_t begin, int64_t end) {
    Group& group = groups_[g];
    float* scores = tile(layout_.scores + g * kKeys / kTile);
    const auto sees = [&](int64_t j) {
      const __m512i position = _mm512_set1_epi32(static_cast<int32_t>(first + j));
      return static_cast<__mmask16>(_mm512_cmple_epi32_mask(position, group.position) &
                                    _mm512_cmpge_epi32_mask(position, group.first_visible));
    };
    __m512 greatest = group.greatest;
    for (int64_t j = begin; j < end; ++j) {
      VecAvx512 s = VecAvx512::load(scores + j * kTile) * VecAvx512::splat(args_.scale);
      if (args_.softcap > 0.0f) s = soft_cap(s, args_.softcap);
      s.store(scores + j * kTile);
      greatest = _mm512_mask_max_ps(greatest, Hide ? sees(j) : 0xffff, greatest, s.v);
    }
    const __m512 factor = exp(VecAvx512{_mm512_sub_ps(group.greatest, greatest)}).v;
    if (_mm512_cmp_ps_mask(greatest, group.greatest, _CMP_NEQ_UQ)) {
      rescale(g, factor);
      group.total = _mm512_mul_ps(group.total, factor);
      group.greatest = greatest;
    }
    const auto weight = [&](int64_t j) {
      if (j < begin || j >= end) return _mm512_setzero_ps();
      const __m512 w = exp(VecAvx512{_mm512_sub_ps(_mm512_loadu_ps(scores + j * kTile), greatest)}).v;
      const __m512 seen = Hide ? _mm512_maskz_mov_ps(sees(j), w) : w;
      group.total = _mm512_add_ps(group.total, seen);
      return seen;
    };
    for (int64_t step = 0; step < kSteps; ++step) {
      __m512i pairs[kTile];
      for (int64_t pair = 0; pair < kTile; ++pair) {
        const __m512 even = weight(step * kStep + 2 * pair);
        pairs[pair] = pair_up(even, weight(step * kStep + 2 * pair + 1));
      }
      transpose(pairs);
      float* weights = tile(layout_.weights + g * kSteps + step);
      for (int64_t lane = 0; lane < kTile; ++lane) _mm512_storeu_si512(weights + lane * kTile, pairs[lane]);
    }
  }

  void rescale(int64_t g, __m512 factor) {
    alignas(64) float factors[kTile];
    _mm512_store_ps(factors, factor);
    float* sums = tile(layout_.sums + g * d_ / kTile);
    for (int64_t c = 0; c < d_ / kTile; ++c)
      for (int64_t lane = 0; lane < groups_[g].count; ++lane) {
        float* sum = sums + c * kTileSize + lane * kTile;
        _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(factors[lane])));
      }
  }

  // Values [begin, end) of the tile, zero beside them.
  void pack_values(int64_t begin, int64_t end) {
    const auto* values = static_cast<const BFloat16*>(args_.state.v_cache);
    const __m512i even =
        _mm512_set_epi32(0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009, 0x280008, 0x270007,
                         0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
    const __m512i upper = _mm512_add_epi16(even, _mm512_set1_epi16(16));
    for (int64_t j = 0; j < kKeys; j += 2) {
      const BFloat16* row = values + offset_[j / kTile] + j % kTile * d_;
      float* packed = tile(layout_.values + j / kStep * d_ / kTile) + j % kStep / 2 * kTile;
      for (int64_t c = 0; c < d_; c += kStep) {
        const auto load = [&](int64_t i) {
          const bool is_seen = begin <= j + i && j + i < end;
          return is_seen ? _mm512_loadu_si512(row + i * d_ + c) : _mm512_setzero_si512();
        };
        const __m512i a = load(0), b = load(1);
        _mm512_storeu_si512(packed + c / kTile * kTileSize, _mm512_permutex2var_epi16(a, even, b));
        _mm512_storeu_si512(packed + (c / kTile + 1) * kTileSize, _mm512_permutex2var_epi16(a, upper, b));
      }
    }
  }

  void add_values() {
    const int64_t num_columns = d_ / kTile;
    _tile_loadd(4, tile(layout_.weights), 64);
    _tile_loadd(5, tile(layout_.weights + 1), 64);
    if (num_groups_ > 1) {
      _tile_loadd(2, tile(layout_.weights + kSteps), 64);
      _tile_loadd(3, tile(layout_.weights + kSteps + 1), 64);
    }
    for (int64_t c = 0; c < num_columns; ++c) {
      float *sums = tile(layout_.sums + c), *more_sums = tile(layout_.sums + num_columns + c);
      _tile_loadd(0, sums, 64);
      _tile_loadd(6, tile(layout_.values + c), 64);
      _tile_loadd(7, tile(layout_.values + num_columns + c), 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(0, 5, 7);
      _tile_stored(0, sums, 64);
      if (num_groups_ == 1) continue;
      _tile_loadd(1, more_sums, 64);
      _tile_dpbf16ps(1, 2, 6);
      _tile_dpbf16ps(1, 3, 7);
      _tile_stored(1, more_sums, 64);
    }
  }

  void store(int64_t i) {
    const int64_t g = i / kTile, lane = i % kTile;
    alignas(64) float totals[kTile];
    _mm512_store_ps(totals, groups_[g].total);
    const float* sums = tile(layout_.sums + g * d_ / kTile) + lane * kTile;
    BFloat16* out = queries_.out_row<BFloat16>(i);
    for (int64_t c = 0; c < d_; ++c) narrow(sums[c / kTile * kTileSize + c % kTile] / totals[lane], out + c);
  }

  const AttendArgs& args_;
  const Queries queries_;
  const int64_t kv_head_, d_, num_groups_;
  const Layout layout_;
  float* const scratch_;
  Group groups_[kMaxGroups];
  int64_t offset_[kKeys / kTile] = {};
  const Tiles tiles_{kTile};
};

int64_t scratch_size(int64_t, int64_t d_head) { return Layout(d_head).end * kTileSize; }

void attend_tile_with_amx(const AttendArgs& args, const AttendTile& tile, int64_t kv_head, float* scratch) {
  AmxTileAttention(args, tile, kv_head, scratch).run();
}

}  // namespace

extern const AttendKernel attend_kernel_amx{kMaxGroups * kTile, scratch_size, attend_tile_with_amx};

}  // namespace steerserve
