// The operators of ops.h on the CPU. Each launch checks indices and operands first and throws std::invalid_argument
// naming the first bad element, in which case nothing has been written; it runs on at most `num_threads` threads and
// allocates nothing once the calling thread's scratch has grown to what the shapes need.
#pragma once

#include "ops.h"

namespace steerserve {

void launch(const SteerDeltaArgs& args, int num_threads);
void launch(const SaeEncodeArgs& args, int num_threads);
void launch(const SaeDecodeArgs& args, int num_threads);
void launch(const SaeSpliceArgs& args, int num_threads);
void launch(const HeadScaleArgs& args, int num_threads);
void launch(const LinearArgs& args, int num_threads);
void launch(const AttendArgs& args, int num_threads);

}  // namespace steerserve
