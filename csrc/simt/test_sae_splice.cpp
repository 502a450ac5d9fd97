// sae_splice on the emulator against its definition in ops.h, in float64.
#include <numeric>

#include "cuda/sae_splice.cuh"
#include "simt/definitions.h"
#include "simt/testing.h"

namespace steerserve {
namespace {

using namespace simt;

struct Layout {
  int num_x_rows = 6;
  std::vector<int> rows = {0, 2, 5}, lengths = {3, 0, 4};  // lengths: of the segments, in entries
  int d = 64, d_sae = 70, k = 0, capacity = 70;
  DType x_type = DType::float32, w_type = DType::float32;
  Normalization normalization = kNone;
  int x_padding = 0;  // elements between rows
  int w_offset = 0;   // elements by which the weights miss an alignment of 16 bytes
};

struct Case {
  Layout layout;
  Tensor x;
  DeviceArray<int32_t> rows, ptr, feature;
  DeviceArray<uint8_t> op;
  DeviceArray<float> value;
  Encoder encoder;
  Tensor W_dec;
  DeviceArray<float> b_dec;
  DeviceArray<int32_t> indices;
  DeviceArray<float> values;
  DeviceArray<int32_t> count;
  DeviceArray<float> activation, edit, x_norm;
  DeviceArray<unsigned char> workspace;

  int64_t stride() const { return layout.d + layout.x_padding; }

  SaeSpliceArgs args() const {
    SaeSpliceArgs args{};
    args.x = x.data(), args.x_type = x.type(), args.x_row_stride = stride();
    args.num_x_rows = layout.num_x_rows, args.d = layout.d;
    args.rows = rows.begin(), args.num_rows = rows.size();
    args.ptr = ptr.begin(), args.feature = feature.begin(), args.op = op.begin(), args.value = value.begin();
    args.nnz = feature.size();
    args.W_enc = encoder.W_enc.data(), args.b_enc = encoder.b_enc.begin(), args.threshold = encoder.threshold.begin();
    args.W_dec = W_dec.data(), args.w_type = W_dec.type(), args.b_dec = b_dec.begin(), args.d_sae = layout.d_sae;
    args.max_norm = encoder.max_norm, args.normalization = layout.normalization, args.k = encoder.k;
    args.indices = indices.begin(), args.values = values.begin(), args.capacity = layout.capacity;
    args.count = count.begin(), args.activation = activation.begin(), args.edit = edit.begin();
    args.x_norm = x_norm.begin(), args.workspace = workspace.begin();
    return args;
  }

  std::vector<Bytes> outputs() const { return {x, indices, values, count, activation, edit, x_norm}; }

  Row row(int n) const {
    std::vector<double> elements;
    for (int i = 0; i < layout.d; ++i) elements.push_back(x[n * stride() + i]);
    return Row(elements);
  }
};

Case make_case(const Layout& layout, uint64_t seed = 1) {
  Random random(seed);
  const size_t num_rows = layout.rows.size(), d = layout.d, d_sae = layout.d_sae;
  const size_t nnz = std::accumulate(layout.lengths.begin(), layout.lengths.end(), 0);
  Case made;
  made.layout = layout;
  made.x = Tensor(layout.x_type, layout.num_x_rows * made.stride() - layout.x_padding);
  for (int n = 0; n < layout.num_x_rows; ++n)
    for (size_t i = 0; i < d; ++i) made.x.set(n * made.stride() + i, random.dyadic(2, 4));
  made.rows = DeviceArray<int32_t>::generate(num_rows, [&](size_t i) { return layout.rows[i]; });
  made.ptr = DeviceArray<int32_t>(num_rows + 1);
  made.ptr[0] = 0;
  std::partial_sum(layout.lengths.begin(), layout.lengths.end(), made.ptr.begin() + 1);
  made.feature = DeviceArray<int32_t>::generate(nnz, [&](size_t) { return random.below(layout.d_sae); });
  made.op = DeviceArray<uint8_t>::generate(nnz, [&](size_t) { return random.below(kNumSteerOps); });
  made.value = DeviceArray<float>::generate(nnz, [&](size_t) { return random.dyadic(2, 1); });
  made.encoder.W_enc = Tensor(layout.w_type, d_sae * d, layout.w_offset);
  made.encoder.W_enc.fill(random, 1, 8);
  made.encoder.b_enc = DeviceArray<float>::generate(d_sae, [&](size_t) { return random.dyadic(1, 8); });
  made.encoder.threshold = DeviceArray<float>::generate(d_sae, [&](size_t) { return std::abs(random.dyadic(1, 8)); });
  made.encoder.k = layout.k;
  made.W_dec = Tensor(layout.w_type, d_sae * d, layout.w_offset);
  made.W_dec.fill(random, 1, 4);
  made.b_dec = DeviceArray<float>::generate(d, [&](size_t) { return random.dyadic(1, 8); });
  made.indices = DeviceArray<int32_t>(num_rows * layout.capacity);
  made.values = DeviceArray<float>(num_rows * layout.capacity);
  made.count = DeviceArray<int32_t>(num_rows);
  made.activation = DeviceArray<float>(nnz);
  made.edit = DeviceArray<float>(nnz);
  made.x_norm = DeviceArray<float>(num_rows);
  made.workspace = DeviceArray<unsigned char>(sae_splice_workspace(num_rows, d_sae));
  return made;
}

// ----- the definition -----

class Definition {
 public:
  // `relative` to the size of the numbers: 0 demands the definition, rounded once.
  Definition(const Case& before, const Case& after, double relative)
      : before_(before), after_(after), relative_(relative), written_(before.x.size()) {
    for (size_t i = 0; i < before.rows.size(); ++i) check_row(i);
    for (size_t i = 0; i < written_.size(); ++i)
      if (!written_[i]) check(same_element(i), "x[%zu] of a row that must be left alone was written", i);
  }

 private:
  bool same_element(size_t i) const {
    const size_t size = Tensor::element_bytes(before_.x.type());
    return std::memcmp(&before_.x.bytes()[i * size], &after_.x.bytes()[i * size], size) == 0;
  }

  double slack(double value) const { return relative_ * (1 + std::abs(value)); }

  void check_row(size_t i) {
    const Case& c = before_;
    const int n = c.rows[i], begin = c.ptr[i], end = c.ptr[i + 1];
    const bool has_bounds = 0 <= begin && begin <= end && end <= int(c.feature.size());
    const bool is_valid = has_bounds && 0 <= n && n < c.layout.num_x_rows;
    const Row row = is_valid ? c.row(n) : Row({kNaN});
    const bool is_finite = std::isfinite(row.norm);
    const double scale = row.scale(c.layout.normalization);
    const std::vector<Feature> active = is_finite ? encode(c.encoder, row, scale) : std::vector<Feature>();
    const int64_t capacity = c.layout.capacity;
    check_sparse_row(i, capacity, is_finite, active, after_.indices.begin() + i * capacity,
                     after_.values.begin() + i * capacity, after_.count[i], relative_);
    check_value("x_norm", i, after_.x_norm[i], is_valid ? row.norm : kNaN, 1e-6 * std::abs(row.norm));

    const bool is_known = is_finite && int64_t(active.size()) <= capacity;
    const bool is_inside = static_cast<float>(row.norm) <= c.encoder.max_norm;
    std::vector<double> sum(c.layout.d, 0.0);
    const auto add = [&](int feature, double factor) {
      for (int j = 0; j < c.layout.d; ++j) sum[j] += factor * c.W_dec[feature * c.layout.d + j];
    };
    bool is_changed = is_inside;
    for (int j = begin; has_bounds && j < end; ++j) {
      const int feature = c.feature[j];
      const bool is_usable =
          is_known && 0 <= feature && feature < c.layout.d_sae && c.op[j] < kNumSteerOps && std::isfinite(c.value[j]);
      double f = is_usable ? 0 : kNaN, edit = 0;
      for (const Feature& one : active)
        if (is_usable && one.index == feature) f = one.value;
      if (is_usable) edit = edited(c.op[j], f, c.value[j]) - f;
      check_value("activation", j, after_.activation[j], f, slack(f));
      check_value("edit", j, after_.edit[j], edit, slack(edit));
      if (edit == 0) continue;
      is_changed = true;
      add(feature, edit);
    }
    if (!is_known || !is_changed) return;
    for (const Feature& one : active) add(one.index, one.value);
    const double mean = c.layout.normalization == kLayerNorm ? row.mean : 0;
    for (int j = 0; j < c.layout.d; ++j) {
      const double value = is_inside ? scale * (sum[j] + c.b_dec[j]) + mean : row.x[j] + scale * sum[j];
      const size_t element = n * c.stride() + j;
      written_[element] = true;
      check_value("x", element, after_.x[element], rounded(c.x.type(), value), slack(value));
    }
  }

  const Case& before_;
  const Case& after_;
  const double relative_;
  std::vector<bool> written_;  // elements of x
};

Case run_and_check(const Case& before, double relative = 0) {
  Case after = run(before);
  Definition(before, after, relative);
  return after;
}

// ----- tests -----

void test_shapes_and_types() {
  int seed = 0;
  for (const DType x_type : {DType::float32, DType::bfloat16, DType::float16})
    for (const DType w_type : {DType::float32, DType::bfloat16})
      for (const int d : kSizes) {
        begin_test(std::string("x ") + name(x_type) + ", weights " + name(w_type) + ", d " + std::to_string(d));
        const int d_sae = 40 + ++seed, k = seed % 2 * 9;
        run_and_check(make_case({4, {1, 3}, {5, 2}, d, d_sae, k, d_sae, x_type, w_type, kNone, d % 4}, seed));
      }
}

void test_alignment() {
  for (const DType w_type : {DType::float32, DType::bfloat16})
    for (const int offset : {1, 2, 4}) {
      begin_test(std::string("weights ") + name(w_type) + ", misaligned by " + std::to_string(offset));
      run_and_check(make_case({2, {1}, {3}, 64, 33, 0, 33, DType::bfloat16, w_type, kNone, 4, offset}));
    }
}

void test_numbers_of_rows_and_entries() {
  begin_test("many rows, many entries");
  Layout layout{12, {0, 1, 2, 3, 5, 6, 7, 9, 10, 11}, {1, 0, 0, 2, 1, 1, 70, 1, 3, 0}, 40, 33, 8, 8};
  run_and_check(make_case(layout));
  if (!kAllSizes) return;
  begin_test("more entries than threads");
  run_and_check(make_case({2, {0, 1}, {1300, 3}, 16, 20, 0, 20}));
  begin_test("more rows than the workspace holds");
  layout.num_x_rows = 67;
  layout.rows.resize(67);
  layout.lengths.assign(67, 1);
  std::iota(layout.rows.begin(), layout.rows.end(), 0);
  run_and_check(make_case(layout));
}

void test_repeated_features() {
  begin_test("edits of one feature add up, each seeing the unedited f");
  Case c = make_case({2, {0, 1}, {6, 6}, 32, 20, 0, 20});
  for (int i = 0; i < 12; ++i) c.feature[i] = i % 2, c.op[i] = i % kNumSteerOps;
  run_and_check(c);
}

void test_normalizations() {
  for (const Normalization normalization : {kConstantNormRescale, kLayerNorm}) {
    begin_test("normalization " + std::to_string(normalization));
    run_and_check(make_case({4, {0, 2, 3}, {4, 0, 5}, 72, 50, 0, 50, DType::float32, DType::float32, normalization}),
                  2e-5);
    Case c = make_case({4, {1, 3}, {4, 5}, 72, 50, 6, 6, DType::float16, DType::bfloat16, normalization});
    c.encoder.max_norm = static_cast<float>(std::min(c.row(1).norm, c.row(3).norm) + 0.01);
    run_and_check(c, 2e-3);
  }
}

void test_beyond_max_norm() {
  begin_test("beyond max_norm only edits are added; a row without edits is not written");
  Case c = make_case({5, {0, 1, 2, 4}, {3, 0, 2, 4}, 48, 40, 0, 40});
  c.encoder.max_norm = 1;
  c.x.set(48, -0.0);
  for (int i = 3; i < 5; ++i) c.op[i] = kMonitor;
  run_and_check(c);
  c.encoder.max_norm = static_cast<float>(c.row(1).norm);
  run_and_check(c);
}

void test_rows_left_alone() {
  begin_test("rows that are not finite or overflow the capacity are left alone");
  Case c = make_case({6, {0, 2, 3, 5}, {3, 2, 0, 3}, 48, 60, 0, 12});
  c.x.set(2 * 48 + 5, kNaN), c.x.set(3 * 48, -kInfinity);
  for (int i = 0; i < 48; ++i) c.x.set(5 * 48 + i, 0);  // fits: only what has a bias above its threshold
  for (int j = 0; j < 60; ++j) c.encoder.threshold[j] = 1 - (j % 6 == 0);
  const Case after = run_and_check(c);
  check(after.count[0] > 12 && after.count[1] == -1 && after.count[3] <= 12, "not the case that was meant");
  for (int i = 0; i < 5; ++i) check(std::isnan(after.activation[i]) && after.edit[i] == 0, "entry %d", i);
  begin_test("a row fits if it has as many active features as the capacity");
  const int count = run(make_case({1, {0}, {2}})).count[0];
  for (const int capacity : {count - 1, count}) run_and_check(make_case({1, {0}, {2}, 64, 70, 0, capacity}));
}

void test_bad_entries() {
  begin_test("bad entries are NaN and edit nothing");
  Case c = make_case({3, {0, 2}, {8, 3}, 32, 40, 0, 40});
  for (int i = 0; i < 11; ++i) c.op[i] = kAdd;
  c.feature[0] = -1, c.feature[1] = 40, c.feature[2] = std::numeric_limits<int>::min();
  c.op[3] = kNumSteerOps, c.op[4] = 255;
  c.value[5] = static_cast<float>(kNaN), c.value[6] = static_cast<float>(kInfinity);
  const Case after = run_and_check(c);
  for (int i = 0; i < 7; ++i) check(std::isnan(after.activation[i]) && after.edit[i] == 0, "entry %d", i);
}

void test_bad_rows_and_bounds() {
  begin_test("a row that x does not have, and bad bounds");
  for (const int row : {-1, 6, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()}) {
    Case c = make_case({});
    c.rows[2] = row;
    run_and_check(c);
  }
  for (const auto& bounds :
       std::vector<std::vector<int>>{{0, 7, 2, 2}, {-1, 3, 3, 7}, {0, 3, 3, 8}, {0, 3, 1 << 30, 7}}) {
    Case c = make_case({});
    std::copy(bounds.begin(), bounds.end(), c.ptr.begin());
    run_and_check(c);
  }
}

void test_nothing_to_do() {
  begin_test("no rows, no entries, no features");
  run_and_check(make_case({3, {}, {}}));
  run_and_check(make_case({3, {1}, {0}}));
  run_and_check(make_case({3, {1}, {0}, 16, 0, 0, 4}));
}

void test_replay() {
  begin_test("one set of buffers, another plan at each launch; entries beyond the last row are not read");
  Case c = make_case({6, {0, 2, 5}, {8, 8, 8}, 40, 50, 0, 50});
  for (int turn = 0; turn < 3; ++turn) {
    const Case other = make_case({6, {turn, 3, 4 + turn % 2}, {2 * turn, 0, 3}, 40, 50, 0, 50}, 2 + turn);
    c.rows = other.rows, c.ptr = other.ptr, c.x = other.x;
    for (int i = 0; i < 24; ++i) c.feature[i] = i < c.ptr[3] ? (7 * i + turn) % 50 : 1 << 30;
    for (const auto* array : {&c.values, &c.activation, &c.edit, &c.x_norm})
      std::fill(array->begin(), array->end(), __uint_as_float(~0u));
    std::fill(c.indices.begin(), c.indices.end(), -1);
    const Case before = c;
    check(launch(c.args(), nullptr) == cudaSuccess, "launch failed");
    Definition(before, c, 0);
    for (int i = c.ptr[3]; i < 24; ++i) check_output("activation", i, c.activation[i], kUnwritten);
  }
}

// With data that round, so that another order of additions would show.
void test_a_row_does_not_depend_on_its_neighbours() {
  if (!kAllSizes) return;
  begin_test("a row alone gives the bits it has in a batch");
  Random random(3);
  Case batch =
      make_case({5, {0, 1, 2, 3, 4}, {2, 3, 0, 9, 1}, 200, 70, 0, 70, DType::float32, DType::bfloat16, kLayerNorm});
  for (size_t i = 0; i < batch.x.size(); ++i) batch.x.set(i, random.real());
  for (const Tensor* weights : {&batch.encoder.W_enc, &batch.W_dec})
    for (size_t i = 0; i < weights->size(); ++i) weights->set(i, random.real() / 14);
  const Case all = run(batch);
  for (const int n : {0, 3}) {
    Case alone = batch;
    alone.rows = {n};
    alone.ptr = {batch.ptr[n], batch.ptr[n + 1]};
    const Case one = run(alone);
    for (int i = n * 200; i < n * 200 + 200; ++i) check_value("x", i, one.x[i], all.x[i]);
    for (int j = 0; j < all.count[n]; ++j) check_value("value", j, one.values[j], all.values[n * 70 + j]);
  }
}

}  // namespace
}  // namespace steerserve

int main() {
  using namespace steerserve;
  test_shapes_and_types();
  test_alignment();
  test_numbers_of_rows_and_entries();
  test_repeated_features();
  test_normalizations();
  test_beyond_max_norm();
  test_rows_left_alone();
  test_bad_entries();
  test_bad_rows_and_bounds();
  test_nothing_to_do();
  test_replay();
  test_a_row_does_not_depend_on_its_neighbours();
  return simt::finish();
}
