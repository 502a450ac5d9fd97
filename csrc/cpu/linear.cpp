#include "cpu/linear.h"

#include <algorithm>
#include <cstddef>

#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace steerserve {
namespace {

const LinearKernel& select_kernel(const LinearArgs& args) {
#if defined(__x86_64__)
  if (args.type == DType::bfloat16) {
    if (simd_level() == SimdLevel::amx && args.d_out >= linear_kernel_amx.packing.granule) return linear_kernel_amx;
    if (simd_level() == SimdLevel::avx512_bf16) return linear_kernel_avx512_bf16;
  }
#endif
  return kernels().linear;
}

// Reading an element of the weight costs about as much as multiplying it with this many rows.
constexpr int64_t kRowsPerRead = 4;

}  // namespace

void launch(const LinearArgs& args, int num_threads) {
  if (args.num_rows == 0 || args.d_out == 0) return;
  const LinearKernel& kernel = select_kernel(args);
  const Packing& packing = kernel.packing;
  const int team = team_size(std::max(args.num_rows, kRowsPerRead) * args.d_out * args.d_in, num_threads);
  // One group of rows is packed by every thread for itself: that takes less than to hand it from core to core.
  const bool is_shared = args.num_rows > packing.row_group;
  const int64_t packed_size = packing.size(args.num_rows, args.d_in);
  Scratch& scratch = Scratch::of_this_thread();
  const Scratch::Frame frame(scratch);
  auto* packed = scratch.take<std::byte>(packed_size * (is_shared ? 1 : team));
  const int64_t panel = panel_size(packing, args.num_rows, args.d_in, args.type);
  const ScratchRows tiles(team, packing.row_group * panel);
  run_team(team, [&](int thread, int size) {
    std::byte* mine = packed + (is_shared ? 0 : thread * packed_size);
    const int64_t step = packing.row_group * (is_shared ? size : 1);
    for (int64_t begin = is_shared ? thread * packing.row_group : 0; begin < args.num_rows; begin += step)
      kernel.pack(args, begin, std::min(begin + packing.row_group, args.num_rows), mine);
    if (is_shared) wait_for_team(size);
    const Product product{mine, args.num_rows, args.d_in, args.weight, args.type, panel};
    const int64_t begin = first_feature(packing, args.d_out, thread, size);
    const int64_t end = first_feature(packing, args.d_out, thread + 1, size);
    if (begin < end) kernel.multiply(args, product, begin, end, tiles.row(thread));
  });
}

}  // namespace steerserve
