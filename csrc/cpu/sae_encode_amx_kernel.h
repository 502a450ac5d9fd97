// sae_encode with AMX: what is done before and after the products of product_amx_kernel.h.
// See vec.h for why nothing here may have external linkage.
#pragma once

#include "cpu/product_amx_kernel.h"
#include "cpu/sae_encode_kernel.h"

namespace steerserve {
namespace {

inline void pack_for_amx(const SaeEncodeArgs& args, const int32_t* rows, Normalization normalization, int64_t begin,
                         int64_t end, void* packed, RowStats* stats, float* wide) {
  const auto row_at = [&](int64_t i) {
    return static_cast<const BFloat16*>(args.x) + (rows ? rows[i] : i) * args.x_row_stride;
  };
  interleave_rows(args.num_rows, args.d, begin, end, packed, row_at);
  for (int64_t i = begin; i < end; ++i) {
    pack_into(wide, row_at(i), DType::bfloat16, 0, args.d);
    stats[i] = row_stats<VecAvx512>(wide, args.d, normalization);
  }
}

inline void encode_features_with_amx(const EncodeBatch& batch, int64_t begin, int64_t end, float* tile, Runs& runs) {
  multiply_with_amx(batch.product, begin, end, tile,
                    [&](const Block& block) { find_active<VecAvx512>(batch, block, runs); });
}

}  // namespace
}  // namespace steerserve
