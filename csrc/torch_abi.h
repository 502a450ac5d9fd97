// torch's stable C ABI, as far as it is used: prototypes of torch/csrc/inductor/aoti_torch/c/shim.h and
// torch/csrc/stable/c/shim.h, found in the libtorch_cpu that the process has loaded.
//
// An operator registered through it costs about 1 µs a call, output included, from Python as from compiled code. No
// header of torch is used and nothing is linked, so that one build serves every torch that has these symbols.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace steerserve {

// An argument or a result on torch's stack: a handle, an int64_t, a double's bits; of an optional one the address of
// such a value on the heap, or 0.
using StableValue = uint64_t;
using StableKernel = void (*)(StableValue* stack, uint64_t num_arguments, uint64_t num_results);

using TorchTensor = struct TorchTensorOpaque*;
using TorchLibrary = struct TorchLibraryOpaque*;
using TorchStatus = int32_t;  // 0: success

struct TorchAbi {
  TorchStatus (*library_init_impl)(const char* space, const char* dispatch_key, const char* file, uint32_t line,
                                   TorchLibrary*);
  TorchStatus (*library_impl)(TorchLibrary, const char* name, StableKernel);
  TorchStatus (*delete_tensor_object)(TorchTensor);
  TorchStatus (*get_data_ptr)(TorchTensor, void**);
  TorchStatus (*get_dim)(TorchTensor, int64_t*);
  TorchStatus (*get_sizes)(TorchTensor, int64_t**);    // the tensor's own
  TorchStatus (*get_strides)(TorchTensor, int64_t**);  // the tensor's own
  TorchStatus (*get_dtype)(TorchTensor, int32_t*);
  TorchStatus (*empty_strided)(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                               int32_t device_type, int32_t device_index, TorchTensor*);
  TorchStatus (*get_num_threads)(uint32_t*);
  int32_t (*device_type_cpu)();

  // Throws std::runtime_error if torch is not loaded or lacks a symbol.
  static const TorchAbi& instance();
};

inline void check_status(TorchStatus status) {
  if (status != 0) throw std::runtime_error("torch refused a call of its C ABI");
}

// A tensor argument of a kernel, which owns it.
class TensorArgument {
 public:
  explicit TensorArgument(StableValue value) : handle_(reinterpret_cast<TorchTensor>(value)) {}
  ~TensorArgument() { TorchAbi::instance().delete_tensor_object(handle_); }
  TensorArgument(const TensorArgument&) = delete;
  TensorArgument& operator=(const TensorArgument&) = delete;

  // To be checked as one of the operator's arguments.
  Tensor named(const char* name) const;

  int32_t dtype() const;

 private:
  TorchTensor handle_;
};

// A new contiguous tensor of torch's `dtype`, to be written and then released to be a kernel's result.
class NewTensor {
 public:
  NewTensor(const int64_t* sizes, int ndim, int32_t dtype);
  ~NewTensor() {
    if (handle_) TorchAbi::instance().delete_tensor_object(handle_);
  }
  NewTensor(const NewTensor&) = delete;
  NewTensor& operator=(const NewTensor&) = delete;

  void* data() const;

  StableValue release() {
    const auto value = reinterpret_cast<StableValue>(handle_);
    handle_ = nullptr;
    return value;
  }

 private:
  TorchTensor handle_;
};

constexpr int kMaxDims = 64;  // of a tensor of torch

}  // namespace steerserve
