// What tests/test_emulator.py asks of the emulator by itself: kernels that keep or break a rule of
// CUDA, and its conversions. Functions return what went wrong, or "".
#include <stdexcept>
#include <string>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "rules/sums.h"

#define FOR_TESTS extern "C" __attribute__((visibility("default")))

namespace fused_opt::cuda {

struct Numbers {
  int numbers[8180];  // a parameter of 32,720 bytes
};
struct TooManyNumbers {
  int numbers[8192];
};

template <typename... Parameters>
cudaError_t start(cudaStream_t stream, unsigned blocks, unsigned threads,
                  void (*kernel)(Parameters...), std::common_type_t<Parameters>... arguments) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  cudaThreadExchangeStreamCaptureMode(&mode);
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), pointers, 0, stream);
}

template <typename Enqueue>
const char* trouble(Enqueue enqueue) {
  static std::string text;
  text.clear();
  try {
    emulator::run_on_stream([&](cudaStream_t stream) {
      const cudaError_t error = enqueue(stream);
      if (error != cudaSuccess) text = cudaGetErrorName(error);
    });
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  return text.c_str();
}

// Each thread passes a number on to the next, round and round.
__global__ void pass_on(int* results, int rounds, bool waits) {
  alignas(16) __shared__ char shared[rules::kLaneBytes];
  int* const numbers = reinterpret_cast<int*>(shared);
  const int thread = threadIdx.x, next = (thread + 1) % 256;
  int own = thread;
  for (int round = 0; round < rounds; ++round) {
    numbers[next] = own;
    if (waits) __syncthreads();
    own = numbers[thread];
    __syncthreads();
  }
  results[blockIdx.x * 256 + thread] = own;
}

__global__ void read_shared(int* results) {
  alignas(16) __shared__ char shared[rules::kLaneBytes];
  results[threadIdx.x] = reinterpret_cast<int*>(shared)[threadIdx.x];
  reinterpret_cast<int*>(shared)[threadIdx.x] = 0;
}

__global__ void diverge(int way) {
  if (way == 0 && threadIdx.x < 32) return;  // fine since compute capability 7.0
  if (way == 1 && threadIdx.x == 40) {
    __syncthreads();
  } else if (way == 2 && threadIdx.x == 40) {
    __shfl_down_sync(0xffffffffu, 1.0f, 1);
  } else {
    __syncthreads();
  }
}

__global__ void shuffle(double* results, unsigned mask, unsigned distance) {
  if (!(mask >> threadIdx.x % 32 & 1)) return;
  results[threadIdx.x] = __shfl_down_sync(mask, double(threadIdx.x), distance);
}

__global__ void record_order(int* results, int* count) {
  if (threadIdx.x == 0) results[(*count)++] = blockIdx.x;
}

__global__ void add_number(Numbers numbers, int* sum) { *sum += numbers.numbers[0]; }
__global__ void take_too_many(TooManyNumbers) {}
__global__ void never_loaded() {}

}  // namespace fused_opt::cuda

using namespace fused_opt::cuda;

FOR_TESTS const char* probe_pass_on(int* results, int blocks, int rounds, bool waits) {
  return trouble(
      [&](auto stream) { return start(stream, blocks, 256, pass_on, results, rounds, waits); });
}
FOR_TESTS const char* probe_read_shared(int* results) {
  return trouble([&](auto stream) { return start(stream, 2, 256, read_shared, results); });
}
FOR_TESTS const char* probe_diverge(int way) {
  return trouble([&](auto stream) { return start(stream, 1, 64, diverge, way); });
}
FOR_TESTS const char* probe_shuffle(double* results, unsigned mask, unsigned distance) {
  return trouble(
      [&](auto stream) { return start(stream, 1, 64, shuffle, results, mask, distance); });
}
FOR_TESTS const char* probe_record_order(int* results, int blocks) {
  int count = 0;
  return trouble(
      [&](auto stream) { return start(stream, blocks, 1, record_order, results, &count); });
}
FOR_TESTS const char* probe_size(unsigned blocks, unsigned threads) {
  return trouble([&](auto stream) { return start(stream, blocks, threads, diverge, 3); });
}
FOR_TESTS const char* probe_too_many_parameters() {
  return trouble([](auto stream) { return start(stream, 1, 1, take_too_many, TooManyNumbers()); });
}
FOR_TESTS const char* probe_unloaded_kernel() {
  return trouble([](auto stream) {
    return cudaLaunchKernel(never_loaded, dim3(1), dim3(1), nullptr, 0, stream);
  });
}
// On a stream of its own, the null stream, or with the capture mode left as it was not.
FOR_TESTS const char* probe_stream(bool null, bool relaxed) {
  return trouble([&](auto stream) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    if (relaxed) cudaThreadExchangeStreamCaptureMode(&mode);
    return start(null ? nullptr : stream, 1, 1, diverge, 0);
  });
}
// A launch has its parameters as they were then, and runs when its stream does.
FOR_TESTS int probe_copies_of_parameters() {
  Numbers numbers;
  int sum = 0;
  const std::string found = trouble([&](auto stream) {
    for (int i = 0; i < 3; ++i) {
      numbers.numbers[0] = i + 1;
      start(stream, 1, 1, add_number, numbers, &sum);
    }
    numbers.numbers[0] = 100;
    cudaLaunchHostFunc(stream, [](void* total) { *static_cast<int*>(total) *= 10; }, &sum);
    start(stream, 1, 1, add_number, numbers, &sum);
    return sum == 0 ? cudaSuccess : cudaErrorInvalidValue;
  });
  return found.empty() ? sum : -1;
}

FOR_TESTS void probe_to_bfloat16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __bfloat16_as_ushort(__float2bfloat16_rn(from[i]));
}
FOR_TESTS void probe_to_float16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __half_as_ushort(__float2half_rn(from[i]));
}
FOR_TESTS void probe_from_bfloat16(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __bfloat162float(__ushort_as_bfloat16(from[i]));
}
FOR_TESTS void probe_from_float16(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __half2float(__ushort_as_half(from[i]));
}
