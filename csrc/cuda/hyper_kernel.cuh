// The kernel before a step that depends on numbers which only the device knows: hyper-parameters
// that are tensors, and whether infinite gradients make it skip. One block.
#pragma once

#include "../tensor_list.h"
#include "step_kernel.cuh"

namespace fused_opt::cuda {

// What a launch of it carries in its kernel parameters.
struct HyperTable {
  static constexpr int kGroups = 16, kCounters = 16;

  Group groups[kGroups];
  int64_t* counters[kCounters];
  const float* found_inf;
  DeviceGroup<float>* floats;  // the results, of every group in both types
  DeviceGroup<double>* doubles;
  int32_t group_count, counter_count;
};
static_assert(sizeof(HyperTable) <= 4096);

constexpr int kHyperThreads = 32;

__global__ void __launch_bounds__(kHyperThreads)
    hyper_kernel(const __grid_constant__ HyperTable table) {
  const bool skipped = is_skipped(table.found_inf);
  for (int i = threadIdx.x; i < table.group_count; i += kHyperThreads) {
    Group group = table.groups[i];
    group.read_scalars();
    table.floats[i] = DeviceGroup<float>(group, skipped);
    table.doubles[i] = DeviceGroup<double>(group, skipped);
  }
  if (skipped) return;
  __syncthreads();  // groups may read a counter
  for (int i = threadIdx.x; i < table.counter_count; i += kHyperThreads) ++*table.counters[i];
}

}  // namespace fused_opt::cuda
