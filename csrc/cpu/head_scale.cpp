#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"

namespace steerserve {

void launch(const HeadScaleArgs& args, int num_threads) {
  check_offsets("ptr", args.ptr, args.num_rows, args.nnz);
  const int64_t num_entries = args.ptr[args.num_rows];
  for (int64_t entry = 0; entry < num_entries; ++entry) {
    check_index("head", entry, args.head[entry], args.num_heads);
    if (!std::isfinite(args.scale[entry])) reject("scale", entry, std::to_string(args.scale[entry]), "a finite number");
  }
  const auto scale_heads = kernels().scale_heads;
  const int team = team_size(num_entries * args.d_head, num_threads);
  for_each(args.num_rows, team, [&](int64_t row, int) { scale_heads(args, row); });
}

}  // namespace steerserve
