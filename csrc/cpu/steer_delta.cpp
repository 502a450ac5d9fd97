#include "cpu/steer_delta.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/simd.h"

namespace steerserve {
namespace {

// Starting threads costs a few microseconds, which is about this many multiply-adds.
constexpr int64_t kMinWorkForThreads = 1 << 17;

[[noreturn]] void reject(const char* name, int64_t index, const std::string& value, const std::string& expected) {
  throw std::invalid_argument(std::string(name) + "[" + std::to_string(index) + "]: got " + value + ", expected " +
                              expected);
}

void check_ptr(const SteerDeltaArgs& args) {
  const int64_t last = args.num_rows * args.num_stages;
  if (args.ptr[0] != 0) reject("ptr", 0, std::to_string(args.ptr[0]), "0");
  for (int64_t i = 0; i < last; ++i)
    if (args.ptr[i + 1] < args.ptr[i])
      reject("ptr", i + 1, std::to_string(args.ptr[i + 1]), "at least " + std::to_string(args.ptr[i]));
  if (args.ptr[last] != args.nnz)
    reject("ptr", last, std::to_string(args.ptr[last]), std::to_string(args.nnz) + ", the number of entries");
}

void check_entries(const SteerDeltaArgs& args) {
  for (int64_t i = 0; i < args.nnz; ++i) {
    if (args.slot[i] < 0 || args.slot[i] >= args.num_slots)
      reject("slot", i, std::to_string(args.slot[i]),
             "an index into the bank of " + std::to_string(args.num_slots) + " rows");
    if (args.op[i] >= kNumSteerOps)
      reject("op", i, std::to_string(args.op[i]), "a code below " + std::to_string(kNumSteerOps));
    if (!std::isfinite(args.value[i])) reject("value", i, std::to_string(args.value[i]), "a finite number");
  }
}

// A row of floats per thread, each starting on a cache line of its own.
class ScratchRows {
 public:
  ScratchRows(int num_rows, int64_t d)
      : stride_((d + kLine - 1) / kLine * kLine), storage_(d ? num_rows * stride_ + kLine : 0) {}

  float* row(int index) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    const uintptr_t first = (address + kLine * sizeof(float) - 1) / (kLine * sizeof(float)) * (kLine * sizeof(float));
    return reinterpret_cast<float*>(first) + index * stride_;
  }

 private:
  static constexpr int64_t kLine = 16;
  int64_t stride_;
  std::vector<float> storage_;
};

SteerRow select_row_kernel(bool x_is_bf16) {
#if defined(__x86_64__)
  if (simd_level() == SimdLevel::avx512) return steer_row_avx512(x_is_bf16);
  if (simd_level() == SimdLevel::avx2) return steer_row_avx2(x_is_bf16);
#endif
  return steer_row_scalar(x_is_bf16);
}

}  // namespace

void steer_delta(const SteerDeltaArgs& args, int num_threads) {
  check_ptr(args);
  check_entries(args);
  if (args.nnz == 0) return;
  const SteerRow steer_row = select_row_kernel(args.x_is_bf16);
  const bool parallel = args.nnz * args.d >= kMinWorkForThreads;
  const int team = parallel ? static_cast<int>(std::min<int64_t>(num_threads, args.num_rows)) : 1;
  ScratchRows scratch(team, args.x_is_bf16 ? args.d : 0);
  // Chunks of one: rows have unequal numbers of entries.
#pragma omp parallel for schedule(dynamic, 1) num_threads(team) if (team > 1)
  for (int64_t row = 0; row < args.num_rows; ++row) steer_row(args, row, scratch.row(omp_get_thread_num()));
}

}  // namespace steerserve
