#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace steerserve {
namespace {

// All of `count` indices lie in [0, size). Without a branch a number: lists are long.
bool are_valid(const int32_t* indices, int64_t count, int64_t size) {
  const uint32_t last = static_cast<uint32_t>(size - 1);
  uint32_t signs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t index = static_cast<uint32_t>(indices[i]);
    signs |= index | (last - index);
  }
  return size > 0 ? signs >> 31 == 0 : count == 0;
}

// Entries to add, over all rows that are known.
int64_t check_entries(const SaeDecodeArgs& args) {
  int64_t num_entries = 0;
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const int64_t count = args.count[row], first = row * args.capacity;
    if (count < 0 || count > args.capacity) continue;
    num_entries += count;
    if (are_valid(args.indices + first, count, args.d_sae)) continue;
    for (int64_t i = first; i < first + count; ++i) check_index("indices", i, args.indices[i], args.d_sae);
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
