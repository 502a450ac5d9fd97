// steerserve.kernels._C: every native operator's signature, and nothing else.
//
// Addresses come in as integers and are trusted: the Python wrapper of each operator has checked type, shape and
// strides. No torch header is used, so one build serves every torch. std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/simd.h"
#include "cpu/steer_delta.h"

namespace py = pybind11;
using namespace steerserve;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_steer_delta(uintptr_t x, bool x_is_bf16, int64_t x_row_stride, int64_t num_rows, int64_t d, uintptr_t ptr,
                      int64_t num_stages, uintptr_t slot, uintptr_t op, uintptr_t value, int64_t nnz, uintptr_t W_enc,
                      uintptr_t b_enc, uintptr_t threshold, uintptr_t max_norm, uintptr_t W_dec, int64_t num_slots,
                      uintptr_t activation, uintptr_t edit, uintptr_t x_norm, int num_threads) {
  const SteerDeltaArgs args{
      pointer<void>(x),
      x_is_bf16,
      x_row_stride,
      num_rows,
      d,
      pointer<const int32_t>(ptr),
      num_stages,
      pointer<const int32_t>(slot),
      pointer<const uint8_t>(op),
      pointer<const float>(value),
      nnz,
      pointer<const float>(W_enc),
      pointer<const float>(b_enc),
      pointer<const float>(threshold),
      pointer<const float>(max_norm),
      pointer<const float>(W_dec),
      num_slots,
      pointer<float>(activation),
      pointer<float>(edit),
      pointer<float>(x_norm),
  };
  steer_delta(args, num_threads);
}

std::vector<std::string> supported_names() {
  std::vector<std::string> names;
  for (SimdLevel level : supported_simd_levels()) names.emplace_back(simd_level_name(level));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("steer_delta", &bind_steer_delta, py::call_guard<py::gil_scoped_release>());
  m.def("simd_level", [] { return simd_level_name(simd_level()); });
  m.def("supported_simd_levels", &supported_names);
  m.def("set_simd_level", &set_simd_level);
}
