// What csrc/cuda takes from CUDA's header of this name, for the emulator of tests: the language's
// words, the functions of the device, and the runtime. The include path finds it before CUDA's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// The one array of a block, which emulator.cpp defines under the name that kernels know it by.
#define __shared__ extern

// --- the language on the device ------------------------------------------------------------------

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index

struct dim3 : emulator::Index {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : Index{x_, y_, z_} {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

namespace emulator {

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

}  // namespace emulator

inline unsigned __float_as_uint(float value) { return emulator::bits_as<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return emulator::bits_as<float>(bits); }
inline int __double2loint(double value) { return int(emulator::bits_as<uint64_t>(value)); }
inline int __double2hiint(double value) { return int(emulator::bits_as<uint64_t>(value) >> 32); }
inline double __hiloint2double(int high, int low) {
  return emulator::bits_as<double>(uint64_t(unsigned(high)) << 32 | unsigned(low));
}

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::wait_for_block(file, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::shift_down(mask, bits, distance, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// --- the runtime ---------------------------------------------------------------------------------

using cudaStream_t = CUstream_st*;

// With the numbers that CUDA gives them.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorStreamCaptureUnsupported = 900,
};
inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
  }
  return "cudaErrorUnknown";
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaError_t(emulator::error_of("cudaGetDevice"));
}

enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const auto error = cudaError_t(emulator::error_of("cudaThreadExchangeStreamCaptureMode"));
  if (error == cudaSuccess) {
    *mode = cudaStreamCaptureMode(emulator::exchange_capture_mode(*mode));
  }
  return error;
}

struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  return cudaError_t(emulator::load(kernel));
}

namespace emulator {

// The bytes of parameters, each at a multiple of its alignment.
template <typename... Parameters>
constexpr size_t parameter_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) +
            sizeof(Parameters)),
   ...);
  return bytes;
}

template <typename... Parameters, size_t... k>
int launch(void (*kernel)(Parameters...), const Launch& launch, void** arguments,
           CUstream_st* stream, std::index_sequence<k...>) {
  using Copies = std::tuple<Parameters...>;
  const auto copies = std::make_shared<Copies>(*static_cast<const Parameters*>(arguments[k])...);
  return enqueue(launch, stream, [kernel, copies] { kernel(std::get<k>(*copies)...); });
}

}  // namespace emulator

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  const emulator::Launch launch = {reinterpret_cast<const void*>(kernel), grid, block,
                                   emulator::parameter_bytes<Parameters...>(), shared_bytes};
  return cudaError_t(emulator::launch(kernel, launch, arguments, stream,
                                      std::index_sequence_for<Parameters...>()));
}

inline cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void*), void* data) {
  return cudaError_t(emulator::enqueue(stream, [=] { function(data); }));
}
