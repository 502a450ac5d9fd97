// steerserve.kernels._cuda: the operators on a GPU. A refused launch becomes RuntimeError.
//
// The CUDA runtime is linked statically and finds the driver when it is first called: the module loads anywhere.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "bind_ops.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace steerserve;

namespace {

const char* name_of(const SteerDeltaArgs&) { return "steer_delta"; }
const char* name_of(const SaeEncodeArgs&) { return "sae_encode"; }
const char* name_of(const SaeDecodeArgs&) { return "sae_decode"; }
const char* name_of(const SaeSpliceArgs&) { return "sae_splice"; }
const char* name_of(const HeadScaleArgs&) { return "head_scale"; }

struct Gpu {
  static constexpr int32_t kDeviceType = kCuda;

  template <class Args>
  static void run(const Args& args, int64_t stream) {
    const cudaError_t error = steerserve::run(args, reinterpret_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(name_of(args)) + ": " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
  }
};

cudaError_t count_devices(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  cudaGetLastError();  // or the next launch would report it
  return error;
}

int device_count() {
  int count;
  count_devices(&count);
  return count;
}

std::optional<std::string> unavailable_reason() {
  int count;
  const cudaError_t error = count_devices(&count);
  if (error != cudaSuccess)
    return std::string("no CUDA device: ") + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
  if (count == 0) return "no CUDA device";
  return std::nullopt;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  bind_ops<Gpu>(m);
  m.def("sae_encode_workspace", &sae_encode_workspace_bytes);
  m.def("sae_splice_workspace", &sae_splice_workspace_bytes);
  m.def("device_count", &device_count);
  m.def("unavailable_reason", &unavailable_reason);
}
