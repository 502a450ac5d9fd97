// Memory for the length of a call, kept for the next one: once the largest call has been seen, none is allocated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace steerserve {

// A stack of memory that belongs to one thread. What is taken lives until the Frame ends in which it was taken.
class Scratch {
 public:
  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

  ~Scratch() {
    for (const Block& block : blocks_) std::free(block.memory);
  }

  // Uninitialised room for `count` elements, on cache lines of its own.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }

  class Frame {
   public:
    explicit Frame(Scratch& scratch) : scratch_(scratch), block_(scratch.block_), used_(scratch.used_) {}
    ~Frame() {
      scratch_.block_ = block_;
      scratch_.used_ = used_;
    }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

   private:
    Scratch& scratch_;
    size_t block_, used_;
  };

 private:
  struct Block {
    void* memory;
    size_t size;
  };

  void* take_bytes(size_t num_bytes) {
    const size_t wanted = (num_bytes + kLine - 1) / kLine * kLine;
    while (block_ < blocks_.size() && used_ + wanted > blocks_[block_].size) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) add_block(wanted);
    void* place = static_cast<char*>(blocks_[block_].memory) + used_;
    used_ += wanted;
    return place;
  }

  // Each block is as large as all before it together, so that there are few.
  void add_block(size_t wanted) {
    size_t size = kFirstBlock;
    for (const Block& block : blocks_) size += block.size;
    if (size < wanted) size = wanted;
    blocks_.reserve(blocks_.size() + 1);
    void* memory = std::aligned_alloc(kLine, size);
    if (!memory) throw std::bad_alloc();
    blocks_.push_back({memory, size});
  }

  static constexpr size_t kLine = 64, kFirstBlock = 1 << 16;
  std::vector<Block> blocks_;
  size_t block_ = 0, used_ = 0;
};

// A row of floats for each thread of a team, each on cache lines of its own.
class ScratchRows {
 public:
  ScratchRows(int num_rows, int64_t d)
      : frame_(Scratch::of_this_thread()),
        stride_((d + 15) / 16 * 16),
        first_(Scratch::of_this_thread().take<float>(num_rows * stride_)) {}

  float* row(int index) const { return first_ + index * stride_; }

 private:
  Scratch::Frame frame_;
  int64_t stride_;
  float* first_;
};

}  // namespace steerserve
