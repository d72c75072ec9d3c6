// The CUDA backend: one launch over all tensors (float64 has its own). Needs no torch, no libcuda.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

#include "../pass_list.h"
#include "../tensor_list.h"

namespace fused_opt::cuda {

// A CUDA call that failed. Python adds what to do about it.
struct CudaError : std::runtime_error {
  CudaError(int code_, const std::string& what) : std::runtime_error(what), code(code_) {}
  int code;  // cudaError_t
};

// Enqueues the update of every row on `stream` (a cudaStream_t) of `device`, which must be the
// current device. Does not allocate, copy or synchronise: legal while a graph is captured.
// `memory` on the device, of memory_bytes(), is in use until the step is over.
void multi_tensor_apply(const TensorList& list, int device, void* stream, void* memory);

// What a step needs on the device for numbers that only the device knows; 0 if there are none.
int64_t memory_bytes(const TensorList& list);
// The same for that many groups, and any averages.
int64_t memory_bytes(int groups);

// Enqueues the norm of all gradients and the coefficient that clips them (rules/norm.h), which go
// to result[0] and [1] in device memory; one double for each chunk must follow.
void grad_norm(const TensorList& grads, const ClipHyper& hyper, int device, void* stream,
               double* result);

// Enqueues the product of every gradient and *coefficient; nothing is written where that is 1.
void scale_grads(const TensorList& grads, const double* coefficient, int device, void* stream);

// Enqueues a differentiable pass. Where `sums` is not null, it is memory on the device as for the
// CPU's.
void run_pass(const PassList& list, int device, void* stream, double* sums);

// Enqueues work for a thread of the host, after all that is on the stream. It must not call CUDA.
void run_on_host(std::function<void()> work, void* stream);

// What one block updates: enough that finding its row costs nothing beside its bytes, small enough
// that a model fills the last wave of blocks.
inline constexpr int64_t kChunkElements = 8192;

// The averages whose rules a launch carries. Those of more are kept in memory on the device.
inline constexpr int kTableAverages = 8;

}  // namespace fused_opt::cuda
