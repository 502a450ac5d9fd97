#include "cpu/sae_splice.h"

#include <algorithm>
#include <limits>

#include "cpu/check.h"
#include "cpu/edit.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace steerserve {
namespace {

void check(const SaeSpliceArgs& args) {
  for (int64_t i = 0; i < args.num_rows; ++i) {
    check_index("rows", i, args.rows[i], args.num_x_rows);
    if (i && args.rows[i] <= args.rows[i - 1])
      reject("rows", i, std::to_string(args.rows[i]), "more than " + std::to_string(args.rows[i - 1]));
  }
  check_offsets("ptr", args.ptr, args.num_rows, args.nnz);
  for (int64_t entry = 0; entry < args.ptr[args.num_rows]; ++entry) {
    check_index("feature", entry, args.feature[entry], args.d_sae);
    check_edit(args.op, args.value, entry);
  }
}

void encode(const SaeSpliceArgs& args, RowStats* stats, int num_threads) {
  const SaeEncodeArgs encode_args{args.x,        args.x_type, args.x_row_stride, args.num_rows,  args.d,
                                  args.W_enc,    args.w_type, args.b_enc,        args.threshold, args.d_sae,
                                  args.max_norm, args.k,      args.indices,      args.values,    args.capacity,
                                  args.count,    nullptr};
  encode_rows(encode_args, args.rows, args.normalization, stats, num_threads);
}

// The value of a feature in a row's sorted list of active ones.
float look_up(const SaeSpliceArgs& args, int64_t i, int32_t feature) {
  const int32_t* begin = args.indices + i * args.capacity;
  const int32_t* end = begin + args.count[i];
  const int32_t* found = std::lower_bound(begin, end, feature);
  return found != end && *found == feature ? args.values[found - args.indices] : 0.0f;
}

// Activations and edits of the i-th row; `features` and `edits` have room for all of them.
SpliceRow edit_row(const SaeSpliceArgs& args, const RowStats& stats, int64_t i, int32_t* features, float* edits) {
  args.x_norm[i] = stats.norm;
  SpliceRow row{stats, args.count[i] >= 0 && args.count[i] <= args.capacity, features, edits, 0};
  for (int64_t entry = args.ptr[i]; entry < args.ptr[i + 1]; ++entry) {
    const float f = row.is_known ? look_up(args, i, args.feature[entry]) : std::numeric_limits<float>::quiet_NaN();
    const float edit = edit_of(args.op[entry], f, args.value[entry]);
    args.activation[entry] = f;
    args.edit[entry] = edit;
    if (edit == 0.0f) continue;
    features[row.num_edits] = args.feature[entry];
    edits[row.num_edits++] = edit;
  }
  return row;
}

bool is_rewritten(const SaeSpliceArgs& args, const SpliceRow& row) {
  return row.is_known && (row.num_edits || row.stats.norm <= args.max_norm);
}

void decode(const SaeSpliceArgs& args, const SpliceRow* rows, int num_threads) {
  int64_t num_terms = 0;
  for (int64_t i = 0; i < args.num_rows; ++i)
    if (rows[i].is_known) num_terms += args.count[i] + rows[i].num_edits;
  const int team = team_size(num_terms * args.d, num_threads);
  const ColumnBlocks blocks(args.num_rows, args.d, team);
  const auto splice_columns = kernels().splice_columns;
  const ScratchRows sums(team, blocks.width());
  blocks.for_each_block(team, [&](int64_t i, int64_t begin, int64_t end, int thread) {
    if (is_rewritten(args, rows[i])) splice_columns(args, rows[i], i, begin, end, sums.row(thread));
  });
}

}  // namespace

void launch(const SaeSpliceArgs& args, int num_threads) {
  check(args);
  Scratch& scratch = Scratch::of_this_thread();
  const Scratch::Frame frame(scratch);
  const int64_t num_entries = args.ptr[args.num_rows];
  RowStats* stats = scratch.take<RowStats>(args.num_rows);
  SpliceRow* rows = scratch.take<SpliceRow>(args.num_rows);
  int32_t* features = scratch.take<int32_t>(num_entries);
  float* edits = scratch.take<float>(num_entries);
  encode(args, stats, num_threads);
  for (int64_t i = 0; i < args.num_rows; ++i)
    rows[i] = edit_row(args, stats[i], i, features + args.ptr[i], edits + args.ptr[i]);
  decode(args, rows, num_threads);
}

}  // namespace steerserve
