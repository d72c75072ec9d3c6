// The kernels of differentiable passes: one chunk of rules/sums.h a block, and the sums of all
// chunks.
#pragma once

#include <utility>

#include "../pass_list.h"
#include "../rules/differentiable.h"
#include "dtypes.cuh"
#include "norm_kernel.cuh"
#include "step_kernel.cuh"

namespace fused_opt::cuda {

// The rows of a launch and their hyper-parameters, in its kernel parameters like the tables of a
// step. What of those is a tensor each block reads from its memory: a chunk takes far longer.
template <typename Pass, int kBytes, int kHypers_>
struct PassTable {
  static constexpr int kStreamsOfPass = Pass::kInputs + Pass::kOutputs;
  static constexpr int kHypers = kHypers_;
  static constexpr int kRowBytes =
      kStreamsOfPass * sizeof(void*) + sizeof(int64_t) + sizeof(uint32_t) + sizeof(uint8_t);
  static constexpr int kRows =
      (kBytes - kHypers * int(sizeof(PassHyper)) - 2 * int(sizeof(int64_t))) / kRowBytes;

  void* data[kStreamsOfPass][kRows];
  int64_t numel[kRows];
  PassHyper hypers[kHypers];
  int32_t rows;
  uint32_t first_chunk[kRows];
  uint8_t hyper[kRows];
};

template <typename Pass>
using SmallPassTable = PassTable<Pass, 4096 - kOtherArguments, 4>;
template <typename Pass>
using LargePassTable = PassTable<Pass, 32764 - kOtherArguments, 64>;

// The elements of a vector that one thread takes, which are also the lanes of a sum that it owns.
template <typename T>
inline constexpr int kPassVector = kVectorBytes / int(sizeof(T));
static_assert(rules::kPassLanes<float> == kThreads * kPassVector<float>);
static_assert(rules::kPassLanes<double> == kThreads * kPassVector<double>);

// The streams of a chunk, in the registers of each thread.
template <typename T, typename Pass>
struct PassChunk {
  static constexpr int kStreamsOfPass = Pass::kInputs + Pass::kOutputs;
  T* data[kStreamsOfPass];
  int count;

  template <typename Table>
  __device__ __forceinline__ PassChunk(const Table& table, int row, uint32_t block) {
    const int64_t begin = int64_t(block - table.first_chunk[row]) * rules::kSumChunk;
#pragma unroll
    for (int s = 0; s < kStreamsOfPass; ++s) {
      T* const start = static_cast<T*>(table.data[s][row]);
      data[s] = start ? start + begin : nullptr;
    }
    count = int(min(int64_t(rules::kSumChunk), table.numel[row] - begin));
  }

  __device__ __forceinline__ bool is_aligned() const {
    bool aligned = true;
#pragma unroll
    for (int s = 0; s < kStreamsOfPass; ++s) {
      aligned = aligned && reinterpret_cast<uintptr_t>(data[s]) % kVectorBytes == 0;
    }
    return aligned;
  }

  // Runs the pass on N elements from element i on, which add to the lanes from `first` on.
  template <bool kWithSums, int N, int kLanesOwned, int... in, int... out, int... sum>
  __device__ __forceinline__ void run(const Pass& pass, int i, int first, T (*lanes)[kLanesOwned],
                                      std::integer_sequence<int, in...>,
                                      std::integer_sequence<int, out...>,
                                      std::integer_sequence<int, sum...>) const {
    T inputs[Pass::kInputs][N], outputs[Pass::kOutputs][N];
    (read(in, i, inputs[in]), ...);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if constexpr (kWithSums) pass.add(inputs[in][k]..., lanes[sum][first + k]...);
      pass.apply(inputs[in][k]..., outputs[out][k]...);
    }
    (write(Pass::kInputs + out, i, outputs[out]), ...);
  }

 private:
  template <int N>
  __device__ __forceinline__ void read(int stream, int i, T (&values)[N]) const {
    if (data[stream] == nullptr) {
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] = T(-0.0);
      return;
    }
    Pack<T, N> pack;
    pack.read(reinterpret_cast<const char*>(data[stream] + i), kWide<T>);
    pack.unpack(kWide<T>, values);
  }

  template <int N>
  __device__ __forceinline__ void write(int stream, int i, const T (&values)[N]) const {
    if (data[stream] == nullptr) return;
    Pack<T, N> pack;
    pack.pack(kWide<T>, values);
    pack.write(reinterpret_cast<char*>(data[stream] + i), kWide<T>);
  }
};

// With sums, writes kPassSums of them for each block.
template <typename T, typename Pass, bool kWithSums, typename Table>
__global__ void __launch_bounds__(kThreads)
    pass_kernel(const __grid_constant__ Table table, double* sums) {
  constexpr int N = kPassVector<T>, kSums = kWithSums ? Pass::kSums : 0;
  using Inputs = std::make_integer_sequence<int, Pass::kInputs>;
  using Outputs = std::make_integer_sequence<int, Pass::kOutputs>;
  using Sums = std::make_integer_sequence<int, kSums>;
  const int row = row_of(table, blockIdx.x);
  PassHyper hyper = table.hypers[table.hyper[row]];
  hyper.read_scalars();
  const Pass pass(hyper);
  const PassChunk<T, Pass> chunk(table, row, blockIdx.x);
  const bool aligned = chunk.is_aligned();
  T lanes[kSums + 1][N] = {};  // one more, since there are no arrays of none
  for (int i = threadIdx.x * N; i < chunk.count; i += kThreads * N) {
    if (aligned && i + N <= chunk.count) {
      chunk.template run<kWithSums, N>(pass, i, 0, lanes, Inputs(), Outputs(), Sums());
      continue;
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (i + k >= chunk.count) break;
      chunk.template run<kWithSums, 1>(pass, i + k, k, lanes, Inputs(), Outputs(), Sums());
    }
  }
  if constexpr (kWithSums) {
    alignas(16) __shared__ char shared[rules::kLaneBytes];
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      if (k > 0) __syncthreads();
      const T sum = fold_block(rules::SumRule<T>(), lanes[k], shared);
      if (threadIdx.x == 0) sums[int64_t(blockIdx.x) * kPassSums + k] = sum;
    }
  }
}

// Where the chunks of each hyper begin, and where those of the last end.
struct BoundsTable {
  static constexpr int kHypers = 500;
  int64_t bounds[kHypers + 1];
};
static_assert(sizeof(BoundsTable) <= 4096 - kOtherArguments);

// Each block makes the sums of a hyper from those of its chunks.
__global__ void __launch_bounds__(kThreads)
    pass_sums_kernel(const __grid_constant__ BoundsTable table, const double* of_chunks,
                     double* results) {
  alignas(16) __shared__ char shared[rules::kLaneBytes];
  const int64_t begin = table.bounds[blockIdx.x], count = table.bounds[blockIdx.x + 1] - begin;
  for (int k = 0; k < kPassSums; ++k) {
    if (k > 0) __syncthreads();
    const double* const own = of_chunks + begin * kPassSums + k;
    const double sum = fold_chunks(rules::SumRule<double>(), own, count, kPassSums, shared);
    if (threadIdx.x == 0) results[blockIdx.x * kPassSums + k] = sum;
  }
}

}  // namespace fused_opt::cuda
