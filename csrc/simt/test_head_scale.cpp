// head_scale on the emulator against its definition in ops.h, in float64.
#include <numeric>

#include "cuda/head_scale.cuh"
#include "simt/testing.h"

namespace steerserve {
namespace {

using namespace simt;

struct Case {
  int num_heads = 0, d_head = 0;
  int64_t num_rows = 0, stride = 0;
  Tensor z;
  DeviceArray<int32_t> ptr, head;
  DeviceArray<float> scale, z_norm;

  HeadScaleArgs args() const {
    return {z.data(),      z.type(),    stride,       num_rows,      num_heads,
            d_head,        ptr.begin(), head.begin(), scale.begin(), int64_t(head.size()),
            z_norm.begin()};
  }

  std::vector<Bytes> outputs() const { return {z, z_norm}; }
};

Case make_case(DType type, const std::vector<int>& lengths, int num_heads, int d_head, int padding = 0) {
  Random random(lengths.size() + num_heads * d_head);
  const size_t nnz = std::accumulate(lengths.begin(), lengths.end(), 0);
  Case made;
  made.num_heads = num_heads;
  made.d_head = d_head;
  made.num_rows = lengths.size();
  made.stride = num_heads * d_head + padding;
  made.z = Tensor(type, made.num_rows ? made.num_rows * made.stride - padding : 0);
  for (size_t i = 0; i < made.z.size(); ++i)
    if (int(i % made.stride) < num_heads * d_head) made.z.set(i, random.dyadic(2, 4));
  made.ptr = DeviceArray<int32_t>(lengths.size() + 1);
  made.ptr[0] = 0;
  std::partial_sum(lengths.begin(), lengths.end(), made.ptr.begin() + 1);
  made.head = DeviceArray<int32_t>::generate(nnz, [&](size_t) { return random.below(num_heads); });
  made.scale = DeviceArray<float>::generate(nnz, [&](size_t) { return random.dyadic(2, 4); });
  made.z_norm = DeviceArray<float>(nnz);
  return made;
}

void check_definition(const Case& before, const Case& after) {
  std::vector<double> z, z_norm(before.head.size(), kUnwritten);
  for (size_t i = 0; i < before.z.size(); ++i) z.push_back(before.z[i]);
  for (int64_t n = 0; n < before.num_rows; ++n) {
    const int begin = before.ptr[n], end = before.ptr[n + 1];
    if (begin < 0 || end > int(before.head.size())) continue;
    for (int j = begin; j < end; ++j) {
      const int head = before.head[j];
      const double scale = before.scale[j];
      z_norm[j] = kNaN;
      if (head < 0 || head >= before.num_heads || !std::isfinite(scale)) continue;
      double* const first = &z[n * before.stride + head * before.d_head];
      z_norm[j] = std::sqrt(std::inner_product(first, first + before.d_head, first, 0.0));
      for (int i = 0; i < before.d_head && scale != 1; ++i) first[i] = rounded(before.z.type(), scale * first[i]);
    }
  }
  for (size_t i = 0; i < z.size(); ++i) check_value("z", i, after.z[i], z[i]);
  for (size_t i = 0; i < z_norm.size(); ++i)
    check_output("z_norm", i, after.z_norm[i], z_norm[i], 2e-7 * std::abs(z_norm[i]));
}

Case run_and_check(const Case& before) {
  Case after = run(before);
  check_definition(before, after);
  return after;
}

// ----- tests -----

void test_shapes_and_types() {
  for (const DType type : {DType::float32, DType::bfloat16, DType::float16})
    for (const int d_head : {1, 31, 64, 80}) {
      begin_test(std::string(name(type)) + ", d_head " + std::to_string(d_head));
      run_and_check(make_case(type, {2, 0, 1, 5, 0}, 9, d_head, 3));
    }
}

void test_repeated_heads_apply_in_order() {
  begin_test("a head that is named again and again is scaled in the order of the entries");
  run_and_check(make_case(DType::bfloat16, {70, 3, 40}, 3, 33));
  Case c = make_case(DType::float32, {33}, 40, 8);
  for (int i = 0; i < 33; ++i) c.head[i] = i % 32 == 0 ? 39 : i, c.scale[i] = i == 32 ? 0.5f : 3;
  run_and_check(c);
}

void test_a_scale_of_one_does_not_write() {
  begin_test("a scale of 1 does not write, a scale of 0 does");
  Case c = make_case(DType::float16, {4}, 4, 16);
  for (int i = 0; i < 4; ++i) c.head[i] = i, c.scale[i] = i == 1 ? 0 : 1;
  uint16_t* const before = static_cast<uint16_t*>(c.z.data());
  before[0] = 0x8000;   // −0
  before[40] = 0xfe01;  // a NaN that no conversion makes
  const Case done = run_and_check(c);
  const uint16_t* const after = static_cast<uint16_t*>(done.z.data());
  check(std::equal(before, before + 16, after) && std::equal(before + 32, before + 64, after + 32), "it wrote");
}

void test_bad_entries() {
  begin_test("bad heads and scales are NaN and write nothing; bad bounds mean no entries");
  Case c = make_case(DType::float32, {6, 2, 3}, 5, 12);
  c.head[0] = -1, c.head[1] = 5, c.head[2] = 1 << 30;
  c.scale[3] = static_cast<float>(kNaN), c.scale[4] = static_cast<float>(kInfinity);
  const Case after = run_and_check(c);
  for (int i = 0; i < 5; ++i) check(std::isnan(after.z_norm[i]), "entry %d has a norm", i);
  for (const auto& bounds : std::vector<std::vector<int>>{{0, 12, 1, 3}, {-1, 2, 4, 12}, {0, 2, 1 << 30, 11}}) {
    std::copy(bounds.begin(), bounds.end(), c.ptr.begin());
    run_and_check(c);
  }
}

void test_nothing_to_do() {
  begin_test("nothing to do");
  run_and_check(make_case(DType::float32, {}, 4, 8));
  run_and_check(make_case(DType::float32, {0, 0}, 4, 8));
}

void test_replay() {
  begin_test("one set of buffers, another plan at each launch; entries beyond the last row are not read");
  Case c = make_case(DType::float32, {8, 8, 8}, 6, 20);
  for (const auto& bounds : std::vector<std::vector<int>>{{0, 1, 1, 7}, {0, 0, 0, 0}, {0, 8, 20, 24}}) {
    std::copy(bounds.begin(), bounds.end(), c.ptr.begin());
    for (int i = 0; i < 24; ++i) c.head[i] = i < bounds[3] ? (5 * i + bounds[3]) % 6 : 1 << 30;
    std::fill(c.z_norm.begin(), c.z_norm.end(), __uint_as_float(~0u));
    const Case before = c;
    check(launch(c.args(), nullptr) == cudaSuccess, "launch failed");
    check_definition(before, c);
  }
}

}  // namespace
}  // namespace steerserve

int main() {
  using namespace steerserve;
  test_shapes_and_types();
  test_repeated_heads_apply_in_order();
  test_a_scale_of_one_does_not_write();
  test_bad_entries();
  test_nothing_to_do();
  test_replay();
  return simt::finish();
}
