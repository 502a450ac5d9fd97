// sae_encode with AMX: the kernel for bfloat16 rows and weights.
//
// One instruction multiplies 16 features (rows of tile A) by 16 rows of the batch (columns of tile B) over 32 elements
// of d and adds to 16 x 16 float sums, in an order of its own that depends on nothing else. Tile A is read from W_enc
// as it lies. Tile B wants pairs of elements side by side, so rows are packed once: packed[group][step][pair][row],
// 1 KiB for 16 rows and 32 elements, zero where d or the batch ends. Two by two tiles at a time make the loads half
// of the arithmetic.
//
// Elements that AMX treats otherwise than multiply-adds do: denormals count as zero.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/sae_encode_kernel.h"

namespace steerserve {
namespace {

constexpr int64_t kTile = 16;  // features, or rows, of a tile
constexpr int64_t kStep = 32;  // elements of d of a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kGranule = 2 * kTile;

inline int64_t num_steps(int64_t d) { return ceil_div(d, kStep); }

inline int64_t interleaved_size(int64_t num_rows, int64_t d) {
  return ceil_div(num_rows, kGranule) * 2 * num_steps(d) * kTileBytes;
}

// Tile registers of this thread, all 16 x 64 bytes, while this lives.
class Tiles {
 public:
  Tiles() {
    alignas(64) uint8_t config[64] = {1};  // the palette; then from byte 16 bytes a row, from 48 rows
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// Row `lane` of a packed group, as if it were zero beyond d.
inline void interleave_row(const BFloat16* x, int64_t d, int64_t lane, char* group) {
  for (int64_t c = 0; c < num_steps(d) * kStep; c += 2) {
    BFloat16 pair[2] = {};
    if (c < d) pair[0] = x[c];
    if (c + 1 < d) pair[1] = x[c + 1];
    __builtin_memcpy(group + (c / 2 * kTile + lane) * sizeof(pair), pair, sizeof(pair));
  }
}

inline void interleave_rows(const SaeEncodeArgs& args, const int32_t* rows, Normalization normalization, int64_t begin,
                            int64_t end, void* packed, RowStats* stats, float* wide) {
  const int64_t group_bytes = num_steps(args.d) * kTileBytes;
  char* groups = static_cast<char*>(packed) + begin / kTile * group_bytes;
  __builtin_memset(groups, 0, 2 * group_bytes);
  for (int64_t i = begin; i < end; ++i) {
    const auto* x = static_cast<const BFloat16*>(args.x) + (rows ? rows[i] : i) * args.x_row_stride;
    interleave_row(x, args.d, (i - begin) % kTile, groups + (i - begin) / kTile * group_bytes);
    for (int64_t c = 0; c < args.d; ++c) wide[c] = widen(x[c]);
    stats[i] = row_stats<VecAvx512>(wide, args.d, normalization);
  }
}

// The elements past the last whole step of 32 features, each padded with zeros to a step.
inline void copy_tails(const BFloat16* weights, int64_t d, BFloat16* tails) {
  const int64_t whole = d / kStep * kStep;
  const __mmask32 rest = (1u << (d - whole)) - 1;
  for (int64_t j = 0; j < kGranule; ++j)
    _mm512_storeu_si512(tails + j * kStep, _mm512_maskz_loadu_epi16(rest, weights + j * d + whole));
}

// Transposes 16 x 16 floats to rows `stride` apart. Each round swaps the off-diagonal halves of blocks of 2·half.
inline void transpose_tile(const float* from, float* to, int64_t stride) {
  __m512i row[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) row[i] = _mm512_loadu_si512(from + i * kTile);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
  for (int half = 1; half < kTile; half *= 2) {
    const __m512i bit = _mm512_set1_epi32(half);
    const __mmask16 upper = _mm512_test_epi32_mask(lane, bit);
    // Lanes of the first operand are numbered from 0, of the second from 16.
    const __m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - half));
    const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, bit), upper, lane, _mm512_set1_epi32(16));
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      if (i & half) continue;
      const __m512i a = row[i], b = row[i + half];
      row[i] = _mm512_permutex2var_epi32(a, low, b);
      row[i + half] = _mm512_permutex2var_epi32(a, high, b);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) _mm512_storeu_si512(to + i * stride, row[i]);
}

template <bool TwoGroups>
void multiply_step(const void* w, int64_t w_stride, const char* x, int64_t group_bytes) {
  const char* features = static_cast<const char*>(w);
  _tile_loadd(4, features, w_stride);
  _tile_loadd(5, features + kTile * w_stride, w_stride);
  _tile_loadd(6, x, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 5, 6);
  if constexpr (TwoGroups) {
    _tile_loadd(7, x + group_bytes, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Products of 32 features with one or two groups of 16 rows. `tail` holds the features' ends, if any.
template <bool TwoGroups>
void multiply_tiles(const BFloat16* w, const BFloat16* tail, int64_t d, const char* x, float* product, int64_t stride) {
  const int64_t group_bytes = num_steps(d) * kTileBytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t step = 0;
  for (; step < d / kStep; ++step)
    multiply_step<TwoGroups>(w + step * kStep, d * sizeof(BFloat16), x + step * kTileBytes, group_bytes);
  if (step < num_steps(d)) multiply_step<TwoGroups>(tail, kStep * sizeof(BFloat16), x + step * kTileBytes, group_bytes);
  alignas(64) float sums[4][kTile * kTile];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  if constexpr (TwoGroups) {
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
  }
  for (int i = 0; i < (TwoGroups ? 4 : 2); ++i)
    transpose_tile(sums[i], product + i / 2 * kTile * stride + i % 2 * kTile, stride);
}

inline void encode_features(const EncodeBatch& batch, int64_t begin, int64_t end, float* tile, Runs& runs) {
  const SaeEncodeArgs& args = batch.args;
  const auto* weights = static_cast<const BFloat16*>(args.W_enc);
  const int64_t d = args.d, group_bytes = num_steps(d) * kTileBytes;
  alignas(64) BFloat16 tails[kGranule * kStep];
  const Tiles tiles;
  for (int64_t first = begin, panel = 0; first < end; first += batch.panel_size, ++panel) {
    const int64_t last = first + batch.panel_size < end ? first + batch.panel_size : end;
    // Always 32 features at once: the last of all go together with some before them, and are read twice.
    const int64_t base = first < last - kGranule ? first : last - kGranule;
    for (int64_t row = 0; row < args.num_rows; row += kGranule) {
      const char* x = static_cast<const char*>(batch.packed) + row / kTile * group_bytes;
      const auto multiply = args.num_rows - row > kTile ? multiply_tiles<true> : multiply_tiles<false>;
      for (int64_t j = base; j < last; j += kGranule) {
        const int64_t at = j + kGranule <= last ? j : last - kGranule;
        if (d % kStep) copy_tails(weights + at * d, d, tails);
        multiply(weights + at * d, tails, d, x, tile + (at - base), batch.panel_size);
      }
      const int64_t row_end = row + kGranule < args.num_rows ? row + kGranule : args.num_rows;
      find_active<VecAvx512>(batch, tile + (first - base), panel, first, last - first, row, row_end, runs);
    }
  }
}

}  // namespace
}  // namespace steerserve
