// sae_decode on the emulator against its definition in ops.h, in float64.
#include "cuda/sae_decode.cuh"
#include "simt/testing.h"

namespace steerserve {
namespace {

using namespace simt;

struct Layout {
  std::vector<int> counts;
  int capacity = 16, d = 64, d_sae = 50;
  DType out_type = DType::float32, w_type = DType::float32;
  int out_padding = 0;  // elements between rows
  int w_offset = 0;     // elements by which the weights miss an alignment of 16 bytes
};

struct Case {
  Layout layout;
  DeviceArray<int32_t> indices;
  DeviceArray<float> values;
  DeviceArray<int32_t> count;
  Tensor W_dec;
  DeviceArray<float> b_dec;
  Tensor out;

  int64_t stride() const { return layout.d + layout.out_padding; }

  SaeDecodeArgs args() const {
    SaeDecodeArgs args{};
    args.indices = indices.begin(), args.values = values.begin(), args.count = count.begin();
    args.num_rows = count.size(), args.capacity = layout.capacity;
    args.W_dec = W_dec.data(), args.w_type = W_dec.type(), args.d_sae = layout.d_sae, args.b_dec = b_dec.begin();
    args.out = out.data(), args.out_type = out.type(), args.out_row_stride = stride(), args.d = layout.d;
    return args;
  }

  std::vector<Bytes> outputs() const { return {out}; }
};

// Entries beyond a row's count are poison, and their indices −1: they must not be used.
Case make_case(const Layout& layout, uint64_t seed = 1) {
  Random random(seed);
  const size_t num_rows = layout.counts.size(), capacity = layout.capacity;
  Case made;
  made.layout = layout;
  made.indices = DeviceArray<int32_t>(num_rows * capacity);
  made.values = DeviceArray<float>(num_rows * capacity);
  made.count = DeviceArray<int32_t>(num_rows);
  for (size_t n = 0; n < num_rows; ++n) {
    made.count[n] = layout.counts[n];
    for (int j = 0; j < std::min(layout.counts[n], layout.capacity); ++j) {
      made.indices[n * capacity + j] = random.below(layout.d_sae);
      made.values[n * capacity + j] = random.dyadic(4, 8);
    }
  }
  made.W_dec = Tensor(layout.w_type, size_t(layout.d_sae) * layout.d, layout.w_offset);
  made.W_dec.fill(random, 1, 8);
  made.b_dec = DeviceArray<float>::generate(layout.d, [&](size_t) { return random.dyadic(1, 16); });
  made.out = Tensor(layout.out_type, num_rows ? num_rows * made.stride() - layout.out_padding : 0);
  return made;
}

Case run_and_check(const Case& c) {
  const Case after = run(c);
  const int64_t stride = c.stride();
  for (size_t n = 0; n < c.count.size(); ++n) {
    std::vector<double> sum(c.b_dec.begin(), c.b_dec.end());
    const bool known = 0 <= c.count[n] && c.count[n] <= c.layout.capacity;
    for (int j = 0; j < c.count[n] && known; ++j) {
      const int index = c.indices[n * c.layout.capacity + j];
      const bool exists = 0 <= index && index < c.layout.d_sae;
      for (int i = 0; i < c.layout.d; ++i)
        sum[i] += exists ? c.values[n * c.layout.capacity + j] * c.W_dec[index * c.layout.d + i] : kNaN;
    }
    for (int i = 0; i < c.layout.d; ++i)
      check_value("out", n * stride + i, after.out[n * stride + i], known ? rounded(c.out.type(), sum[i]) : kNaN);
  }
  for (size_t i = 0; i < after.out.size(); ++i)
    if (int64_t(i) % stride >= c.layout.d)
      check(std::memcmp(static_cast<char*>(after.out.data()) + i * Tensor::element_bytes(c.out.type()), "\xff\xff",
                        2) == 0,
            "padding was written");
  return after;
}

// ----- tests -----

void test_shapes_and_types() {
  int seed = 0;
  for (const DType out_type : {DType::float32, DType::bfloat16, DType::float16})
    for (const DType w_type : {DType::float32, DType::bfloat16})
      for (const int d : kSizes) {
        begin_test(std::string("out ") + name(out_type) + ", weights " + name(w_type) + ", d " + std::to_string(d));
        run_and_check(make_case({{3, 0, 16, 1}, 16, d, 50, out_type, w_type, d % 3}, ++seed));
      }
}

void test_alignment() {
  for (const DType w_type : {DType::float32, DType::bfloat16})
    for (const int offset : {1, 2, 4}) {
      begin_test(std::string("weights ") + name(w_type) + ", misaligned by " + std::to_string(offset));
      run_and_check(make_case({{5, 2}, 5, 64, 20, DType::bfloat16, w_type, 0, offset}));
    }
}

void test_many_entries() {
  begin_test("rows with more entries than a block takes at once");
  run_and_check(make_case({{127, 128, 129, 300}, 300, 40, 33}));
}

void test_unknown_rows() {
  begin_test("rows with a bad count are NaN");
  run_and_check(make_case({{-1, 4, 5, 1 << 30, std::numeric_limits<int>::min()}, 4, 24}));
}

void test_bad_indices() {
  begin_test("an index that does not exist makes its row NaN");
  for (const int index : {-1, 50, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()}) {
    Case c = make_case({{3, 3, 3}, 3, 24});
    c.indices[4] = index;
    run_and_check(c);
  }
}

void test_values_that_are_not_finite() {
  begin_test("values that are not finite");
  Case c = make_case({{3, 3}, 3, 24});
  c.values[1] = static_cast<float>(kNaN), c.values[4] = static_cast<float>(kInfinity);
  for (size_t i = 0; i < c.W_dec.size(); ++i) c.W_dec.set(i, 1);
  run_and_check(c);
}

void test_nothing_to_do() {
  begin_test("no rows, no columns, no capacity");
  run_and_check(make_case({{}}));
  run_and_check(make_case({{2, 0}, 4, 0}));
  run_and_check(make_case({{0, 0, 0}, 0, 12}));
  begin_test("a decoder without features");
  Case c = make_case({{1, 0}, 2, 12});
  c.layout.d_sae = 0;
  c.W_dec = Tensor();
  run_and_check(c);
}

// With data that round, so that another order of additions would show.
void test_a_row_does_not_depend_on_its_neighbours() {
  if (!kAllSizes) return;
  begin_test("a row alone gives the bits it has in a batch");
  Random random(3);
  Case batch = make_case({{90, 7, 40}, 100, 72, 200, DType::float32, DType::bfloat16});
  for (size_t i = 0; i < batch.W_dec.size(); ++i) batch.W_dec.set(i, random.real());
  for (int n = 0; n < 3; ++n)
    for (int j = 0; j < batch.count[n]; ++j) batch.values[n * 100 + j] = random.real();
  const Case all = run(batch);
  for (int n = 0; n < 3; ++n) {
    Case alone = batch;
    alone.count = {batch.count[n]};
    std::copy_n(batch.indices.begin() + n * 100, 100, alone.indices.begin());
    std::copy_n(batch.values.begin() + n * 100, 100, alone.values.begin());
    alone.out = Tensor(DType::float32, 72);
    const Case one = run(alone);
    for (int i = 0; i < 72; ++i) check_value("out", i, one.out[i], all.out[n * 72 + i]);
  }
}

void test_replay() {
  begin_test("one set of buffers, other rows at each launch");
  Case c = make_case({{4, 4}, 4, 24});
  const Case other = make_case({{4, 0}, 4, 24}, 2);
  run_and_check(c);
  c.indices = other.indices, c.values = other.values, c.count = other.count;
  run_and_check(c);
}

}  // namespace
}  // namespace steerserve

int main() {
  using namespace steerserve;
  test_shapes_and_types();
  test_alignment();
  test_many_entries();
  test_unknown_rows();
  test_bad_indices();
  test_values_that_are_not_finite();
  test_nothing_to_do();
  test_a_row_does_not_depend_on_its_neighbours();
  test_replay();
  return simt::finish();
}
