#include "cpu/kernels.h"

#include "cpu/simd.h"

namespace steerserve {

const Kernels& kernels() {
#if defined(__x86_64__)
  if (simd_level() >= SimdLevel::avx512) return kernels_avx512;
  if (simd_level() == SimdLevel::avx2) return kernels_avx2;
#endif
  return kernels_scalar;
}

}  // namespace steerserve
