// Which instruction set the kernels use: the best one of this CPU, unless a test asks for a lesser one.
#pragma once

#include <string>
#include <vector>

namespace steerserve {

enum class SimdLevel { scalar, avx2, avx512, avx512_bf16, amx };

// The level in use.
SimdLevel simd_level();

// Name of a level: "scalar", "avx2", "avx512", "avx512_bf16" (and products of pairs of bfloat16) or "amx" (and of
// matrices of them).
const char* simd_level_name(SimdLevel level);

// The levels that this build and this CPU can run, least first.
std::vector<SimdLevel> supported_simd_levels();

// Use `name` from now on, in all threads. Throws std::invalid_argument if it is not supported here.
void set_simd_level(const std::string& name);

}  // namespace steerserve
