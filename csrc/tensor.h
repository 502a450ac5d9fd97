// What an operator asks of its tensors before it uses their addresses.
//
// A compiled launch trusts every address, so an address is only to be had from a check. Elements are not looked at
// here: the CPU launches check indices and operands themselves, a GPU reports a bad one as NaN (ops.h).
//
// Tensors are read through DLPack's C exchange interface, which torch offers as a table of functions: some 50 ns a
// tensor, and no header of torch, so that one build serves every torch that has it.
//
// An error starts with the argument's name: TypeError for a dtype, ValueError for everything else.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "ops.h"

namespace steerserve {

// DLPack's ABI, as far as it is used; see https://dmlc.github.io/dlpack.
struct DLDevice {
  int32_t type, id;
  bool operator==(const DLDevice& other) const { return type == other.type && id == other.id; }
};

struct DLDataType {
  uint8_t code, bits;  // code 0 int, 1 uint, 2 float, 4 bfloat, 5 complex, 6 bool
  uint16_t lanes;
  bool operator==(const DLDataType& other) const { return code == other.code && bits == other.bits; }
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;  // in elements; the tensor's own, for as long as it lives
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* previous;
  void *allocate, *to_managed, *from_managed;
  int (*view)(void* py_object, DLTensor* out);  // −1 with a Python error set
};

// Where torch's tensors are read; set once, when the module is loaded.
struct TensorInterface {
  PyTypeObject* type = nullptr;
  const DLPackExchangeAPI* api = nullptr;
  PyObject* is_neg = nullptr;  // the method's name

  static TensorInterface& instance() {
    static TensorInterface interface;
    return interface;
  }

  static void use(pybind11::type tensor_type) {
    const auto capsule = tensor_type.attr("__dlpack_c_exchange_api__");
    void* api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!api) throw pybind11::error_already_set();
    if (static_cast<DLPackExchangeAPI*>(api)->major != 1)
      throw pybind11::import_error("torch's DLPack is not version 1");
    instance() = {reinterpret_cast<PyTypeObject*>(tensor_type.inc_ref().ptr()), static_cast<DLPackExchangeAPI*>(api),
                  PyUnicode_InternFromString("is_neg")};
  }
};

constexpr int32_t kCpu = 1, kCuda = 2;  // types of DLDevice

inline std::string device_name(DLDevice device) {
  if (device.type == kCpu) return "cpu";
  if (device.type == kCuda) return "cuda:" + std::to_string(device.id);
  return "a device of DLPack type " + std::to_string(device.type);
}

inline std::string dtype_name(DLDataType type) {
  switch (type.code) {
    case 0:
      return "torch.int" + std::to_string(type.bits);
    case 1:
      return "torch.uint" + std::to_string(type.bits);
    case 2:
      return "torch.float" + std::to_string(type.bits);
    case 4:
      return "torch.bfloat" + std::to_string(type.bits);
    case 5:
      return "torch.complex" + std::to_string(type.bits);
    case 6:
      return "torch.bool";
    default:
      return "a " + std::to_string(type.bits) + "-bit dtype";
  }
}

inline std::string as_tuple(const int64_t* sizes, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (count == 1 ? ",)" : ")");
}

[[noreturn]] inline void wrong_dtype(const char* name, DLDataType got, const std::string& expected) {
  throw pybind11::type_error(std::string(name) + ": got " + dtype_name(got) + ", expected " + expected);
}

[[noreturn]] inline void wrong(const char* name, const std::string& got, const std::string& expected) {
  throw pybind11::value_error(std::string(name) + ": got " + got + ", expected " + expected);
}

// A named argument of the running call.
class Tensor {
 public:
  Tensor(const char* name, pybind11::handle object) : name_(name) {
    const TensorInterface& torch = TensorInterface::instance();
    if (!PyObject_TypeCheck(object.ptr(), torch.type))
      throw pybind11::type_error(std::string(name) + ": got " + Py_TYPE(object.ptr())->tp_name +
                                 ", expected a torch.Tensor");
    const bool is_readable = torch.api->view(object.ptr(), &view_) == 0;
    if (!is_readable) PyErr_Clear();
    if (!is_readable || (!view_.data && numel()))
      wrong(name,
            pybind11::str(object.attr("layout")).cast<std::string>() + " tensor on " +
                pybind11::str(object.attr("device")).cast<std::string>() + " that cannot be read",
            "a plain strided tensor with memory of its own");
    if (view_.dtype.code == 2 && is_negated(object, torch))
      wrong(name, "a view of negated memory", "memory that holds the values themselves, as resolve_neg() gives");
  }

  Tensor(const char* name, const DLTensor& view) : name_(name), view_(view) {}

  const char* name() const { return name_; }
  DLDevice device() const { return view_.device; }
  int64_t size(int axis) const { return view_.shape[axis]; }
  int64_t stride(int axis) const { return view_.strides[axis]; }
  int64_t row_stride() const { return view_.strides[0]; }
  int ndim() const { return view_.ndim; }
  const int64_t* sizes() const { return view_.shape; }
  std::string shape() const { return "shape " + as_tuple(view_.shape, view_.ndim); }
  int64_t numel() const { return count(0); }

  // The tensor has these dimensions; their sizes define what the others must have.
  const Tensor& dims(const char* names, int ndim) const {
    if (view_.ndim != ndim) wrong(name_, shape(), names);
    return *this;
  }

  // The address, of elements of type T; what is asked of it has been checked.
  template <class T>
  T* at() const {
    const auto address = reinterpret_cast<uintptr_t>(view_.data) + view_.byte_offset;
    const unsigned item = (view_.dtype.bits + 7) / 8;
    if (address % item)
      wrong(name_, "an address that is not a multiple of the element size", std::to_string(item) + "-byte alignment");
    return reinterpret_cast<T*>(address);
  }

  void check_dtype(DLDataType expected) const {
    if (!(view_.dtype == expected)) wrong_dtype(name_, view_.dtype, dtype_name(expected));
  }

  DType float_type(bool also_float16) const {
    if (view_.dtype == DLDataType{2, 32, 1}) return DType::float32;
    if (view_.dtype == DLDataType{4, 16, 1}) return DType::bfloat16;
    if (also_float16 && view_.dtype == DLDataType{2, 16, 1}) return DType::float16;
    wrong_dtype(name_, view_.dtype,
                std::string("torch.float32 or torch.bfloat16") + (also_float16 ? " or torch.float16" : ""));
  }

  DLDataType dtype() const { return view_.dtype; }

  void check_shape(std::initializer_list<int64_t> expected) const {
    const auto size = static_cast<int32_t>(expected.size());
    bool same = view_.ndim == size;
    for (int32_t i = 0; same && i < size; ++i) same = view_.shape[i] == expected.begin()[i];
    if (!same) wrong(name_, shape(), as_tuple(expected.begin(), size));
  }

  // Elements lie side by side from axis `first` on.
  bool is_contiguous_from(int first) const {
    int64_t stride = 1;
    for (int axis = view_.ndim - 1; axis >= first; --axis) {
      if (view_.shape[axis] != 1 && view_.strides[axis] != stride) return numel() == 0;
      stride *= view_.shape[axis];
    }
    return true;
  }

  void check_contiguous() const {
    if (!is_contiguous_from(0)) wrong(name_, "strides " + as_tuple(view_.strides, view_.ndim), "a contiguous tensor");
  }

  // Rows may lie apart, but each is contiguous and none overlaps the next.
  void check_rows() const {
    const bool apart = view_.shape[0] <= 1 || view_.strides[0] >= count(1) || numel() == 0;
    if (!is_contiguous_from(1) || !apart)
      wrong(name_, "strides " + as_tuple(view_.strides, view_.ndim), "contiguous rows that do not overlap");
  }

 private:
  // Such a view's address does not tell that its values are the negatives of what lies there.
  static bool is_negated(pybind11::handle object, const TensorInterface& torch) {
    const auto answer =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(object.ptr(), torch.is_neg));
    if (!answer) throw pybind11::error_already_set();
    return answer.ptr() == Py_True;
  }

  int64_t count(int first) const {
    int64_t product = 1;
    for (int axis = first; axis < view_.ndim; ++axis) product *= view_.shape[axis];
    return product;
  }

  const char* name_;
  DLTensor view_;
};

// The checks of one call, whose tensors all lie where the first one does: on a device of the backend's type.
class Checks {
 public:
  Checks(const Tensor& first, int32_t device_type) : first_(first) {
    if (first.device().type != device_type)
      wrong(first.name(), "a tensor on " + device_name(first.device()), device_type == kCpu ? "cpu" : "cuda");
  }

  // The address of a contiguous tensor.
  template <class T>
  T* tensor(const Tensor& tensor, std::initializer_list<int64_t> shape) const {
    tensor.check_dtype(dtype_of<T>());
    return checked<T>(tensor, shape);
  }

  // The address of contiguous weights, which have the type of `like`.
  const void* weights(const Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> shape) const {
    tensor.check_dtype(like.dtype());
    return checked<const void>(tensor, shape);
  }

  DType weight_type(const Tensor& tensor) const { return tensor.float_type(false); }

  // The address of activations.
  void* rows(const Tensor& tensor, std::initializer_list<int64_t> shape) const {
    tensor.check_shape(shape);
    tensor.check_rows();
    check_device(tensor);
    return tensor.at<void>();
  }

  // GPUs also compute on float16.
  DType row_type(const Tensor& tensor) const { return tensor.float_type(first_.device().type == kCuda); }

 private:
  template <class T>
  static DLDataType dtype_of();

  template <class T>
  T* checked(const Tensor& tensor, std::initializer_list<int64_t> shape) const {
    tensor.check_shape(shape);
    tensor.check_contiguous();
    check_device(tensor);
    return tensor.at<T>();
  }

  void check_device(const Tensor& tensor) const {
    if (!(tensor.device() == first_.device()))
      wrong(tensor.name(), "a tensor on " + device_name(tensor.device()),
            device_name(first_.device()) + ", where " + first_.name() + " is");
  }

  const Tensor& first_;
};

template <>
inline DLDataType Checks::dtype_of<float>() {
  return {2, 32, 1};
}
template <>
inline DLDataType Checks::dtype_of<int32_t>() {
  return {0, 32, 1};
}
template <>
inline DLDataType Checks::dtype_of<uint8_t>() {
  return {1, 8, 1};
}

}  // namespace steerserve
