// The operators over whole SAEs are one translation unit: sae_splice launches the kernels of sae_encode.
#include "cuda/launch.h"
#include "cuda/sae_splice.cuh"

namespace steerserve {

cudaError_t run(const SaeEncodeArgs& args, cudaStream_t stream) { return launch(args, stream); }
cudaError_t run(const SaeDecodeArgs& args, cudaStream_t stream) { return launch(args, stream); }
cudaError_t run(const SaeSpliceArgs& args, cudaStream_t stream) { return launch(args, stream); }

int64_t sae_encode_workspace_bytes(int64_t num_rows, int64_t d_sae) { return sae_encode_workspace(num_rows, d_sae); }
int64_t sae_splice_workspace_bytes(int64_t num_rows, int64_t d_sae) { return sae_splice_workspace(num_rows, d_sae); }

}  // namespace steerserve
