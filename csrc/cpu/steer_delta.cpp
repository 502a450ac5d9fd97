#include <algorithm>

#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace steerserve {
namespace {

void check_score_index(const SteerDeltaArgs& args, int64_t row, int64_t entry) {
  const int32_t index = args.score_index[entry], begin = args.score_ptr[row], end = args.score_ptr[row + 1];
  if (index != -1 && (index < begin || index >= end))
    reject("score_index", entry, std::to_string(index),
           "-1 or a score of row " + std::to_string(row) + ", from " + std::to_string(begin) + " below " +
               std::to_string(end));
}

void check_entries(const SteerDeltaArgs& args) {
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const int64_t begin = args.ptr[row * args.num_stages], end = args.ptr[(row + 1) * args.num_stages];
    for (int64_t entry = begin; entry < end; ++entry) {
      const int32_t slot = args.slot[entry];
      check_index("slot", entry, slot, args.num_slots);
      check_edit(args.op, args.value, entry);
      check_score_index(args, row, entry);
      if (args.normalization[slot] >= kNumNormalizations)
        reject("normalization", slot, std::to_string(args.normalization[slot]),
               "a code below " + std::to_string(kNumNormalizations));
    }
  }
}

}  // namespace

void launch(const SteerDeltaArgs& args, int num_threads) {
  const int64_t num_segments = args.num_rows * args.num_stages;
  check_offsets("ptr", args.ptr, num_segments, args.nnz);
  check_offsets("score_ptr", args.score_ptr, args.num_rows, args.num_scores);
  check_entries(args);
  const int64_t num_entries = args.ptr[num_segments];
  if (num_entries == 0) return;
  const int team = static_cast<int>(std::min<int64_t>(team_size(num_entries * args.d, num_threads), args.num_rows));
  const auto steer_row = kernels().steer_row;
  const ScratchRows rows(team, args.x_type == DType::float32 ? 0 : args.d);
  for_each(args.num_rows, team, [&](int64_t row, int thread) { steer_row(args, row, rows.row(thread)); });
}

}  // namespace steerserve
