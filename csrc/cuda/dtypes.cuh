// The element types of a stream on the device, how they convert to the type that is computed in,
// and how they move: 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fused_opt::cuda {

template <typename E>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename E>
using Compute = typename ComputeType<E>::type;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

__device__ __forceinline__ void narrow(float value, float& out) { out = value; }
__device__ __forceinline__ void narrow(double value, double& out) { out = value; }
__device__ __forceinline__ void narrow(double value, float& out) { out = float(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void narrow(float value, __half& out) { out = __float2half_rn(value); }

constexpr int kVectorBytes = 16;  // the widest access of a thread

// N neighbouring elements in registers, as they lie in memory.
template <typename E, int N>
struct alignas(N * sizeof(E) < kVectorBytes ? sizeof(E) : kVectorBytes) Pack {
  E values[N];
};

// Where N elements fill whole 16-byte words, `from` is aligned to one; elsewhere N is 1.
template <typename E, int N>
__device__ __forceinline__ Pack<E, N> load(const E* from) {
  Pack<E, N> pack;
  if constexpr (N * sizeof(E) % kVectorBytes == 0) {
#pragma unroll
    for (int w = 0; w < int(N * sizeof(E) / kVectorBytes); ++w) {
      reinterpret_cast<uint4*>(&pack)[w] = reinterpret_cast<const uint4*>(from)[w];
    }
  } else {
    static_assert(N == 1);
    pack.values[0] = *from;
  }
  return pack;
}

template <typename E, int N>
__device__ __forceinline__ void store(E* to, const Pack<E, N>& pack) {
  if constexpr (N * sizeof(E) % kVectorBytes == 0) {
#pragma unroll
    for (int w = 0; w < int(N * sizeof(E) / kVectorBytes); ++w) {
      reinterpret_cast<uint4*>(to)[w] = reinterpret_cast<const uint4*>(&pack)[w];
    }
  } else {
    static_assert(N == 1);
    *to = pack.values[0];
  }
}

}  // namespace fused_opt::cuda
