#include "cpu/product.h"

#include <algorithm>

namespace steerserve {

int64_t panel_size(const Packing& packing, int64_t num_rows, int64_t d, DType w_type) {
  // A panel and a batch that meets it are read equally often when they are equally large; but a panel must stay in the
  // second-level cache, and less than the least is all overhead.
  constexpr int64_t kMinBytes = 256 << 10, kMaxBytes = 768 << 10, kMaxSize = 256;
  const int64_t bytes = std::clamp(packing.size(num_rows, d), kMinBytes, kMaxBytes);
  const int64_t row_bytes = std::max<int64_t>(d, 1) * (w_type == DType::float32 ? 4 : 2);
  return std::clamp(bytes / row_bytes / packing.granule * packing.granule, packing.granule, kMaxSize);
}

int64_t first_feature(const Packing& packing, int64_t num_features, int thread, int team) {
  const int64_t num_granules = (num_features + packing.granule - 1) / packing.granule;
  return std::min(num_granules * thread / team * packing.granule, num_features);
}

}  // namespace steerserve
