#include "cuda/launch.h"
#include "cuda/steer_delta.cuh"

namespace steerserve {

cudaError_t run(const SteerDeltaArgs& args, cudaStream_t stream) { return launch(args, stream); }

}  // namespace steerserve
