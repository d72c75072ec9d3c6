// The kernels of clipping: the sums of all chunks, the norm and coefficient that they make, and the
// product of the gradients and that coefficient. rules/sums.h has the order of summation.
#pragma once

#include "../rules/norm.h"
#include "../tensor_list.h"
#include "dtypes.cuh"
#include "step_kernel.cuh"

namespace fused_opt::cuda {

// The gradients of a launch, in its kernel parameters like the tables of a step.
template <int kBytes>
struct GradTable {
  static constexpr int kRowBytes =
      sizeof(void*) + sizeof(int64_t) + sizeof(uint32_t) + sizeof(DType);
  static constexpr int kRows = (kBytes - 2 * int(sizeof(int64_t))) / kRowBytes;

  void* data[kRows];
  int64_t numel[kRows];
  int32_t rows;
  uint32_t first_chunk[kRows];
  DType dtype[kRows];
};

inline constexpr int kOtherArguments = 32;  // bytes that the kernels take besides
using SmallGradTable = GradTable<4096 - kOtherArguments>;
using LargeGradTable = GradTable<32764 - kOtherArguments>;
static_assert(sizeof(SmallGradTable) <= 4096 - kOtherArguments);
static_assert(sizeof(LargeGradTable) <= 32764 - kOtherArguments);

// The lanes that each thread owns, two vectors of 16 bytes.
template <typename T>
inline constexpr int kOwnLanes = rules::kLanes<T> / kThreads;
static_assert(kOwnLanes<float> * sizeof(float) == 2 * kVectorBytes);

// A chunk of one gradient.
struct GradChunk {
  char* data;
  int count;
  DType dtype;

  template <typename Table>
  __device__ __forceinline__ GradChunk(const Table& table, uint32_t block) {
    const int row = row_of(table, block);
    const int64_t begin = int64_t(block - table.first_chunk[row]) * rules::kSumChunk;
    dtype = table.dtype[row];
    data = static_cast<char*>(table.data[row]) + begin * element_size(dtype);
    count = int(min(int64_t(rules::kSumChunk), table.numel[row] - begin));
  }

  __device__ __forceinline__ char* at(int i) const { return data + i * element_size(dtype); }

  // Calls visit(pack, i, k) for the elements from i + k on that fall to lane k of those that the
  // thread owns: all together where they are aligned, and otherwise one at a time.
  template <typename T, typename Visit>
  __device__ __forceinline__ void visit(Visit visit) const {
    constexpr int N = kOwnLanes<T>;
    const bool aligned = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
    for (int i = threadIdx.x * N; i < count; i += rules::kLanes<T>) {
      if (aligned && i + N <= count) {
        Pack<T, N> pack;
        pack.read(at(i), dtype);
        visit(pack, i, 0);
        continue;
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (i + k >= count) break;
        Pack<T, 1> pack;
        pack.read(at(i + k), dtype);
        visit(pack, i, k);
      }
    }
  }
};

// Folds the lanes of all threads, N neighbours in registers of each, into one. Thread 0 has the
// result. Before the next fold all threads have to be through with this one.
template <int N, typename Rule, typename T>
__device__ __forceinline__ T fold_block(const Rule& rule, const T (&own)[N], char* shared) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kThreads * N * int(sizeof(T)) <= rules::kLaneBytes);
  T* const lanes = reinterpret_cast<T*>(shared);
  const int thread = threadIdx.x;
#pragma unroll
  for (int k = 0; k < N; ++k) lanes[thread * N + k] = own[k];
  __syncthreads();
  T far[N];  // lanes that are kThreads apart
#pragma unroll
  for (int k = 0; k < N; ++k) far[k] = lanes[thread + k * kThreads];
  rules::fold<N>(rule, far);
  __syncthreads();
  lanes[thread] = far[0];
  __syncthreads();
  if (thread >= 32) return T(0);
  T near[kWarps];
#pragma unroll
  for (int k = 0; k < kWarps; ++k) near[k] = lanes[thread + k * 32];
  rules::fold<kWarps>(rule, near);
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    rule.join(near[0], __shfl_down_sync(0xffffffffu, near[0], width));
  }
  return near[0];
}

// Folds what `count` chunks have left, every `stride` doubles. Thread 0 has the result.
template <typename Rule>
__device__ __forceinline__ double fold_chunks(const Rule& rule, const double* sums, int64_t count,
                                              int stride, char* shared) {
  constexpr int N = kOwnLanes<double>;
  double own[N] = {};
  for (int64_t i = threadIdx.x * N; i < count; i += rules::kLanes<double>) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (i + k < count) rule.join(own[k], sums[(i + k) * stride]);
    }
  }
  return fold_block(rule, own, shared);
}

template <typename T>
__device__ __forceinline__ double chunk_norm(const GradChunk& chunk, bool infinity, char* shared) {
  const rules::NormRule<T> rule = {infinity};
  T own[kOwnLanes<T>] = {};
  chunk.visit<T>([&](const auto& pack, int, int first) {
    T values[pack.kCount];
    pack.unpack(chunk.dtype, values);
#pragma unroll
    for (int k = 0; k < pack.kCount; ++k) rule.add(own[first + k], values[k]);
  });
  return fold_block(rule, own, shared);
}

// Each block sums a chunk.
template <typename Table>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const __grid_constant__ Table table, bool infinity, double* sums) {
  alignas(16) __shared__ char shared[rules::kLaneBytes];
  const GradChunk chunk(table, blockIdx.x);
  const double sum = chunk.dtype == DType::kFloat64 ? chunk_norm<double>(chunk, infinity, shared)
                                                    : chunk_norm<float>(chunk, infinity, shared);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One block: the sums of all chunks become the norm and the coefficient.
__global__ void __launch_bounds__(kThreads)
    clip_kernel(const double* sums, int64_t count, ClipHyper hyper, double* result) {
  alignas(16) __shared__ char shared[rules::kLaneBytes];
  const rules::NormRule<double> rule = {hyper.infinity};
  const double sum = fold_chunks(rule, sums, count, 1, shared);
  if (threadIdx.x == 0) {
    hyper.read_scalars();
    const rules::ClipRule rule_of_sum(hyper, sum);
    result[0] = rule_of_sum.norm;
    result[1] = rule_of_sum.coefficient;
  }
}

template <typename T>
__device__ __forceinline__ void scale_chunk(const GradChunk& chunk, T coefficient) {
  chunk.visit<T>([&](auto& pack, int i, int first) {
    T values[pack.kCount];
    pack.unpack(chunk.dtype, values);
#pragma unroll
    for (int k = 0; k < pack.kCount; ++k) values[k] *= coefficient;
    pack.pack(chunk.dtype, values);
    pack.write(chunk.at(i + first), chunk.dtype);
  });
}

// Each block multiplies a chunk.
template <typename Table>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ Table table, const double* coefficient) {
  if (*coefficient == 1) return;
  const GradChunk chunk(table, blockIdx.x);
  if (chunk.dtype == DType::kFloat64) return scale_chunk<double>(chunk, *coefficient);
  scale_chunk<float>(chunk, float(*coefficient));
}

}  // namespace fused_opt::cuda
