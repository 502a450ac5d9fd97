#include "cpu/linear_kernel.h"
#include "cpu/product_amx_kernel.h"

namespace steerserve {
namespace {

void pack_linear_for_amx(const LinearArgs& args, int64_t begin, int64_t end, void* packed) {
  interleave_rows(args.num_rows, args.d_in, begin, end, packed,
                  [&](int64_t i) { return static_cast<const BFloat16*>(args.x) + i * args.x_row_stride; });
}

void multiply_linear_with_amx(const LinearArgs& args, const Product& product, int64_t begin, int64_t end, float* tile) {
  multiply_with_amx(product, begin, end, tile,
                    [&](const Block& block) { store_block(args, block, product.panel_size); });
}

}  // namespace

extern const LinearKernel linear_kernel_amx{
    {kGranule, kGranule, interleaved_size}, pack_linear_for_amx, multiply_linear_with_amx};

}  // namespace steerserve
