// linear over a vector type of vec.h: what is done before and after the products of product_kernel.h.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/linear.h"
#include "cpu/product_kernel.h"

namespace steerserve {
namespace {

// Rounds a finished tile, with the bias added, into `out`.
template <class T>
void store_block_of(const LinearArgs& args, const Block& block, int64_t tile_stride) {
  for (int64_t row = block.row_begin; row < block.row_end; ++row) {
    float* sums = block.tile + (row - block.row_begin) * tile_stride;
    if (args.bias) {
      const T* bias = static_cast<const T*>(args.bias) + block.first;
      for (int64_t j = 0; j < block.count; ++j) sums[j] += widen(bias[j]);
    }
    T* out = static_cast<T*>(args.out) + row * args.d_out + block.first;
    for (int64_t j = 0; j < block.count; ++j) narrow(sums[j], out + j);
  }
}

inline void store_block(const LinearArgs& args, const Block& block, int64_t tile_stride) {
  with_types(args.type, args.type, [&](auto t, auto) { store_block_of<decltype(t)>(args, block, tile_stride); });
}

template <class V>
void pack_linear(const LinearArgs& args, int64_t begin, int64_t end, void* packed) {
  for (int64_t i = begin; i < end; ++i)
    pack_into(static_cast<typename V::Packed*>(packed) + i * packed_stride(args.d_in), args.x, args.type,
              i * args.x_row_stride, args.d_in);
}

template <class V>
void multiply_linear(const LinearArgs& args, const Product& product, int64_t begin, int64_t end, float* tile) {
  multiply<V>(product, begin, end, tile, [&](const Block& block) { store_block(args, block, product.panel_size); });
}

template <class V>
constexpr LinearKernel linear_kernel{{kFeatures, kRows<V>, packed_size<V>}, pack_linear<V>, multiply_linear<V>};

}  // namespace
}  // namespace steerserve
