#include "torch_abi.h"

#include <dlfcn.h>

#include <iterator>
#include <stdexcept>

namespace steerserve {
namespace {

// The symbols found, one by one.
class LoadedTorch {
 public:
  LoadedTorch() : library_(dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY)) {
    if (!library_) throw std::runtime_error("torch is not loaded: import it first");
  }

  template <class Function>
  void find(const char* name, Function& function) const {
    function = reinterpret_cast<Function>(dlsym(library_, name));
    if (!function) throw std::runtime_error(std::string("this torch has no ") + name);
  }

 private:
  void* library_;
};

// How torch numbers the types that DLPack describes.
struct TypeNumber {
  int32_t number;
  DLDataType type;
};

struct TypeNumbers {
  TypeNumber all[10];

  explicit TypeNumbers(const LoadedTorch& torch) {
    constexpr struct {
      const char* symbol;
      DLDataType type;
    } known[] = {
        {"aoti_torch_dtype_float32", {2, 32, 1}}, {"aoti_torch_dtype_bfloat16", {4, 16, 1}},
        {"aoti_torch_dtype_float16", {2, 16, 1}}, {"aoti_torch_dtype_float64", {2, 64, 1}},
        {"aoti_torch_dtype_int8", {0, 8, 1}},     {"aoti_torch_dtype_int16", {0, 16, 1}},
        {"aoti_torch_dtype_int32", {0, 32, 1}},   {"aoti_torch_dtype_int64", {0, 64, 1}},
        {"aoti_torch_dtype_uint8", {1, 8, 1}},    {"aoti_torch_dtype_bool", {6, 8, 1}},
    };
    static_assert(std::size(known) == std::size(decltype(all){}));
    for (size_t i = 0; i < std::size(known); ++i) {
      int32_t (*number)();
      torch.find(known[i].symbol, number);
      all[i] = {number(), known[i].type};
    }
  }
};

DLDataType type_of(int32_t number) {
  static const TypeNumbers numbers{LoadedTorch()};
  for (const TypeNumber& each : numbers.all)
    if (each.number == number) return each.type;
  return {3, 0, 1};  // opaque
}

TorchAbi find_all() {
  const LoadedTorch torch;
  TorchAbi abi;
  torch.find("aoti_torch_library_init_impl", abi.library_init_impl);
  torch.find("aoti_torch_library_impl", abi.library_impl);
  torch.find("aoti_torch_delete_tensor_object", abi.delete_tensor_object);
  torch.find("aoti_torch_get_data_ptr", abi.get_data_ptr);
  torch.find("aoti_torch_get_dim", abi.get_dim);
  torch.find("aoti_torch_get_sizes", abi.get_sizes);
  torch.find("aoti_torch_get_strides", abi.get_strides);
  torch.find("aoti_torch_get_dtype", abi.get_dtype);
  torch.find("aoti_torch_empty_strided", abi.empty_strided);
  torch.find("aoti_torch_device_type_cpu", abi.device_type_cpu);
  torch.find("torch_get_num_threads", abi.get_num_threads);
  return abi;
}

}  // namespace

const TorchAbi& TorchAbi::instance() {
  static const TorchAbi abi = find_all();
  return abi;
}

Tensor TensorArgument::named(const char* name) const {
  const TorchAbi& torch = TorchAbi::instance();
  DLTensor view{};
  view.device = {kCpu, 0};  // the dispatcher calls CPU kernels with nothing else
  int64_t ndim;
  check_status(torch.get_dim(handle_, &ndim));
  view.ndim = static_cast<int32_t>(ndim);
  check_status(torch.get_sizes(handle_, &view.shape));
  check_status(torch.get_strides(handle_, &view.strides));
  check_status(torch.get_data_ptr(handle_, &view.data));
  view.dtype = type_of(dtype());
  return Tensor(name, view);
}

int32_t TensorArgument::dtype() const {
  int32_t number;
  check_status(TorchAbi::instance().get_dtype(handle_, &number));
  return number;
}

NewTensor::NewTensor(const int64_t* sizes, int ndim, int32_t dtype) {
  const TorchAbi& torch = TorchAbi::instance();
  int64_t strides[kMaxDims], stride = 1;
  for (int axis = ndim; axis-- > 0; stride *= sizes[axis] > 1 ? sizes[axis] : 1) strides[axis] = stride;
  check_status(torch.empty_strided(ndim, sizes, strides, dtype, torch.device_type_cpu(), 0, &handle_));
}

void* NewTensor::data() const {
  void* data;
  check_status(TorchAbi::instance().get_data_ptr(handle_, &data));
  return data;
}

}  // namespace steerserve
