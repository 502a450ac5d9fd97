#include "cpu/sae_encode_amx_kernel.h"

namespace steerserve {

extern const EncodeKernel encode_kernel_amx{kGranule, kGranule, interleaved_size, interleave_rows, encode_features};

}  // namespace steerserve
