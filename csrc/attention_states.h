// The attention states that are open, by handle. A handle is never used twice, so that a stale one is an error.
#pragma once

#include <cstdint>

#include "ops.h"

namespace steerserve {

int64_t open_attention_state(const AttentionState& state);
void close_attention_state(int64_t handle);

// Throws std::invalid_argument if there is none, or no longer.
AttentionState attention_state(int64_t handle);

}  // namespace steerserve
