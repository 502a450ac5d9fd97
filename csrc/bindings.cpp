// steerserve.kernels._C: the operators on the CPU. std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention_states.h"
#include "bind_ops.h"
#include "cpu/launch.h"
#include "cpu/simd.h"
#include "torch_ops.h"

namespace py = pybind11;
using namespace steerserve;

namespace {

struct Cpu {
  static constexpr int32_t kDeviceType = kCpu;

  template <class Args>
  static void run(const Args& args, int64_t num_threads) {
    launch(args, static_cast<int>(num_threads));
  }
};

std::vector<std::string> supported_names() {
  std::vector<std::string> names;
  for (SimdLevel level : supported_simd_levels()) names.emplace_back(simd_level_name(level));
  return names;
}

// The handle of a checked state; its tensors must outlive it.
int64_t open_attention(Object k_cache_, Object v_cache_, Object block_table_, Object row_, Object position_) {
  const Tensor k_cache("k_cache", k_cache_), v_cache("v_cache", v_cache_), block_table("block_table", block_table_),
      row("row", row_), position("position", position_);
  const Checks check(k_cache, kCpu);
  AttentionState state;
  state.num_blocks = k_cache.dims("[num_blocks, kv_heads, block_size, d_head]", 4).size(0);
  state.num_kv_heads = k_cache.size(1);
  state.block_size = k_cache.size(2);
  state.d_head = k_cache.size(3);
  const auto shape = {state.num_blocks, state.num_kv_heads, state.block_size, state.d_head};
  for (int64_t size : shape)
    if (size == 0) wrong("k_cache", k_cache.shape(), "no empty dimension");
  state.type = check.weight_type(k_cache);
  state.k_cache = const_cast<void*>(check.weights(k_cache, k_cache, shape));
  state.v_cache = const_cast<void*>(check.weights(v_cache, k_cache, shape));
  state.num_rows = block_table.dims("[R, max_blocks]", 2).size(0);
  state.max_blocks = block_table.size(1);
  state.block_table = check.tensor<int32_t>(block_table, {state.num_rows, state.max_blocks});
  state.max_tokens = row.dims("[T]", 1).size(0);
  state.row = check.tensor<int32_t>(row, {state.max_tokens});
  state.position = check.tensor<int32_t>(position, {state.max_tokens});
  return open_attention_state(state);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_ops<Cpu>(m);
  m.def("register_torch_kernels", &register_torch_kernels);
  m.def("open_attention", &open_attention);
  m.def("close_attention", &close_attention_state);
  m.def("simd_level", [] { return simd_level_name(simd_level()); });
  m.def("supported_simd_levels", &supported_names);
  m.def("set_simd_level", &set_simd_level);
}
