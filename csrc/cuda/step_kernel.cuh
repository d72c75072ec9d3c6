// The kernel: how a launch carries its table of tensors, how a block finds its chunk of one, and
// how a thread updates elements of it.
#pragma once

#include "../rules/ema.h"
#include "../rules/sgd.h"
#include "../tensor_list.h"
#include "dtypes.cuh"
#include "multi_tensor_apply.h"

namespace fused_opt::cuda {

constexpr int kThreads = 256;

// The hyper-parameters of a group, in the type that is computed in.
template <typename T>
struct DeviceGroup {
  rules::SgdRule<T> sgd;
  rules::EmaRule<T> ema;
  const double* device_lr;  // overrides the rule's learning rate if not null
  bool reset_grads;
};

// The table of a launch travels in its kernel parameters, so a step copies nothing to the device
// and may be captured in a graph. Arrays by field, since a row of 45 bytes would be padded to 48.
template <typename T, int kBytes, int kGroups_>
struct LaunchTable {
  static constexpr int kGroups = kGroups_;
  static constexpr int kRowBytes =
      kStreams * sizeof(void*) + sizeof(int64_t) + sizeof(uint32_t) + sizeof(uint8_t);
  static constexpr int kRows =
      (kBytes - kGroups * int(sizeof(DeviceGroup<T>)) - 2 * int(sizeof(int64_t))) / kRowBytes;

  void* data[kStreams][kRows];
  int64_t numel[kRows];
  DeviceGroup<T> groups[kGroups];
  int32_t rows;
  uint32_t first_chunk[kRows];
  uint8_t group[kRows];
};

// CUDA 12.1 raised the limit of kernel parameters from 4 KB to 32,764 bytes. The launch copies all
// of them, so short lists use the small table.
template <typename T>
using SmallTable = LaunchTable<T, 4096, 4>;
template <typename T>
using LargeTable = LaunchTable<T, 32764, 16>;
static_assert(sizeof(SmallTable<float>) <= 4096 && sizeof(SmallTable<double>) <= 4096);
static_assert(sizeof(LargeTable<float>) <= 32764 && sizeof(LargeTable<double>) <= 32764);

// The last row whose chunks begin at or before this one.
template <typename Table>
__device__ __forceinline__ int row_of(const Table& table, uint32_t chunk) {
  int low = 0, high = table.rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Elements before the first at which every stream is aligned for vectors of N elements, or -1 if
// there is none: streams of different alignment never reach it together.
template <int N, typename... E>
__device__ __forceinline__ int unaligned_head(const E*... streams) {
#pragma unroll
  for (int head = 0; head < N; ++head) {
    if ((((reinterpret_cast<uintptr_t>(streams) + head * sizeof(E)) % kVectorBytes == 0 ||
          streams == nullptr) &&
         ...)) {
      return head;
    }
  }
  return -1;
}

// One row as typed pointers; absent streams are null.
template <typename P, typename G, typename S>
struct Streams {
  P* param;
  G* grad;
  P* momentum;
  S* shadow;
};

// Updates N elements from element i on. All loads are issued before the first use.
template <int N, typename T, typename P, typename G, typename S>
__device__ __forceinline__ void update(const Streams<P, G, S>& streams, const DeviceGroup<T>& group,
                                       int64_t i) {
  Pack<P, N> param = load<P, N>(streams.param + i);
  Pack<G, N> grad{};
  Pack<P, N> momentum{};
  Pack<S, N> shadow{};
  if (streams.grad) grad = load<G, N>(streams.grad + i);
  if (streams.momentum) momentum = load<P, N>(streams.momentum + i);
  if (streams.shadow) shadow = load<S, N>(streams.shadow + i);

  if (streams.grad) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      T p = widen(param.values[k]);
      const T g = widen(grad.values[k]);
      if (streams.momentum) {
        T v = widen(momentum.values[k]);
        group.sgd.update(p, g, v);
        narrow(v, momentum.values[k]);
      } else {
        group.sgd.update(p, g);
      }
      narrow(p, param.values[k]);
    }
    store<P, N>(streams.param + i, param);
    if (streams.momentum) store<P, N>(streams.momentum + i, momentum);
    if (group.reset_grads) store<G, N>(streams.grad + i, Pack<G, N>{});
  }
  if (streams.shadow) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      T s = widen(shadow.values[k]);
      group.ema.update(s, T(widen(param.values[k])));  // the parameter as stored
      narrow(s, shadow.values[k]);
    }
    store<S, N>(streams.shadow + i, shadow);
  }
}

template <typename P, typename G, typename S, typename Table>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ Table table) {
  using T = Compute<P>;
  constexpr int kSmallest = sizeof(P) < sizeof(G) ? (sizeof(P) < sizeof(S) ? sizeof(P) : sizeof(S))
                                                  : (sizeof(G) < sizeof(S) ? sizeof(G) : sizeof(S));
  constexpr int N = kVectorBytes / kSmallest;

  const int row = row_of(table, blockIdx.x);
  const Streams<P, G, S> streams = {
      static_cast<P*>(table.data[kParam][row]), static_cast<G*>(table.data[kGrad][row]),
      static_cast<P*>(table.data[kMomentum][row]), static_cast<S*>(table.data[kShadow][row])};
  DeviceGroup<T> group = table.groups[table.group[row]];
  if (group.device_lr) group.sgd.set_lr(T(*group.device_lr));

  // Chunks after the first begin at an aligned element; the first takes the head before it.
  const int64_t numel = table.numel[row];
  const int64_t chunk = blockIdx.x - table.first_chunk[row];
  const int head = unaligned_head<N>(streams.param, streams.grad, streams.momentum, streams.shadow);
  const int64_t shift = head > 0 ? head : 0;
  const int64_t begin = chunk == 0 ? 0 : min(numel, chunk * kChunkElements + shift);
  const int64_t end = min(numel, (chunk + 1) * kChunkElements + shift);

  if (head < 0) {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) update<1>(streams, group, i);
    return;
  }
  const int64_t first = chunk == 0 ? min(shift, end) : begin;
  const int64_t last = first + (end - first) / N * N;
  for (int64_t i = begin + threadIdx.x; i < first; i += kThreads) update<1>(streams, group, i);
  for (int64_t i = first + threadIdx.x * N; i < last; i += kThreads * N) {
    update<N>(streams, group, i);
  }
  for (int64_t i = last + threadIdx.x; i < end; i += kThreads) update<1>(streams, group, i);
}

}  // namespace fused_opt::cuda
