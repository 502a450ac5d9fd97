// steerserve.kernels._C: the operators on the CPU. std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_ops.h"
#include "cpu/launch.h"
#include "cpu/simd.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_ops<Cpu>(m);
  m.def("simd_level", [] { return simd_level_name(simd_level()); });
  m.def("supported_simd_levels", &supported_names);
  m.def("set_simd_level", &set_simd_level);
}
