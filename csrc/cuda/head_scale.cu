#include "cuda/head_scale.cuh"
#include "cuda/launch.h"

namespace steerserve {

cudaError_t run(const HeadScaleArgs& args, cudaStream_t stream) { return launch(args, stream); }

}  // namespace steerserve
