#include "attention_states.h"

#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace steerserve {
namespace {

struct OpenStates {
  std::mutex mutex;
  std::unordered_map<int64_t, AttentionState> by_handle;
  int64_t last_handle = 0;
};

// Never destroyed: Python objects may be closed after the end of main.
OpenStates& open_states() {
  static auto* states = new OpenStates;
  return *states;
}

}  // namespace

int64_t open_attention_state(const AttentionState& state) {
  OpenStates& states = open_states();
  const std::lock_guard lock(states.mutex);
  states.by_handle.emplace(++states.last_handle, state);
  return states.last_handle;
}

void close_attention_state(int64_t handle) {
  OpenStates& states = open_states();
  const std::lock_guard lock(states.mutex);
  states.by_handle.erase(handle);
}

AttentionState attention_state(int64_t handle) {
  OpenStates& states = open_states();
  const std::lock_guard lock(states.mutex);
  const auto found = states.by_handle.find(handle);
  if (found == states.by_handle.end())
    throw std::invalid_argument("state: got " + std::to_string(handle) + ", expected the handle of an open state");
  return found->second;
}

}  // namespace steerserve
