// The kernel before a step that depends on numbers which only the device knows: hyper-parameters
// that are tensors, and whether infinite gradients make it skip. One block.
#pragma once

#include "../rules/average.h"
#include "../tensor_list.h"
#include "step_kernel.cuh"

namespace fused_opt::cuda {

// The results in one type, in memory on the device: the rules of every group, and of the averages.
template <typename T>
struct DeviceRules {
  DeviceGroup<T>* groups;
  DeviceAverages<T>* averages;
};

// What a launch of it carries in its kernel parameters: all groups and averages, or a part of them.
struct HyperTable {
  static constexpr int kGroups = 14, kAverages = 8, kCounters = 16;

  Group groups[kGroups];
  AverageHyper averages[kAverages];
  int64_t* counters[kCounters];
  AverageSteps average_steps;
  const float* found_inf;
  DeviceRules<float> floats;
  DeviceRules<double> doubles;
  int32_t first_group, group_count, first_average, average_count, all_averages, counter_count;
};
static_assert(sizeof(HyperTable) <= 4096);

constexpr int kHyperThreads = 32;

__global__ void __launch_bounds__(kHyperThreads)
    hyper_kernel(const __grid_constant__ HyperTable table) {
  const bool skipped = is_skipped(table.found_inf);
  for (int i = threadIdx.x; i < table.group_count; i += kHyperThreads) {
    Group group = table.groups[i];
    group.read_scalars();
    table.floats.groups[table.first_group + i] = DeviceGroup<float>(group, skipped);
    table.doubles.groups[table.first_group + i] = DeviceGroup<double>(group, skipped);
  }
  const rules::AverageRule rule(table.average_steps);
  for (int i = threadIdx.x; i < table.average_count; i += kHyperThreads) {
    const double decay = rule.decay(table.averages[i]);
    table.floats.averages->rules[table.first_average + i] = rules::EmaRule<float>(decay);
    table.doubles.averages->rules[table.first_average + i] = rules::EmaRule<double>(decay);
  }
  if (threadIdx.x == 0) {
    const int32_t count = rule.due ? table.all_averages : 0;
    table.floats.averages->count = table.doubles.averages->count = count;
  }
  if (skipped) return;
  __syncthreads();  // groups and averages may read a counter
  for (int i = threadIdx.x; i < table.counter_count; i += kHyperThreads) ++*table.counters[i];
}

}  // namespace fused_opt::cuda
