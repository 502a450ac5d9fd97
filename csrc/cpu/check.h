// Checks of indices and operands that only the backend can read, shared by the launches.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace steerserve {

[[noreturn]] inline void reject(const char* name, int64_t index, const std::string& value,
                                const std::string& expected) {
  throw std::invalid_argument(std::string(name) + "[" + std::to_string(index) + "]: got " + value + ", expected " +
                              expected);
}

// `ptr` cuts the first entries of a list of `num_entries` into `num_segments` consecutive segments.
inline void check_offsets(const char* name, const int32_t* ptr, int64_t num_segments, int64_t num_entries) {
  if (ptr[0] != 0) reject(name, 0, std::to_string(ptr[0]), "0");
  for (int64_t i = 1; i <= num_segments; ++i) {
    if (ptr[i] < ptr[i - 1]) reject(name, i, std::to_string(ptr[i]), "at least " + std::to_string(ptr[i - 1]));
    if (ptr[i] > num_entries)
      reject(name, i, std::to_string(ptr[i]), "at most " + std::to_string(num_entries) + ", the number of entries");
  }
}

inline void check_index(const char* name, int64_t i, int32_t index, int64_t size) {
  if (index < 0 || index >= size) reject(name, i, std::to_string(index), "an index below " + std::to_string(size));
}

// Entry `i` of a plan.
inline void check_edit(const uint8_t* op, const float* value, int64_t i) {
  if (op[i] >= kNumSteerOps) reject("op", i, std::to_string(op[i]), "a code below " + std::to_string(kNumSteerOps));
  if (!std::isfinite(value[i])) reject("value", i, std::to_string(value[i]), "a finite number");
}

}  // namespace steerserve
