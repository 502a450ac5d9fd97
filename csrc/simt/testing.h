// What the drivers test_*.cpp share: tensors, test data, launches in several thread orders, checks.
//
// Most data are small multiples of powers of two, so that float32 sums are exact in any order and a result must be the
// float64 reference, rounded once: no tolerance hides an error, ties and values equal to a threshold are common.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "ops.h"
#include "simt/memory.h"

namespace simt {

using steerserve::DType;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline const char* name(DType type) {
  return type == DType::float32 ? "float32" : type == DType::bfloat16 ? "bfloat16" : "float16";
}

// ----- data -----

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  int below(int bound) { return static_cast<int>(next() % static_cast<uint64_t>(bound)); }

  // A multiple of 1 / steps, of at most `limit`.
  double dyadic(double limit, int steps) {
    const int most = static_cast<int>(limit * steps);
    return static_cast<double>(below(2 * most + 1) - most) / steps;
  }

  // About normal.
  double real() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += static_cast<double>(next() >> 11) / (uint64_t{1} << 53);
    return sum;
  }

 private:
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  uint64_t state_;
};

// ----- tensors whose type is known at run time -----

class Tensor {
 public:
  // The first element lies `offset` elements behind a multiple of 16 bytes.
  explicit Tensor(DType type = DType::float32, size_t size = 0, size_t offset = 0)
      : type_(type), bytes_(size * element_bytes(type), offset * element_bytes(type)) {}

  static size_t element_bytes(DType type) { return type == DType::float32 ? 4 : 2; }

  DType type() const { return type_; }
  void* data() const { return bytes_.begin(); }
  size_t size() const { return bytes_.size() / element_bytes(type_); }
  const DeviceArray<unsigned char>& bytes() const { return bytes_; }

  double operator[](size_t i) const {
    if (type_ == DType::bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data())[i]);
    if (type_ == DType::float16) return __half2float(static_cast<const __half*>(data())[i]);
    return static_cast<const float*>(data())[i];
  }

  void set(size_t i, double value) const {
    const float rounded = static_cast<float>(value);
    if (type_ == DType::bfloat16) {
      static_cast<__nv_bfloat16*>(data())[i] = __float2bfloat16_rn(rounded);
    } else if (type_ == DType::float16) {
      static_cast<__half*>(data())[i] = __float2half_rn(rounded);
    } else {
      static_cast<float*>(data())[i] = rounded;
    }
  }

  // Zero about a quarter of the time, so that sums cancel and untouched elements show.
  void fill(Random& random, double limit, int steps) const {
    for (size_t i = 0; i < size(); ++i) set(i, random.below(4) == 0 ? 0.0 : random.dyadic(limit, steps));
  }

 private:
  DType type_;
  DeviceArray<unsigned char> bytes_;
};

// `value` as a tensor of that type stores it.
inline double rounded(DType type, double value) {
  const Tensor one(type, 1);
  one.set(0, value);
  return one[0];
}

// ----- checks -----

struct Report {
  std::string test;
  int num_tests = 0, num_checks = 0, num_failures = 0;
};
inline Report report;

__attribute__((format(printf, 2, 3))) inline bool check(bool holds, const char* format, ...) {
  ++report.num_checks;
  if (holds) return true;
  if (++report.num_failures <= 20) {
    std::printf("FAILED %s: ", report.test.c_str());
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf("\n");
  }
  return false;
}

// NaN is expected where `expected` is NaN.
inline bool check_value(const char* what, size_t i, double actual, double expected, double tolerance = 0) {
  const bool same =
      std::isnan(expected) ? std::isnan(actual) : actual == expected || std::abs(actual - expected) <= tolerance;
  return check(same, "%s[%zu] is %.9g, not %.9g (tolerance %.2g)", what, i, actual, expected, tolerance);
}

// The same, for an output that nothing may have written where `expected` is kUnwritten.
constexpr double kUnwritten = -1e300;
inline bool check_output(const char* what, size_t i, float actual, double expected, double tolerance = 0) {
  if (expected != kUnwritten) return check_value(what, i, actual, expected, tolerance);
  return check(to_bits(actual) == 0xffffffff, "%s[%zu] was written: %.9g", what, i, actual);
}

inline void begin_test(const std::string& name) {
  report.test = name;
  ++report.num_tests;
}

// What main returns.
inline int finish() {
  std::printf("%d tests, %d checks, %d failures\n", report.num_tests, report.num_checks, report.num_failures);
  return report.num_failures > 0 || report.num_checks == 0;
}

// ----- running -----

// An array whatever its type.
struct Bytes {
  const void* begin;
  size_t size;

  template <class T>
  Bytes(const DeviceArray<T>& array) : begin(array.begin()), size(array.num_bytes()) {}
  Bytes(const Tensor& tensor) : Bytes(tensor.bytes()) {}

  bool operator==(const Bytes& other) const {
    return size == other.size && (size == 0 || std::memcmp(begin, other.begin, size) == 0);
  }
};

// Under a sanitizer one order is enough, and the one that disturbs most. TSan looks for missing order, which does not
// depend on types and hardly on sizes, and takes its time.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr Order kOrders[] = {Order::random};
#else
constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::random};
#endif
#ifdef __SANITIZE_THREAD__
constexpr bool kAllSizes = false;
#else
constexpr bool kAllSizes = true;
#endif
inline const std::vector<int> kSizes = kAllSizes ? std::vector<int>{1, 7, 64, 130, 296} : std::vector<int>{7, 64};

// `before` after a call, which must give the same bits in every order. A Case is a copyable set of arguments, with
// args() and outputs().
template <class Case>
Case run(const Case& before) {
  std::vector<Case> done;
  for (const Order order : kOrders) {
    set_order(order);
    done.push_back(before);
    const cudaError_t error = launch(done.back().args(), nullptr);
    check(error == cudaSuccess, "launch returned error %d", error);
    const std::vector<Bytes> first = done.front().outputs(), last = done.back().outputs();
    for (size_t i = 0; i < first.size(); ++i)
      check(first[i] == last[i], "output %zu depends on the order in which threads run", i);
  }
  return std::move(done.front());
}

}  // namespace simt
