// How the elements of a stream move, 16 bytes at a time, and become the type that is computed in.
// A stream is of that type T itself, or of one half as wide: bf16 or fp16 beside float, float
// beside double. Which it is, is a run-time property of a row and the same for all threads of a
// block, so that one kernel serves every mixture of dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../tensor_list.h"

namespace fused_opt::cuda {

constexpr int kVectorBytes = 16;  // the widest access of a thread

// The dtype of T itself.
template <typename T>
inline constexpr DType kWide = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

// N neighbouring elements as they lie in memory, in registers. Reading is apart from unpacking, so
// that a thread has all its reads under way before it waits for the first.
//
// N is 1, or what fills two vectors in T and one in a narrow type, or what fills one vector in T
// and then serves no narrow type. Vectors are aligned.
template <typename T, int N>
class Pack {
 public:
  static constexpr int kCount = N;
  static constexpr bool kAlwaysWide = N > 1 && int(sizeof(T)) * N == kVectorBytes;

  __device__ __forceinline__ void read(const char* from, DType dtype) {
    if constexpr (N > 1) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v > 0 && dtype != kWide<T>) break;
        const uint4 vector = reinterpret_cast<const uint4*>(from)[v];
        words_[4 * v] = vector.x, words_[4 * v + 1] = vector.y;
        words_[4 * v + 2] = vector.z, words_[4 * v + 3] = vector.w;
      }
    } else if (dtype == kWide<T>) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) words_[w] = reinterpret_cast<const uint32_t*>(from)[w];
    } else {
      words_[0] = *reinterpret_cast<const Narrow*>(from);
    }
  }

  __device__ __forceinline__ void write(char* to, DType dtype) const {
    if constexpr (N > 1) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v > 0 && dtype != kWide<T>) break;
        reinterpret_cast<uint4*>(to)[v] =
            make_uint4(words_[4 * v], words_[4 * v + 1], words_[4 * v + 2], words_[4 * v + 3]);
      }
    } else if (dtype == kWide<T>) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) reinterpret_cast<uint32_t*>(to)[w] = words_[w];
    } else {
      *reinterpret_cast<Narrow*>(to) = Narrow(words_[0]);
    }
  }

  __device__ __forceinline__ void unpack(DType dtype, T (&values)[N]) const {
    if (kAlwaysWide || dtype == kWide<T>) {
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] = wide(k);
    } else if constexpr (sizeof(T) == sizeof(double)) {
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] = __uint_as_float(words_[k]);
    } else if (dtype == DType::kBFloat16) {
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] = __bfloat162float(__ushort_as_bfloat16(half(k)));
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] = __half2float(__ushort_as_half(half(k)));
    }
  }

  __device__ __forceinline__ void pack(DType dtype, const T (&values)[N]) {
    if (kAlwaysWide || dtype == kWide<T>) {
#pragma unroll
      for (int k = 0; k < N; ++k) set_wide(k, values[k]);
    } else if constexpr (sizeof(T) == sizeof(double)) {
#pragma unroll
      for (int k = 0; k < N; ++k) words_[k] = __float_as_uint(float(values[k]));
    } else if (dtype == DType::kBFloat16) {
#pragma unroll
      for (int k = 0; k < N; ++k) set_half(k, __bfloat16_as_ushort(__float2bfloat16_rn(values[k])));
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) set_half(k, __half_as_ushort(__float2half_rn(values[k])));
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words_[w] = 0;
  }

  // Element k of a 16-bit type, as its bits. To be set in the order of k: an even element clears
  // its neighbour.
  __device__ __forceinline__ uint16_t half(int k) const {
    return uint16_t(words_[k / 2] >> (k % 2 * 16));
  }
  __device__ __forceinline__ void set_half(int k, uint16_t bits) {
    words_[k / 2] = k % 2 ? words_[k / 2] | uint32_t(bits) << 16 : bits;
  }

 private:
  static constexpr int kBytes = N * int(sizeof(T));
  static constexpr int kVectors = kBytes / kVectorBytes;
  static constexpr int kWords = kBytes / int(sizeof(uint32_t));
  static_assert(N == 1 || kVectors == 1 || kVectors == 2);

  // An element of the type half as wide as T, as an integer.
  template <typename, typename = void>
  struct NarrowOf {
    using type = uint16_t;
  };
  template <typename Void>
  struct NarrowOf<double, Void> {
    using type = uint32_t;
  };
  using Narrow = typename NarrowOf<T>::type;

  __device__ __forceinline__ T wide(int k) const {
    if constexpr (sizeof(T) == sizeof(double)) {
      return __hiloint2double(int(words_[2 * k + 1]), int(words_[2 * k]));
    } else {
      return __uint_as_float(words_[k]);
    }
  }
  __device__ __forceinline__ void set_wide(int k, T value) {
    if constexpr (sizeof(T) == sizeof(double)) {
      words_[2 * k] = uint32_t(__double2loint(value));
      words_[2 * k + 1] = uint32_t(__double2hiint(value));
    } else {
      words_[k] = __float_as_uint(value);
    }
  }
  uint32_t words_[kWords];
};

}  // namespace fused_opt::cuda
