// A GPU in the mind of the CPU: streams, launches, and blocks whose threads meet at barriers. For
// tests alone. The headers beside this one spell it as CUDA does, so that csrc/cuda compiles as
// C++; cpu_backend.cpp runs what it has enqueued.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct CUstream_st;  // as CUDA names it

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Of the thread and the block that run. Kernels run one after the other, whoever enqueues them.
extern Index thread_index, block_index;

// What CUDA knows of a launch.
struct Launch {
  const void* kernel;
  Index grid, block;
  size_t parameter_bytes, shared_bytes;
};

// Enqueues a kernel, of which `run` is one thread; returns a cudaError_t.
int enqueue(const Launch& launch, CUstream_st* stream, std::function<void()> run);
// Enqueues a function of the host.
int enqueue(CUstream_st* stream, std::function<void()> work);

// __syncthreads and __shfl_down_sync: a thread waits here for the others of its block or warp, at
// the same line of the source. The bits of `value` are those of an element of up to 8 bytes.
void wait_for_block(const char* file, int line);
uint64_t shift_down(uint32_t mask, uint64_t value, unsigned distance, const char* file, int line);

// A stream of its own for what `enqueue_all(stream)` enqueues, which then runs. Throws
// std::runtime_error where the work breaks a rule of CUDA, or where some of it went elsewhere.
void run_on_stream(const std::function<void(CUstream_st*)>& enqueue_all);

// What the next call of a function of CUDA fails with; 0 where it does not.
int error_of(const char* function);

// cudaThreadExchangeStreamCaptureMode and cudaFuncGetAttributes.
int exchange_capture_mode(int mode);
int load(const void* kernel);

}  // namespace emulator
