// The CUDA backend: one launch over all tensors (float64 has its own). Needs no torch, no libcuda.
#pragma once

#include <stdexcept>
#include <string>

#include "../tensor_list.h"

namespace fused_opt::cuda {

// A CUDA call that failed. Python adds what to do about it.
struct CudaError : std::runtime_error {
  CudaError(int code_, const std::string& what) : std::runtime_error(what), code(code_) {}
  int code;  // cudaError_t
};

// Enqueues the update of every row on `stream` (a cudaStream_t) of `device`, which must be the
// current device. Does not allocate, copy or synchronise: legal while a graph is captured.
void multi_tensor_apply(const TensorList& list, int device, void* stream);

// What one block updates: enough that finding its row costs nothing beside its bytes, small enough
// that a model fills the last wave of blocks.
inline constexpr int64_t kChunkElements = 8192;

}  // namespace fused_opt::cuda
