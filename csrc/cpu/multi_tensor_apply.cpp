#include "multi_tensor_apply.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>

#include "kernels.h"

namespace fused_opt::cpu {
namespace {

struct IsaLevel {
  const char* name;
  ChunkKernel kernel;
};

std::vector<IsaLevel> supported_levels() {
  std::vector<IsaLevel> levels = {{"baseline", fused_opt_kernels_baseline}};
#if FUSED_OPT_ISA_LEVELS > 1
  if (__builtin_cpu_supports("x86-64-v3")) {
    levels.push_back({"x86-64-v3", fused_opt_kernels_x86_64_v3});
  }
  if (__builtin_cpu_supports("x86-64-v4")) {
    levels.push_back({"x86-64-v4", fused_opt_kernels_x86_64_v4});
  }
#endif
  return levels;
}

const std::vector<IsaLevel>& levels() {
  static const std::vector<IsaLevel> supported = supported_levels();
  return supported;
}

const IsaLevel*& current_level() {
  static const IsaLevel* current = &levels().back();
  return current;
}

// Below this many elements a second thread costs more to wake than it saves; torch's grain too.
constexpr int64_t kElementsPerThread = 32768;

// What starting a row costs, in elements.
constexpr int64_t kRowCost = 512;

// Where one thread's share ends and the next begins.
struct Position {
  size_t row;
  int64_t element;
};

// Cuts inside a row keep to whole cache lines, so that threads never write to the same one.
constexpr int64_t kCutElements = 64;

Position position_of(int64_t cost, const std::vector<int64_t>& cost_before,
                     const std::vector<TensorRow>& rows) {
  const auto after = std::upper_bound(cost_before.begin(), cost_before.end(), cost);
  const size_t row = after - cost_before.begin() - 1;
  if (row == rows.size()) return {row, 0};
  const int64_t element = (cost - cost_before[row]) / kCutElements * kCutElements;
  return {row, std::min(element, rows[row].numel)};
}

void run(const TensorList& list, Position begin, Position end) {
  const ChunkKernel kernel = current_level()->kernel;
  for (size_t r = begin.row; r < list.rows.size() && r <= end.row; ++r) {
    const TensorRow& row = list.rows[r];
    const int64_t first = r == begin.row ? begin.element : 0;
    const int64_t last = r == end.row ? end.element : row.numel;
    if (first < last) kernel(row, list.groups[row.group], first, last);
  }
}

}  // namespace

void multi_tensor_apply(const TensorList& list, int threads) {
  std::vector<int64_t> cost_before(list.rows.size() + 1, 0);
  for (size_t r = 0; r < list.rows.size(); ++r) {
    cost_before[r + 1] = cost_before[r] + list.rows[r].numel + kRowCost;
  }
  const int64_t cost = cost_before.back();
  threads = int(std::min<int64_t>(threads, cost / kElementsPerThread + 1));
  if (threads <= 1) return run(list, {0, 0}, {list.rows.size(), 0});

#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    const int team = omp_get_num_threads();  // may be fewer than asked for
    run(list, position_of(cost * thread / team, cost_before, list.rows),
        position_of(cost * (thread + 1) / team, cost_before, list.rows));
  }
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const IsaLevel& level : levels()) names.push_back(level.name);
  return names;
}

std::string isa_level() { return current_level()->name; }

void set_isa_level(const std::string& name) {
  for (const IsaLevel& level : levels()) {
    if (level.name == name) {
      current_level() = &level;
      return;
    }
  }
  throw std::invalid_argument("this machine or build has no CPU level named '" + name + "'");
}

}  // namespace fused_opt::cpu
