// steer_delta on the emulator against its definition in ops.h, in float64.
#include <array>
#include <numeric>

#include "cuda/steer_delta.cuh"
#include "simt/definitions.h"
#include "simt/testing.h"

namespace steerserve {
namespace {

using namespace simt;

struct Layout {
  std::vector<int> lengths;  // of the segments, in entries
  int d = 64;
  DType x_type = DType::float32, w_type = DType::float32;
  int num_stages = 1, num_slots = 9;
  int x_padding = 0;  // elements between rows
  int w_offset = 0;   // elements by which the weights miss an alignment of 16 bytes
};

struct Case {
  Layout layout;
  int64_t num_rows = 0, stride = 0;
  Tensor x;
  DeviceArray<int32_t> ptr, slot;
  DeviceArray<uint8_t> op;
  DeviceArray<float> value;
  DeviceArray<int32_t> score_index;
  Tensor W_enc;
  DeviceArray<float> b_enc, threshold, max_norm;
  DeviceArray<uint8_t> normalization;
  Tensor W_dec;
  DeviceArray<int32_t> score_ptr;
  DeviceArray<float> score_threshold, score;
  DeviceArray<float> activation, edit, x_norm;

  SteerDeltaArgs args() const {
    SteerDeltaArgs args{};
    args.x = x.data(), args.x_type = x.type(), args.x_row_stride = stride;
    args.num_rows = num_rows, args.d = layout.d;
    args.ptr = ptr.begin(), args.num_stages = layout.num_stages;
    args.slot = slot.begin(), args.op = op.begin(), args.value = value.begin();
    args.score_index = score_index.begin(), args.nnz = slot.size();
    args.W_enc = W_enc.data(), args.b_enc = b_enc.begin(), args.threshold = threshold.begin();
    args.max_norm = max_norm.begin(), args.normalization = normalization.begin();
    args.W_dec = W_dec.data(), args.w_type = W_dec.type(), args.num_slots = layout.num_slots;
    args.score_ptr = score_ptr.begin(), args.score_threshold = score_threshold.begin();
    args.score = score.begin(), args.num_scores = score.size();
    args.activation = activation.begin(), args.edit = edit.begin(), args.x_norm = x_norm.begin();
    return args;
  }

  std::vector<Bytes> outputs() const { return {x, score, activation, edit, x_norm}; }
};

// Steps and limits keep every sum exact in float32, through two stages.
Case make_case(const Layout& layout, uint64_t seed = 1) {
  Random random(seed);
  const size_t num_segments = layout.lengths.size(), d = layout.d, num_slots = layout.num_slots;
  const size_t nnz = std::accumulate(layout.lengths.begin(), layout.lengths.end(), 0);
  Case made;
  made.layout = layout;
  made.num_rows = num_segments / layout.num_stages;
  made.stride = d + layout.x_padding;
  made.x = Tensor(layout.x_type, made.num_rows ? (made.num_rows - 1) * made.stride + d : 0);
  for (int64_t row = 0; row < made.num_rows; ++row)
    for (size_t i = 0; i < d; ++i) made.x.set(row * made.stride + i, random.dyadic(2, 4));
  made.ptr = DeviceArray<int32_t>(num_segments + 1);
  made.ptr[0] = 0;
  std::partial_sum(layout.lengths.begin(), layout.lengths.end(), made.ptr.begin() + 1);
  made.slot = DeviceArray<int32_t>::generate(nnz, [&](size_t) { return random.below(layout.num_slots); });
  made.op = DeviceArray<uint8_t>::generate(nnz, [&](size_t) { return random.below(kNumSteerOps); });
  made.value = DeviceArray<float>::generate(nnz, [&](size_t) { return random.dyadic(2, 1); });
  made.score_index = DeviceArray<int32_t>::generate(nnz, [](size_t) { return -1; });
  made.W_enc = Tensor(layout.w_type, num_slots * d, layout.w_offset);
  made.W_enc.fill(random, 1, 8);
  made.b_enc = DeviceArray<float>::generate(num_slots, [&](size_t) { return random.dyadic(1, 32); });
  made.threshold = DeviceArray<float>::generate(num_slots, [&](size_t) { return std::abs(random.dyadic(1, 32)); });
  made.max_norm = DeviceArray<float>::generate(num_slots, [](size_t i) { return i % 4 == 3 ? 1.0 : kInfinity; });
  made.normalization = DeviceArray<uint8_t>::generate(num_slots, [](size_t) { return kNone; });
  made.W_dec = Tensor(layout.w_type, num_slots * d, layout.w_offset);
  made.W_dec.fill(random, 1, 4);
  made.score_ptr = DeviceArray<int32_t>::generate(made.num_rows + 1, [](size_t) { return 0; });
  made.activation = DeviceArray<float>(nnz);
  made.edit = DeviceArray<float>(nnz);
  made.x_norm = DeviceArray<float>(num_segments);
  return made;
}

// ----- the definition -----

struct Expected {
  std::vector<double> x, score, activation, edit, x_norm;
};

class Definition {
 public:
  explicit Definition(const Case& before) : before_(before), d_(before.layout.d) {
    const size_t nnz = before_.slot.size();
    for (size_t i = 0; i < before_.x.size(); ++i) result.x.push_back(before_.x[i]);
    result.score.assign(before_.score.begin(), before_.score.end());
    result.activation = result.edit = std::vector<double>(nnz, kUnwritten);
    result.x_norm = std::vector<double>(before_.x_norm.size(), kUnwritten);
    for (int64_t row = 0; row < before_.num_rows; ++row)
      for (int stage = 0; stage < before_.layout.num_stages; ++stage)
        apply_stage(row, row * before_.layout.num_stages + stage);
  }

  Expected result;

 private:
  bool has_score(int64_t row, int index) const {
    const int begin = before_.score_ptr[row], end = before_.score_ptr[row + 1];
    return 0 <= begin && end <= static_cast<int64_t>(before_.score.size()) && begin <= index && index < end;
  }

  bool is_valid(int64_t row, int entry) const {
    const int slot = before_.slot[entry];
    return 0 <= slot && slot < before_.layout.num_slots && before_.op[entry] < kNumSteerOps &&
           std::isfinite(before_.value[entry]) &&
           (before_.score_index[entry] == -1 || has_score(row, before_.score_index[entry])) &&
           before_.normalization[slot] < kNumNormalizations;
  }

  double activation(const Row& row, int slot) const {
    const double pre = row.dot(before_.W_enc, slot) / row.scale(before_.normalization[slot]) + before_.b_enc[slot];
    if (!std::isfinite(pre)) return pre;
    if (std::isnan(before_.threshold[slot]) || std::isnan(before_.max_norm[slot])) return kNaN;
    return pre > before_.threshold[slot] && row.norm <= before_.max_norm[slot] ? pre : 0;
  }

  void apply_stage(int64_t n, int64_t segment) {
    const int begin = before_.ptr[segment], end = before_.ptr[segment + 1];
    if (begin < 0 || begin > end || end > static_cast<int64_t>(before_.slot.size())) {
      result.x_norm[segment] = kNaN;
      return;
    }
    if (begin == end) return;
    double* const x = &result.x[n * before_.stride];
    const Row row(std::vector<double>(x, x + d_));
    result.x_norm[segment] = row.norm;
    for (int j = begin; j < end; ++j) {
      result.activation[j] = is_valid(n, j) ? activation(row, before_.slot[j]) : kNaN;
      if (before_.op[j] == kMonitor && has_score(n, before_.score_index[j]))
        result.score[before_.score_index[j]] += before_.value[j] * result.activation[j];
    }
    bool changes = false;
    for (int j = begin; j < end; ++j) {
      const double f = result.activation[j], value = before_.value[j];
      const int gate = before_.score_index[j];
      const bool open = gate < 0 || !std::isfinite(f) || !(result.score[gate] <= before_.score_threshold[gate]);
      const double edit = open && std::isfinite(f) ? edited(before_.op[j], f, value) - f : 0;
      result.edit[j] = edit;
      if (edit == 0) continue;
      changes = true;
      const double scale = row.scale(before_.normalization[before_.slot[j]]);
      for (int i = 0; i < d_; ++i) x[i] += scale * edit * before_.W_dec[before_.slot[j] * d_ + i];
    }
    if (changes)
      for (int i = 0; i < d_; ++i) x[i] = rounded(before_.x.type(), x[i]);
  }

  const Case& before_;
  const int d_;
};

// `relative` to the size of the numbers: 0 demands the definition, rounded once.
void check_definition(const Case& before, const Case& after, double relative = 0) {
  const Expected expected = Definition(before).result;
  for (size_t i = 0; i < expected.x.size(); ++i)
    check_value("x", i, after.x[i], expected.x[i], relative * (1 + std::abs(expected.x[i])));
  for (size_t i = 0; i < expected.score.size(); ++i) check_value("score", i, after.score[i], expected.score[i]);
  for (size_t i = 0; i < expected.activation.size(); ++i) {
    const double tolerance = relative * (1 + std::abs(expected.activation[i]));
    check_output("activation", i, after.activation[i], expected.activation[i], tolerance);
    check_output("edit", i, after.edit[i], expected.edit[i], tolerance);
  }
  for (size_t i = 0; i < expected.x_norm.size(); ++i)
    check_output("x_norm", i, after.x_norm[i], expected.x_norm[i], 1e-6 * std::abs(expected.x_norm[i]));
}

Case run_and_check(const Case& before, double relative = 0) {
  Case after = run(before);
  check_definition(before, after, relative);
  return after;
}

// ----- tests -----

const std::vector<int> kRagged = {3, 0, 1, 40, 0, 2};

void test_shapes_and_types() {
  int seed = 0;
  for (const DType x_type : {DType::float32, DType::bfloat16, DType::float16})
    for (const DType w_type : {DType::float32, DType::bfloat16})
      for (const int d : kSizes) {
        begin_test(std::string("x ") + name(x_type) + ", weights " + name(w_type) + ", d " + std::to_string(d));
        run_and_check(make_case({kRagged, d, x_type, w_type}, ++seed));
      }
}

void test_alignment() {
  for (const DType w_type : {DType::float32, DType::bfloat16})
    for (const int offset : {0, 1, 2, 4}) {
      begin_test(std::string("weights ") + name(w_type) + ", misaligned by " + std::to_string(offset));
      run_and_check(make_case({{5, 2}, 64, DType::bfloat16, w_type, 1, 9, 3, offset}));
    }
}

void test_one_column_wide_blocks() {
  begin_test("more columns than threads");
  run_and_check(make_case({{2, 0, 3}, 4200, DType::float32, DType::bfloat16}));
  run_and_check(make_case({{2}, 1031, DType::bfloat16, DType::float32}));
}

void test_many_entries() {
  begin_test("more entries than threads");
  run_and_check(make_case({{1100, 0, 513}, 24}));
}

void test_stages() {
  begin_test("stages read what the stage before has left");
  for (const DType type : {DType::float32, DType::bfloat16})
    run_and_check(make_case({{3, 2, 0, 4, 5, 0, 0, 0}, 64, type, type, 2}));
}

void test_scores_and_gates() {
  begin_test("scores and gates");
  Case c = make_case({{6, 0, 6, 6}, 32});
  c.score_ptr = {0, 2, 2, 3, 4};
  c.score = {0, 1, 0, static_cast<float>(kNaN)};
  c.score_threshold = {0, 1, 1e6, 0};
  // Row 0: two monitors feed score 0, two edits hang on it; score 1 equals its threshold. Row 2: a gate that is
  // shut. Row 3: a score that is NaN, which opens.
  const int index[] = {0, 0, 0, 0, 1, -1, 2, 2, 2, 2, 2, -1, 3, 3, 3, 3, 3, -1};
  const int op[] = {0, 0, 5, 2, 5, 0, 0, 5, 2, 0, 5, 5, 5, 2, 0, 5, 3, 4};
  for (int i = 0; i < 18; ++i) c.score_index[i] = index[i], c.op[i] = op[i];
  for (int i = 0; i < 9; ++i) c.threshold[i] = -100, c.max_norm[i] = static_cast<float>(kInfinity);
  const Case after = run_and_check(c);
  check(after.edit[4] == 0, "a score equal to its threshold opened the gate");
  check(after.edit[7] == 0 && after.edit[11] != 0, "a gate that is shut, or the entry beside it");
  check(after.edit[12] != 0, "a NaN score did not open its gate");
}

void test_normalizations() {
  begin_test("normalization");
  for (const DType type : {DType::float32, DType::float16}) {
    Case c = make_case({{4, 3, 0, 5}, 72, type}, 5);
    for (int i = 0; i < 9; ++i) c.normalization[i] = i % kNumNormalizations;
    run_and_check(c, type == DType::float32 ? 1e-5 : 1e-3);
  }
}

void test_limits() {
  begin_test("a value equal to its threshold is inactive, a norm equal to max_norm is inside");
  Case c = make_case({{4}, 4});
  c.max_norm = DeviceArray<float>::generate(9, [](size_t i) { return i == 2 ? 4.75 : 5; });
  for (int i = 0; i < 4; ++i) c.x.set(i, i == 0 ? 3 : i == 1 ? 4 : 0), c.slot[i] = i, c.op[i] = kAdd;
  for (size_t i = 0; i < c.W_enc.size(); ++i) c.W_enc.set(i, i % 4 == 0);
  for (int i = 0; i < 9; ++i) c.b_enc[i] = 0, c.threshold[i] = i == 1 ? 3 : 2.75;
  const Case after = run_and_check(c);
  const double expected[] = {3, 0, 0, 3};
  for (int i = 0; i < 4; ++i) check_value("activation", i, after.activation[i], expected[i]);
}

void test_untouched_rows_keep_their_bits() {
  begin_test("a stage without edits does not write");
  Case c = make_case({{3, 5}, 40, DType::bfloat16});
  for (size_t i = 0; i < c.op.size(); ++i) c.op[i] = kMonitor;
  for (size_t i = 0; i < c.x.size(); i += 3) c.x.set(i, -0.0);
  static_cast<uint16_t*>(c.x.data())[50] = 0xffa5;  // a NaN that no conversion makes
  check(Bytes(run_and_check(c).x) == Bytes(c.x), "x has changed");
}

void test_broken_rows() {
  begin_test("rows and banks that are not finite");
  for (const double bad : {kNaN, kInfinity, -kInfinity}) {
    Case c = make_case({{6, 6, 6}, 33});
    c.x.set(40, bad);
    const Case after = run_and_check(c);
    check(std::memcmp(static_cast<float*>(after.x.data()) + 33, static_cast<float*>(c.x.data()) + 33, 33 * 4) == 0,
          "a row that is not finite was written");
  }
  Case c = make_case({{9}, 33});
  for (int i = 0; i < 9; ++i) c.slot[i] = i, c.op[i] = kClampAlways, c.max_norm[i] = 100;
  c.threshold[0] = c.threshold[2] = c.max_norm[1] = c.max_norm[3] = static_cast<float>(kNaN);
  c.max_norm[2] = 0, c.threshold[3] = 1000;
  const Case after = run_and_check(c);
  for (int i = 0; i < 4; ++i) check(std::isnan(after.activation[i]) && after.edit[i] == 0, "NaN in slot %d", i);
}

void test_bad_entries() {
  begin_test("bad entries are NaN and edit nothing");
  Case c = make_case({{4, 9, 4}, 32});
  c.score_ptr = {0, 1, 2, 3};
  c.score = c.score_threshold = {0, 0, 0};
  for (size_t i = 0; i < c.op.size(); ++i) c.op[i] = kAdd;
  c.slot[4] = -1, c.slot[5] = 9, c.slot[6] = std::numeric_limits<int>::min();
  c.op[7] = kNumSteerOps, c.op[8] = 255;
  c.value[9] = static_cast<float>(kNaN), c.value[10] = -static_cast<float>(kInfinity);
  c.score_index[11] = 2, c.score_index[12] = -2;  // of another row; of none
  c.slot[13] = 1 << 30, c.op[13] = kMonitor, c.score_index[13] = 2;
  const Case after = run_and_check(c);
  for (int i = 4; i < 13; ++i) check(std::isnan(after.activation[i]) && after.edit[i] == 0, "entry %d", i);
  check(std::isnan(after.score[2]), "a bad monitor's score is a plausible number");
}

void test_bad_normalization() {
  begin_test("an unknown normalization is NaN");
  Case c = make_case({{2}, 32});
  c.slot[0] = 4, c.normalization[4] = kNumNormalizations;
  c.slot[1] = 5;
  check(std::isnan(run_and_check(c).activation[0]), "it was used");
}

void test_bad_bounds() {
  begin_test("bad bounds");
  for (const auto& bounds :
       std::vector<std::vector<int>>{{0, 4, 2, 2}, {-4, 2, 4, 6}, {0, 2, 4, 7}, {0, 2, 1 << 30, 6}}) {
    Case c = make_case({{2, 2, 2}, 32});
    std::copy(bounds.begin(), bounds.end(), c.ptr.begin());
    run_and_check(c);
  }
  for (const auto& bounds : std::vector<std::array<int, 4>>{{0, 4, 1, 2}, {-1, 1, 1, 2}, {1 << 30, 1, 1, 1}}) {
    Case c = make_case({{2, 2, 2}, 32});
    c.score = c.score_threshold = {0, 0};
    for (size_t i = 0; i < c.slot.size(); ++i) c.score_index[i] = i % 2, c.op[i] = i % 3 ? kMonitor : kAdd;
    std::copy(bounds.begin(), bounds.end(), c.score_ptr.begin());
    run_and_check(c);
  }
}

void test_nothing_to_do() {
  begin_test("nothing to do");
  for (const Layout& layout :
       {Layout{{}}, Layout{{0, 0, 0}}, Layout{{0, 0}, 8, DType::float32, DType::float32, 1, 0}}) {
    const Case c = make_case(layout);
    check(Bytes(run_and_check(c).x) == Bytes(c.x), "x has changed");
  }
  begin_test("entries of a bank without slots are bad");
  Case c = make_case({{2}, 16});
  c.layout.num_slots = 0;
  c.W_enc = c.W_dec = Tensor();
  c.b_enc = c.threshold = c.max_norm = DeviceArray<float>();
  c.normalization = DeviceArray<uint8_t>();
  run_and_check(c);
}

void test_spare_entries_and_replay() {
  begin_test("one set of buffers, another plan at each launch; entries beyond the last segment are not read");
  Case c = make_case({{30, 30, 30}, 48});
  for (const auto& bounds : std::vector<std::array<int, 4>>{{0, 2, 2, 9}, {0, 0, 0, 0}, {0, 30, 31, 36}}) {
    std::copy(bounds.begin(), bounds.end(), c.ptr.begin());
    for (int j = 0; j < 90; ++j) c.slot[j] = j < bounds[3] ? (5 * j + bounds[1]) % 9 : 1 << 30;
    for (const auto* output : {&c.activation, &c.edit, &c.x_norm})
      std::fill(output->begin(), output->end(), __uint_as_float(~0u));
    c.x = make_case(c.layout, 2 + bounds[1]).x;
    const Case before = c;
    check(launch(c.args(), nullptr) == cudaSuccess, "launch failed");
    check_definition(before, c);
  }
}

// With data that round, so that another order of additions would show.
void test_a_row_does_not_depend_on_its_neighbours() {
  if (!kAllSizes) return;
  begin_test("a row alone gives the bits it has in a batch");
  Random random(9);
  Case batch = make_case({{7, 50, 1, 3}, 200, DType::float32, DType::bfloat16, 2, 60});
  for (size_t i = 0; i < batch.x.size(); ++i) batch.x.set(i, random.real());
  for (const Tensor* weights : {&batch.W_enc, &batch.W_dec})
    for (size_t i = 0; i < weights->size(); ++i) weights->set(i, random.real() / 14);
  for (size_t i = 0; i < batch.value.size(); ++i) batch.value[i] = random.real();
  const Case all = run(batch);
  for (int row = 0; row < 2; ++row) {
    Case alone = batch;
    alone.num_rows = 1;
    alone.x = Tensor(DType::float32, 200);
    for (int i = 0; i < 200; ++i) alone.x.set(i, batch.x[row * 200 + i]);
    std::copy(batch.ptr.begin() + 2 * row, batch.ptr.begin() + 2 * row + 3, alone.ptr.begin());
    const Case one = run(alone);
    for (int i = 0; i < 200; ++i) check_value("x", i, one.x[i], all.x[row * 200 + i]);
    for (int j = batch.ptr[2 * row]; j < batch.ptr[2 * row + 2]; ++j)
      check_value("activation", j, one.activation[j], all.activation[j]);
  }
}

}  // namespace
}  // namespace steerserve

int main() {
  using namespace steerserve;
  test_shapes_and_types();
  test_alignment();
  test_one_column_wide_blocks();
  test_many_entries();
  test_stages();
  test_scores_and_gates();
  test_normalizations();
  test_limits();
  test_untouched_rows_keep_their_bits();
  test_broken_rows();
  test_bad_entries();
  test_bad_normalization();
  test_bad_bounds();
  test_nothing_to_do();
  test_spare_entries_and_replay();
  test_a_row_does_not_depend_on_its_neighbours();
  return simt::finish();
}
