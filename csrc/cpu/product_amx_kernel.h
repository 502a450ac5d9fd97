// Products with AMX: the kernel for bfloat16 rows and weights.
//
// One instruction multiplies 16 features (rows of tile A) by 16 rows of the batch (columns of tile B) over 32 elements
// of d and adds to 16 x 16 float sums, in an order of its own that depends on nothing else. Tile A is read from the
// weights as they lie. Tile B wants pairs of elements side by side, so rows are packed once:
// packed[group][step][pair][row], 1 KiB for 16 rows and 32 elements, zero where d or the batch ends. Two by two tiles
// at a time make the loads half of the arithmetic. A batch of one row is a tile B of one column, which is the row
// itself.
//
// Elements that AMX treats otherwise than multiply-adds do: denormals count as zero.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/product_kernel.h"

namespace steerserve {
namespace {

constexpr int64_t kTile = 16;  // features, or rows, of a tile
constexpr int64_t kStep = 32;  // elements of d of a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kGranule = 2 * kTile;

inline int64_t num_steps(int64_t d) { return ceil_div(d, kStep); }

// Columns of tile B.
inline int64_t num_columns(int64_t num_rows) { return num_rows == 1 ? 1 : kTile; }

// Bytes of a packed group of rows.
inline int64_t group_size(int64_t num_rows, int64_t d) {
  return num_steps(d) * kStep * num_columns(num_rows) * sizeof(BFloat16);
}

inline int64_t interleaved_size(int64_t num_rows, int64_t d) {
  return ceil_div(num_rows, kTile) * group_size(num_rows, d);
}

// Tiles 4 and 5 are features, 6 and 7 rows, 0 to 3 sums.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  explicit constexpr TileConfig(int columns) {
    for (int tile = 0; tile < 8; ++tile) row_bytes[tile] = tile == 4 || tile == 5 ? 64 : 4 * columns;
  }
};

// Not locals: the compiler believes that only the first bytes are read.
constexpr TileConfig kOneColumn(1), kAllColumns(kTile);

// Tile registers of this thread, while this lives.
class Tiles {
 public:
  explicit Tiles(int64_t num_rows) { _tile_loadconfig(num_rows == 1 ? &kOneColumn : &kAllColumns); }
  ~Tiles() { _tile_release(); }
};

// Each round swaps the off-diagonal halves of blocks of 2·half.
inline void transpose(__m512i (&row)[kTile]) {
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
}

// 16 x 16 floats, transposed to rows `stride` apart.
inline void store_transposed(const float* from, float* to, int64_t stride) {
  __m512i row[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) row[i] = _mm512_loadu_si512(from + i * kTile);
  transpose(row);
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) _mm512_storeu_si512(to + i * stride, row[i]);
}

// Packs a group of `num_rows` <= 16 rows of a batch of more than one.
inline void interleave(const BFloat16* const* x, int64_t num_rows, int64_t d, char* group) {
  for (int64_t step = 0; step < num_steps(d); ++step) {
    const int64_t rest = d - step * kStep;
    const __mmask32 inside = rest < kStep ? (1u << rest) - 1 : ~0u;
    __m512i row[kTile];
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i)
      row[i] = i < num_rows ? _mm512_maskz_loadu_epi16(inside, x[i] + step * kStep) : _mm512_setzero_si512();
    transpose(row);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) _mm512_storeu_si512(group + step * kTileBytes + i * 64, row[i]);
  }
}

// Packs rows [begin, end), which are whole groups or end with the batch; row_at(i) tells where row i is.
template <class RowAt>
void interleave_rows(int64_t num_rows, int64_t d, int64_t begin, int64_t end, void* packed, RowAt row_at) {
  auto* groups = static_cast<char*>(packed);
  if (num_rows == 1) {
    __builtin_memcpy(groups, row_at(0), d * sizeof(BFloat16));
    __builtin_memset(groups + d * sizeof(BFloat16), 0, (num_steps(d) * kStep - d) * sizeof(BFloat16));
    return;
  }
  for (int64_t first = begin; first < end; first += kTile) {
    const BFloat16* x[kTile];
    const int64_t count = end - first < kTile ? end - first : kTile;
    for (int64_t i = 0; i < count; ++i) x[i] = row_at(first + i);
    interleave(x, count, d, groups + first / kTile * group_size(num_rows, d));
  }
}

// The elements past the last whole step of 32 features, each padded with zeros to a step.
inline void copy_tails(const BFloat16* weights, int64_t d, BFloat16* tails) {
  const int64_t whole = d / kStep * kStep;
  const __mmask32 rest = (1u << (d - whole)) - 1;
  for (int64_t j = 0; j < kGranule; ++j)
    _mm512_storeu_si512(tails + j * kStep, _mm512_maskz_loadu_epi16(rest, weights + j * d + whole));
}

// What 32 features are multiplied with.
enum class Rows { kOne, kOneGroup, kTwoGroups };

// Weights pass the first-level cache by, where rows stay.
template <Rows R>
void multiply_step(const void* w, int64_t w_stride, const char* x, int64_t x_group) {
  constexpr int64_t kColumnBytes = R == Rows::kOne ? 4 : 64;
  const char* features = static_cast<const char*>(w);
  _tile_stream_loadd(4, features, w_stride);
  _tile_stream_loadd(5, features + kTile * w_stride, w_stride);
  _tile_loadd(6, x, kColumnBytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 5, 6);
  if constexpr (R == Rows::kTwoGroups) {
    _tile_loadd(7, x + x_group, kColumnBytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Products of 32 features, in rows `stride` apart. `tail` holds the features' ends, if any.
template <Rows R>
void multiply_tiles(const BFloat16* w, const BFloat16* tail, int64_t d, const char* x, float* product, int64_t stride) {
  constexpr int64_t kStepBytes = R == Rows::kOne ? kTileBytes / kTile : kTileBytes;
  const int64_t x_group = num_steps(d) * kStepBytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t step = 0;
  for (; step < d / kStep; ++step)
    multiply_step<R>(w + step * kStep, d * sizeof(BFloat16), x + step * kStepBytes, x_group);
  if (step < num_steps(d)) multiply_step<R>(tail, kStep * sizeof(BFloat16), x + step * kStepBytes, x_group);
  if constexpr (R == Rows::kOne) {
    _tile_stored(0, product, sizeof(float));
    _tile_stored(1, product + kTile, sizeof(float));
    return;
  }
  alignas(64) float sums[4][kTile * kTile];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  if constexpr (R == Rows::kTwoGroups) {
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
  }
  for (int i = 0; i < (R == Rows::kTwoGroups ? 4 : 2); ++i)
    store_transposed(sums[i], product + i / 2 * kTile * stride + i % 2 * kTile, stride);
}

// finish(Block) for every panel of features [begin, end), at least a granule, and group of rows; `tile` has room for
// one.
template <class Finish>
void multiply_with_amx(const Product& product, int64_t begin, int64_t end, float* tile, Finish finish) {
  const auto* weights = static_cast<const BFloat16*>(product.weights);
  const int64_t d = product.d;
  alignas(64) BFloat16 tails[kGranule * kStep];
  const Tiles tiles(product.num_rows);
  for (int64_t first = begin, panel = 0; first < end; first += product.panel_size, ++panel) {
    const int64_t last = first + product.panel_size < end ? first + product.panel_size : end;
    // Always 32 features at once: the last of all go together with some before them, and are read twice.
    const int64_t base = first < last - kGranule ? first : last - kGranule;
    for (int64_t row = 0; row < product.num_rows; row += kGranule) {
      const char* x = static_cast<const char*>(product.packed) + row / kTile * group_size(product.num_rows, d);
      const auto multiply = product.num_rows == 1             ? multiply_tiles<Rows::kOne>
                            : product.num_rows - row <= kTile ? multiply_tiles<Rows::kOneGroup>
                                                              : multiply_tiles<Rows::kTwoGroups>;
      for (int64_t j = base; j < last; j += kGranule) {
        const int64_t at = j + kGranule <= last ? j : last - kGranule;
        if (d % kStep) copy_tails(weights + at * d, d, tails);
        multiply(weights + at * d, tails, d, x, tile + (at - base), product.panel_size);
      }
      const int64_t row_end = row + kGranule < product.num_rows ? row + kGranule : product.num_rows;
      finish(Block{tile + (first - base), panel, first, last - first, row, row_end});
    }
  }
}

}  // namespace
}  // namespace steerserve
