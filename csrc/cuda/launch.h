// The operators of ops.h on a GPU, as functions to link against.
//
// They enqueue work on `stream` and return: no memory is allocated, nothing waits, and what is launched depends only
// on the shapes, so a stream that calls them can be captured into a graph, whose replays see the plans of their time.
// A launch that the driver refuses is reported at once; an index out of range is not an error, see ops.h.
#pragma once

#include <driver_types.h>

#include "ops.h"

namespace steerserve {

cudaError_t run(const SteerDeltaArgs& args, cudaStream_t stream);
cudaError_t run(const SaeEncodeArgs& args, cudaStream_t stream);
cudaError_t run(const SaeDecodeArgs& args, cudaStream_t stream);
cudaError_t run(const SaeSpliceArgs& args, cudaStream_t stream);
cudaError_t run(const HeadScaleArgs& args, cudaStream_t stream);

// Size of the workspace that the operator needs, whose contents do not matter.
int64_t sae_encode_workspace_bytes(int64_t num_rows, int64_t d_sae);
int64_t sae_splice_workspace_bytes(int64_t num_rows, int64_t d_sae);

}  // namespace steerserve
