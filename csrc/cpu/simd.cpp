#include "cpu/simd.h"

#include <atomic>
#include <stdexcept>

namespace steerserve {
namespace {

SimdLevel best_level() { return supported_simd_levels().back(); }

std::atomic<SimdLevel>& current_level() {
  static std::atomic<SimdLevel> level{best_level()};
  return level;
}

}  // namespace

SimdLevel simd_level() { return current_level().load(std::memory_order_relaxed); }

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx2:
      return "avx2";
    case SimdLevel::avx512:
      return "avx512";
    default:
      return "scalar";
  }
}

std::vector<SimdLevel> supported_simd_levels() {
  std::vector<SimdLevel> levels{SimdLevel::scalar};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels.push_back(SimdLevel::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    levels.push_back(SimdLevel::avx512);
#endif
  return levels;
}

void set_simd_level(const std::string& name) {
  for (SimdLevel level : supported_simd_levels())
    if (name == simd_level_name(level)) return current_level().store(level);
  throw std::invalid_argument("simd level '" + name + "' is not supported by this CPU");
}

}  // namespace steerserve
