// Device memory of a test: a heap block of exactly the size asked for, full of 0xFF (NaN, or −1) until it is written.
//
// Exact, so that ASan sees the first byte beyond; poisoned, so that a result which was not written is not taken for
// one.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <utility>

namespace simt {

template <class T>
class DeviceArray {
 public:
  // The first element lies `offset` bytes behind a multiple of 16.
  explicit DeviceArray(size_t size = 0, size_t offset = 0) : size_(size), offset_(offset) {
    if (size == 0) return;  // a null pointer, which a kernel must not touch
    if (posix_memalign(&block_, 16, offset + num_bytes()) != 0) throw std::bad_alloc();
    std::memset(block_, 0xff, offset + num_bytes());
  }
  DeviceArray(std::initializer_list<T> values) : DeviceArray(values.size()) {
    std::copy(values.begin(), values.end(), begin());
  }
  DeviceArray(const DeviceArray& other) : DeviceArray(other.size_, other.offset_) {
    if (size_ > 0) std::memcpy(begin(), other.begin(), num_bytes());
  }
  DeviceArray(DeviceArray&& other) noexcept { swap(other); }
  DeviceArray& operator=(DeviceArray other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceArray() { std::free(block_); }

  // With element i equal to value(i).
  template <class Value>
  static DeviceArray generate(size_t size, const Value& value) {
    DeviceArray array(size);
    for (size_t i = 0; i < size; ++i) array[i] = static_cast<T>(value(i));
    return array;
  }

  T* begin() const { return reinterpret_cast<T*>(static_cast<char*>(block_) + (block_ ? offset_ : 0)); }
  T* end() const { return begin() + size_; }
  T& operator[](size_t i) const { return begin()[i]; }
  size_t size() const { return size_; }
  size_t num_bytes() const { return size_ * sizeof(T); }

 private:
  void swap(DeviceArray& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(size_, other.size_);
    std::swap(offset_, other.offset_);
  }

  void* block_ = nullptr;
  size_t size_ = 0, offset_ = 0;
};

}  // namespace simt
