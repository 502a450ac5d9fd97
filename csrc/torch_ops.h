// Operators that torch's dispatcher calls directly, without Python: those that every layer of a model calls. Their
// schemas are declared in Python (steerserve/kernels/linear.py, attend.py); ops.h says what they compute.
#pragma once

namespace steerserve {

// Registers the CPU kernels. Called once.
void register_torch_kernels();

}  // namespace steerserve
