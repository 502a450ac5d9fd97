#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace steerserve {
namespace {

// Entries to add, over all rows that are known.
int64_t check_entries(const SaeDecodeArgs& args) {
  int64_t num_entries = 0;
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const int64_t count = args.count[row];
    if (count < 0 || count > args.capacity) continue;
    const int64_t first = row * args.capacity;
    for (int64_t i = first; i < first + count; ++i) check_index("indices", i, args.indices[i], args.d_sae);
    num_entries += count;
  }
  return num_entries;
}

}  // namespace

void launch(const SaeDecodeArgs& args, int num_threads) {
  const int64_t num_entries = check_entries(args);
  const int team = team_size(num_entries * args.d, num_threads);
  const ColumnBlocks blocks(args.num_rows, args.d, team);
  const auto decode_columns = kernels().decode_columns;
  const ScratchRows sums(team, args.out_type == DType::float32 ? 0 : blocks.width());
  blocks.for_each_block(team, [&](int64_t row, int64_t begin, int64_t end, int thread) {
    decode_columns(args, row, begin, end, sums.row(thread));
  });
}

}  // namespace steerserve
