// What an operation does to one feature. See vec.h for why nothing here may have external linkage.
#pragma once

#include "ops.h"

namespace steerserve {
namespace {

// f' − f; 0 where f is not finite.
inline float edit_of(uint8_t op, float f, float value) {
  if (!__builtin_isfinite(f)) return 0.0f;
  switch (op) {
    case kClamp:
      return f > 0.0f ? value - f : 0.0f;
    case kClampAlways:
      return value - f;
    case kClip:
      return f > value ? value - f : 0.0f;
    case kScale:
      return value * f - f;
    case kAdd:
      return value;
    default:
      return 0.0f;
  }
}

}  // namespace
}  // namespace steerserve
