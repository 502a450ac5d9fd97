// sae_encode on the emulator against its definition in ops.h, in float64.
#include "cuda/sae_encode.cuh"
#include "simt/definitions.h"
#include "simt/testing.h"

namespace steerserve {
namespace {

using namespace simt;

struct Layout {
  int num_rows = 3, d = 64, d_sae = 100, k = 0, capacity = 100;
  DType x_type = DType::float32, w_type = DType::float32;
  int x_padding = 0;               // elements between rows
  int x_offset = 0, w_offset = 0;  // elements by which x or the weights miss an alignment of 16 bytes
};

struct Case {
  Layout layout;
  Tensor x;
  Encoder encoder;
  DeviceArray<int32_t> indices;
  DeviceArray<float> values;
  DeviceArray<int32_t> count;
  DeviceArray<unsigned char> workspace;

  int64_t stride() const { return layout.d + layout.x_padding; }

  SaeEncodeArgs args() const {
    SaeEncodeArgs args{};
    args.x = x.data(), args.x_type = x.type(), args.x_row_stride = stride();
    args.num_rows = layout.num_rows, args.d = layout.d;
    args.W_enc = encoder.W_enc.data(), args.w_type = encoder.W_enc.type(), args.d_sae = layout.d_sae;
    args.b_enc = encoder.b_enc.begin(), args.threshold = encoder.threshold.begin();
    args.max_norm = encoder.max_norm, args.k = encoder.k;
    args.indices = indices.begin(), args.values = values.begin(), args.capacity = layout.capacity;
    args.count = count.begin(), args.workspace = workspace.begin();
    return args;
  }

  std::vector<Bytes> outputs() const { return {indices, values, count}; }

  Row row(int n) const {
    std::vector<double> elements;
    for (int i = 0; i < layout.d; ++i) elements.push_back(x[n * stride() + i]);
    return Row(elements);
  }
};

Case make_case(const Layout& layout, uint64_t seed = 1) {
  Random random(seed);
  const size_t num_rows = layout.num_rows, d = layout.d, d_sae = layout.d_sae;
  Case made;
  made.layout = layout;
  made.x = Tensor(layout.x_type, num_rows ? num_rows * made.stride() - layout.x_padding : 0, layout.x_offset);
  for (size_t n = 0; n < num_rows; ++n)
    for (size_t i = 0; i < d; ++i) made.x.set(n * made.stride() + i, random.dyadic(2, 4));
  made.encoder.W_enc = Tensor(layout.w_type, d_sae * d, layout.w_offset);
  made.encoder.W_enc.fill(random, 1, 8);
  made.encoder.b_enc = DeviceArray<float>::generate(d_sae, [&](size_t) { return random.dyadic(1, 8); });
  made.encoder.threshold = DeviceArray<float>::generate(d_sae, [&](size_t) { return std::abs(random.dyadic(1, 8)); });
  made.encoder.k = layout.k;
  made.indices = DeviceArray<int32_t>(num_rows * layout.capacity);
  made.values = DeviceArray<float>(num_rows * layout.capacity);
  made.count = DeviceArray<int32_t>(num_rows);
  made.workspace = DeviceArray<unsigned char>(sae_encode_workspace(num_rows, d_sae));
  return made;
}

void check_definition(const Case& before, const Case& after) {
  const int64_t capacity = before.layout.capacity;
  for (int n = 0; n < before.layout.num_rows; ++n) {
    const Row row = before.row(n);
    check_sparse_row(n, capacity, std::isfinite(row.norm), encode(before.encoder, row, 1),
                     after.indices.begin() + n * capacity, after.values.begin() + n * capacity, after.count[n], 0);
  }
}

Case run_and_check(const Case& before) {
  Case after = run(before);
  check_definition(before, after);
  return after;
}

// ----- tests -----

void test_shapes_and_types() {
  int seed = 0;
  for (const DType x_type : {DType::float32, DType::bfloat16, DType::float16})
    for (const DType w_type : {DType::float32, DType::bfloat16})
      for (const int d : kSizes) {
        begin_test(std::string("x ") + name(x_type) + ", weights " + name(w_type) + ", d " + std::to_string(d));
        const int num_rows = 1 + ++seed % 3;
        run_and_check(make_case({num_rows, d, 40, seed % 2 ? 5 : 0, 40, x_type, w_type, d % 4}, seed));
      }
}

void test_numbers_of_features() {
  for (const int d_sae : {1, 31, 32, 33, 64, 97}) {
    begin_test("d_sae " + std::to_string(d_sae));
    run_and_check(make_case({2, 24, d_sae, d_sae % 2 * 7, d_sae + 7}));
  }
}

void test_numbers_of_rows() {
  for (const int num_rows : {1, 4, 5, 8, 9, 17}) {
    begin_test(std::to_string(num_rows) + " rows");
    run_and_check(make_case({num_rows, 72, 33, 4, 8, DType::bfloat16, DType::bfloat16}));
  }
  if (!kAllSizes) return;
  begin_test("more rows than the workspace holds");
  run_and_check(make_case({67, 12, 33, 3, 5}));
}

void test_long_rows() {
  for (const int num_rows : {1, 2, 9}) {
    begin_test("more columns than shared memory takes at once, " + std::to_string(num_rows) + " rows");
    const int d = num_rows == 1 ? 4096 : num_rows == 2 ? 1024 : 512;
    run_and_check(make_case({num_rows, d + 8, 5, 0, 5, DType::float16, DType::bfloat16}));
    run_and_check(make_case({num_rows, 2 * d + 3, 2, 0, 2}));
  }
}

void test_alignment() {
  for (const DType w_type : {DType::float32, DType::bfloat16})
    for (const int offset : {0, 1, 2, 4}) {
      begin_test(std::string("weights ") + name(w_type) + ", misaligned by " + std::to_string(offset));
      run_and_check(make_case({2, 64, 33, 0, 33, DType::float32, w_type, 0, 0, offset}));
      begin_test(std::string("x misaligned by ") + std::to_string(offset) + ", weights " + name(w_type));
      run_and_check(make_case({2, 64, 33, 0, 33, DType::bfloat16, w_type, 4 * offset, offset}));
    }
}

void test_many_features() {
  if (!kAllSizes) return;
  begin_test("more features than threads have bits");
  run_and_check(make_case({1, 8, 32 * 1024 + 5, 0, 20000, DType::float32, DType::bfloat16}));
  run_and_check(make_case({1, 4, 32 * 1024 + 5, 700, 700}));
}

void test_top_k_and_ties() {
  for (const int k : {1, 2, 31, 64, 90}) {
    begin_test("the " + std::to_string(k) + " largest, with many ties");
    Case c = make_case({4, 4, 90, k, 90});
    for (size_t i = 0; i < c.encoder.W_enc.size(); ++i) c.encoder.W_enc.set(i, int(i) % 3 - 1);
    for (size_t i = 0; i < 16; ++i) c.x.set(i, i < 4 ? 0 : int(i) % 2);
    std::fill(c.encoder.b_enc.begin(), c.encoder.b_enc.end(), 0.5f);
    std::fill(c.encoder.threshold.begin(), c.encoder.threshold.end(), 0.0f);
    run_and_check(c);
  }
  begin_test("the largest of values that differ in their last bits");
  Case close = make_case({1, 4, 90, 20, 20});
  for (int j = 0; j < 90; ++j) {
    for (int i = 0; i < 4; ++i) close.encoder.W_enc.set(4 * j + i, 0);
    close.encoder.b_enc[j] = 2 + static_cast<float>(j * 37 % 90) / (1 << 22);
  }
  run_and_check(close);
  begin_test("features below 0 take part if their threshold lets them");
  Case low = make_case({3, 4, 70, 40, 40});
  std::fill(low.encoder.threshold.begin(), low.encoder.threshold.end(), -1e6f);
  run_and_check(low);
}

void test_overflow() {
  begin_test("more active features than the capacity");
  for (const int capacity : {0, 1, 10, 32}) run_and_check(make_case({3, 48, 100, 0, capacity}));
}

void test_limits() {
  begin_test("a value equal to its threshold is inactive, a norm equal to max_norm is inside");
  for (const float max_norm : {5.0f, 4.75f}) {
    Case c = make_case({1, 2, 3, 0, 3});
    c.x.set(0, 3), c.x.set(1, 4);
    for (int i = 0; i < 6; ++i) c.encoder.W_enc.set(i, 1);
    for (int i = 0; i < 3; ++i) c.encoder.b_enc[i] = 0, c.encoder.threshold[i] = 6 + i;
    c.encoder.max_norm = max_norm;
    check_value("count", 0, run_and_check(c).count[0], max_norm == 5 ? 1 : 0);
  }
  Case c = make_case({6, 40, 64, 0, 64});
  c.encoder.max_norm = static_cast<float>(c.row(2).norm);
  run_and_check(c);
}

void test_broken_rows() {
  begin_test("rows that are not finite have count −1 and no features, with and without max_norm or k");
  for (const int k : {0, 3})
    for (const double max_norm : {kInfinity, 100.0}) {
      Case c = make_case({5, 40, 64, k, 64});
      c.encoder.max_norm = static_cast<float>(max_norm);
      c.x.set(0, kNaN), c.x.set(81, kInfinity), c.x.set(121, -kInfinity), c.x.set(122, kInfinity);
      run_and_check(c);
    }
  begin_test("a NaN among the weights, biases or thresholds breaks every row");
  for (const int k : {0, 3})
    for (const int which : {0, 1, 2}) {
      Case broken = make_case({2, 40, 64, k, 64});
      if (which == 0) broken.encoder.W_enc.set(40 * 33 + 5, kNaN);
      if (which == 1) broken.encoder.b_enc[33] = static_cast<float>(kNaN);
      if (which == 2) broken.encoder.threshold[33] = static_cast<float>(kNaN);
      const Case after = run(broken);
      for (int n = 0; n < 2; ++n)
        check_sparse_row(n, 64, false, {}, after.indices.begin() + 64 * n, after.values.begin() + 64 * n,
                         after.count[n], 0);
    }
  begin_test("a row whose norm overflows float32");
  Case c = make_case({2, 8, 16, 0, 16});
  for (int i = 0; i < 8; ++i) c.x.set(i, 3e38);
  check(run(c).count[0] == -1, "it has features");
}

void test_nothing_to_do() {
  begin_test("no rows, no features");
  run_and_check(make_case({0, 16}));
  run_and_check(make_case({2, 16, 0, 0, 4}));
}

// With data that round, so that another order of additions would show.
void test_a_row_does_not_depend_on_its_neighbours() {
  if (!kAllSizes) return;
  begin_test("a row alone gives the bits it has in batches of any size");
  Random random(3);
  Case batch = make_case({17, 200, 70, 20, 20, DType::float32, DType::bfloat16});
  for (size_t i = 0; i < batch.x.size(); ++i) batch.x.set(i, random.real());
  for (size_t i = 0; i < batch.encoder.W_enc.size(); ++i) batch.encoder.W_enc.set(i, random.real() / 14);
  const Case all = run(batch);
  for (const int num_rows : {1, 3, 7}) {
    Case part = make_case({num_rows, 200, 70, 20, 20, DType::float32, DType::bfloat16});
    part.encoder = batch.encoder;
    for (size_t i = 0; i < part.x.size(); ++i) part.x.set(i, batch.x[i]);
    const Case some = run(part);
    for (int i = 0; i < 20 * num_rows; ++i) {
      check_value("index", i, some.indices[i], all.indices[i]);
      check_value("value", i, some.values[i], all.values[i]);
    }
  }
}

void test_replay() {
  begin_test("one set of buffers, other rows at each launch");
  Case c = make_case({3, 48, 70, 6, 6});
  for (int turn = 0; turn < 3; ++turn) {
    Case before = c;
    check(launch(c.args(), nullptr) == cudaSuccess, "launch failed");
    check_definition(before, c);
    c.x = make_case(c.layout, 10 + turn).x;
    if (turn == 0) c.x.set(0, kNaN);
    std::fill(c.indices.begin(), c.indices.end(), -1);
    std::fill(c.values.begin(), c.values.end(), __uint_as_float(~0u));
  }
}

}  // namespace
}  // namespace steerserve

int main() {
  using namespace steerserve;
  test_shapes_and_types();
  test_numbers_of_features();
  test_numbers_of_rows();
  test_long_rows();
  test_alignment();
  test_many_features();
  test_top_k_and_ties();
  test_overflow();
  test_limits();
  test_broken_rows();
  test_nothing_to_do();
  test_a_row_does_not_depend_on_its_neighbours();
  test_replay();
  return simt::finish();
}
