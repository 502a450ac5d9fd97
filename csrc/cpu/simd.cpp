#include "cpu/simd.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace steerserve {
namespace {

// Matrix registers are big: the kernel gives them only to a process that asks.
bool request_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned leaf = 7, bf16 = 1u << 22, tile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(leaf, 0, &eax, &ebx, &ecx, &edx) || (edx & (bf16 | tile)) != (bf16 | tile)) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

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
    case SimdLevel::avx512_bf16:
      return "avx512_bf16";
    case SimdLevel::amx:
      return "amx";
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
  if (levels.back() == SimdLevel::avx512 && __builtin_cpu_supports("avx512bf16"))
    levels.push_back(SimdLevel::avx512_bf16);
  if (levels.back() >= SimdLevel::avx512 && request_amx()) levels.push_back(SimdLevel::amx);
#endif
  return levels;
}

void set_simd_level(const std::string& name) {
  for (SimdLevel level : supported_simd_levels())
    if (name == simd_level_name(level)) return current_level().store(level);
  throw std::invalid_argument("simd level '" + name + "' is not supported by this CPU");
}

}  // namespace steerserve
