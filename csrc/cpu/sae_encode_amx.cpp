#include "cpu/sae_encode_amx_kernel.h"

namespace steerserve {

extern const EncodeKernel encode_kernel_amx{
    {kGranule, kGranule, interleaved_size}, pack_for_amx, encode_features_with_amx};

}  // namespace steerserve
