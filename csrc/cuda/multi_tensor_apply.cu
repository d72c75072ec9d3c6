#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "hyper_kernel.cuh"
#include "multi_tensor_apply.h"
#include "norm_kernel.cuh"
#include "pass_kernel.cuh"
#include "step_kernel.cuh"

namespace fused_opt::cuda {
namespace {

void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  throw CudaError(status, std::string(cudaGetErrorName(status)) + " while " + doing + ": " +
                              cudaGetErrorString(status));
}

// Loads a kernel on the current device before its first launch: CUDA loads lazily, and loading
// inside a capture would break it unless the capture mode is relaxed.
void preload(const void* kernel, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded.count({kernel, device})) return;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "relaxing the capture mode");
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  check(cudaThreadExchangeStreamCaptureMode(&mode), "restoring the capture mode");
  check(status, "loading the kernel");
  loaded.insert({kernel, device});
}

// Enqueues a kernel. The arguments are those of the kernel, which CUDA copies at once; here they
// are not, for a table is large.
template <typename... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const char* doing, int64_t blocks, int threads,
                   int device, cudaStream_t stream,
                   const std::common_type_t<Parameters>&... arguments) {
  preload(reinterpret_cast<const void*>(kernel), device);
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(threads), pointers, 0, stream),
        doing);
}

constexpr int64_t kMaxBlocks = 0x7fffffff;  // in a grid

int64_t chunks_of(const TensorRow& row) {
  return (row.numel + kChunkElements - 1) / kChunkElements;
}

// The entries of a table that hold the shadows of a row after the first.
int more_entries(const TensorRow& row, const TensorList& list) {
  if (row.data[kShadow] == nullptr) return 0;
  return (int(list.averages.size()) - 1 + kStreams - 1) / kStreams;
}

// Launches rows in tables of one size, as many rows in each as fit.
template <typename T, bool kMixed, bool kMany, typename Table>
class Launcher {
 public:
  Launcher(const TensorList& list, const DeviceRules<T>& on_device, int device, cudaStream_t stream)
      : list_(list), on_device_(on_device), device_(device), stream_(stream), table_(new Table) {
    table_->averages_on_device = on_device.averages;
    table_->averages.count = on_device.averages ? 0 : set_averages();
  }

  void add(const TensorRow& row) {
    const int64_t chunks = chunks_of(row);
    const int more = kMany ? more_entries(row, list_) : 0;
    if (rows_ + more >= Table::kRows || chunks_ + chunks > kMaxBlocks) flush();
    const int slot = slot_of(row.group);
    if (more > 0) add_shadows(row, more);
    for (int s = 0; s < kStreams; ++s) table_->data[s][rows_] = row.data[s];
    table_->numel[rows_] = row.numel;
    table_->first_chunk[rows_] = uint32_t(chunks_);
    table_->group[rows_] = uint8_t(slot);
    if constexpr (Table::kStochastic) table_->ordinal[rows_] = row.ordinal;
    table_->dtypes[rows_] = row.copies ? kCopies : 0;
    for (int s = 0; s < kStreams; ++s) table_->dtypes[rows_] |= uint16_t(row.dtype[s]) << (3 * s);
    chunks_ += chunks;
    ++rows_;
  }

  void flush() {
    if (rows_ == 0) return;
    table_->rows = rows_;
    launch_kernel(step_kernel<T, kMixed, kMany, Table>, "launching the step", chunks_, kThreads,
                  device_, stream_, *table_);
    rows_ = groups_ = 0;
    chunks_ = 0;
    last_group_ = -1;
  }

 private:
  // Puts the rules of all averages into the table and returns their count.
  int set_averages() {
    const rules::AverageRule rule(list_.average_steps);
    int count = 0;
    for (const AverageHyper& average : list_.averages) {
      table_->averages.rules[count++] = rules::EmaRule<T>(rule.decay(average));
    }
    return rule.due ? count : 0;
  }

  // Adds the shadows after the first of the row that comes next: the last entry holds the first of
  // them.
  void add_shadows(const TensorRow& row, int entries) {
    const int count = int(list_.averages.size()) - 1;
    for (int k = 0; k < count; ++k) {
      const int entry = rows_ + entries - 1 - k / kStreams;
      table_->data[k % kStreams][entry] = list_.more_shadows[row.more_shadows + k];
      table_->first_chunk[entry] = uint32_t(chunks_);
    }
    rows_ += entries;
  }

  // The rows of a group follow each other, so only the last slot can be the right one.
  int slot_of(int group) {
    if (group == last_group_) return groups_ - 1;
    if (groups_ == Table::kGroups) flush();
    table_->groups[groups_] = DeviceGroup<T>(list_.groups[group], false);
    if (on_device_.groups != nullptr) table_->groups[groups_].on_device = on_device_.groups + group;
    last_group_ = group;
    return groups_++;
  }

  const TensorList& list_;
  const DeviceRules<T> on_device_;  // null where the host knows all numbers
  const int device_;
  const cudaStream_t stream_;
  const std::unique_ptr<Table> table_;
  int rows_ = 0, groups_ = 0, last_group_ = -1;
  int64_t chunks_ = 0;
};

// Some rows of a list, by what decides on their kernel.
struct Selection {
  std::vector<const TensorRow*> rows;
  int groups = 0, entries = 0;  // that they take in a table
  bool mixed = false, stochastic = false, many = false;
};

// Launches rows in the table that they fill better.
template <typename T, bool kMixed, bool kStochastic, bool kMany>
void launch_as(const Selection& selection, const TensorList& list, const DeviceRules<T>& on_device,
               int device, cudaStream_t stream) {
  const auto run = [&](auto launcher) {
    for (const TensorRow* row : selection.rows) launcher.add(*row);
    launcher.flush();
  };
  using Small = SmallTable<T, kStochastic>;
  using Large = LargeTable<T, kStochastic>;
  if (selection.entries <= Small::kRows && selection.groups <= Small::kGroups) {
    return run(Launcher<T, kMixed, kMany, Small>(list, on_device, device, stream));
  }
  run(Launcher<T, kMixed, kMany, Large>(list, on_device, device, stream));
}

// Launches rows with the kernel that their dtypes need.
template <typename T, bool kMany>
void launch_by_dtypes(const Selection& selection, const TensorList& list,
                      const DeviceRules<T>& on_device, int device, cudaStream_t stream) {
  if (!selection.mixed) {
    return launch_as<T, false, false, kMany>(selection, list, on_device, device, stream);
  }
  // Beside float64 no stream is of a half type.
  if constexpr (kWide<T> == DType::kFloat32) {
    if (selection.stochastic) {
      return launch_as<T, true, true, kMany>(selection, list, on_device, device, stream);
    }
  }
  launch_as<T, true, false, kMany>(selection, list, on_device, device, stream);
}

template <typename T>
bool is_all_wide(const TensorRow& row) {
  for (int s = 0; s < kStreams; ++s) {
    if (row.data[s] != nullptr && row.dtype[s] != kWide<T>) return false;
  }
  return true;
}

// Launches the rows that are computed in T.
template <typename T>
void launch(const TensorList& list, const DeviceRules<T>& on_device, int device,
            cudaStream_t stream) {
  Selection selection;
  for (const TensorRow& row : list.rows) {
    if ((row.dtype[kParam] == DType::kFloat64) != (kWide<T> == DType::kFloat64)) continue;
    const int more = more_entries(row, list);
    selection.groups += selection.rows.empty() || row.group != selection.rows.back()->group;
    selection.entries += 1 + more;
    selection.mixed = selection.mixed || !is_all_wide<T>(row);
    selection.stochastic = selection.stochastic || list.groups[row.group].rounding.stochastic;
    selection.many = selection.many || more > 0;
    selection.rows.push_back(&row);
  }
  const auto run = selection.many ? launch_by_dtypes<T, true> : launch_by_dtypes<T, false>;
  run(selection, list, on_device, device, stream);
}

// Calls launch(table, chunks) with tables of one size, as many gradients in each as fit.
template <typename Table, typename Launch>
void for_each_table(const TensorList& grads, Launch launch) {
  const std::unique_ptr<Table> table(new Table);
  int64_t chunks = 0;
  const auto flush = [&] {
    if (table->rows > 0) launch(*table, chunks);
    table->rows = 0;
    chunks = 0;
  };
  table->rows = 0;
  for (const TensorRow& row : grads.rows) {
    const int64_t more = rules::sum_chunks(row.numel);
    if (table->rows == Table::kRows || chunks + more > kMaxBlocks) flush();
    const int r = table->rows++;
    table->data[r] = row.data[kGrad];
    table->numel[r] = row.numel;
    table->first_chunk[r] = uint32_t(chunks);
    table->dtype[r] = row.dtype[kGrad];
    chunks += more;
  }
  flush();
}

template <typename Table>
void norm_chunks(const TensorList& grads, bool infinity, int device, cudaStream_t stream,
                 double* sums) {
  for_each_table<Table>(grads, [&](const Table& table, int64_t chunks) {
    launch_kernel(norm_kernel<Table>, "launching the norm of gradients", chunks, kThreads, device,
                  stream, table, infinity, sums);
    sums += chunks;
  });
}

template <typename Table>
void scale_chunks(const TensorList& grads, const double* coefficient, int device,
                  cudaStream_t stream) {
  for_each_table<Table>(grads, [&](const Table& table, int64_t chunks) {
    launch_kernel(scale_kernel<Table>, "launching the scaling of gradients", chunks, kThreads,
                  device, stream, table, coefficient);
  });
}

// Launches a pass in tables of one size, as many rows in each as fit. The sums of chunks go to
// `of_chunks`.
template <typename T, typename Pass, bool kWithSums, typename Table>
void launch_pass(const PassList& list, int device, cudaStream_t stream, double* of_chunks) {
  const std::unique_ptr<Table> table(new Table);
  int64_t chunks = 0;
  int hypers = 0;
  uint32_t last_hyper = 0;
  table->rows = 0;
  const auto flush = [&] {
    if (chunks > 0) {
      launch_kernel(pass_kernel<T, Pass, kWithSums, Table>, "launching a pass", chunks, kThreads,
                    device, stream, *table, of_chunks);
      of_chunks += chunks * kPassSums;
    }
    table->rows = hypers = 0;
    chunks = 0;
  };
  for (const PassRow& row : list.rows) {
    const int64_t more = rules::sum_chunks(row.numel);
    if (more == 0) continue;
    bool is_new = hypers == 0 || row.hyper != last_hyper;
    const bool full = table->rows == Table::kRows || (is_new && hypers == Table::kHypers);
    if (full || chunks + more > kMaxBlocks) flush(), is_new = true;
    if (is_new) table->hypers[hypers++] = list.hypers[row.hyper];
    last_hyper = row.hyper;
    const int r = table->rows++;
    for (int s = 0; s < Table::kStreamsOfPass; ++s) table->data[s][r] = row.data[s];
    table->numel[r] = row.numel;
    table->first_chunk[r] = uint32_t(chunks);
    table->hyper[r] = uint8_t(hypers - 1);
    chunks += more;
  }
  flush();
}

template <typename T, typename Pass, bool kWithSums>
void launch_pass_as(const PassList& list, int device, cudaStream_t stream, double* of_chunks) {
  using Small = SmallPassTable<Pass>;
  using Large = LargePassTable<Pass>;
  static_assert(sizeof(Small) <= 4096 - kOtherArguments);
  static_assert(sizeof(Large) <= 32764 - kOtherArguments);
  const bool small = list.rows.size() <= Small::kRows && list.hypers.size() <= Small::kHypers;
  (small ? launch_pass<T, Pass, kWithSums, Small>
         : launch_pass<T, Pass, kWithSums, Large>)(list, device, stream, of_chunks);
}

template <typename T>
void launch_pass_in(const PassList& list, int device, cudaStream_t stream, double* of_chunks) {
  rules::with_pass<T>(list.kind, PassHyper(), [&](const auto& pass) {
    using Pass = std::decay_t<decltype(pass)>;
    if constexpr (Pass::kSums > 0) {
      if (of_chunks) return launch_pass_as<T, Pass, true>(list, device, stream, of_chunks);
    }
    launch_pass_as<T, Pass, false>(list, device, stream, nullptr);
  });
}

// Launches what makes the sums of all hypers from those of chunks.
void launch_sums(const PassList& list, int device, cudaStream_t stream, double* sums,
                 const double* of_chunks) {
  const std::vector<int64_t> bounds = list.chunk_bounds();
  const std::unique_ptr<BoundsTable> table(new BoundsTable);
  const int count = int(list.hypers.size());
  for (int first = 0; first < count; first += BoundsTable::kHypers) {
    const int some = std::min(count - first, BoundsTable::kHypers);
    std::copy_n(bounds.data() + first, some + 1, table->bounds);
    launch_kernel(pass_sums_kernel, "launching the sums of a pass", some, kThreads, device, stream,
                  *table, of_chunks, sums + int64_t(first) * kPassSums);
  }
}

// Launches what reads numbers on the device, for all groups and averages, and counts the step
// there.
void prepare_rules(const TensorList& list, const DeviceRules<float>& floats,
                   const DeviceRules<double>& doubles, int device, cudaStream_t stream) {
  const int groups = int(list.groups.size()), averages = int(list.averages.size());
  const int counters = int(list.gate.counters.size());
  const std::unique_ptr<HyperTable> table(new HyperTable);
  table->average_steps = list.average_steps;
  table->found_inf = list.gate.found_inf;
  table->floats = floats;
  table->doubles = doubles;
  table->all_averages = averages;
  int group = 0, average = 0, counter = 0;
  do {
    table->first_group = group;
    table->group_count = std::min(groups - group, HyperTable::kGroups);
    table->first_average = average;
    table->average_count = std::min(averages - average, HyperTable::kAverages);
    // Groups and averages may read a counter: all of them do before any counter is advanced.
    const bool read_all =
        group + table->group_count == groups && average + table->average_count == averages;
    table->counter_count = read_all ? std::min(counters - counter, HyperTable::kCounters) : 0;
    std::copy_n(list.groups.data() + group, table->group_count, table->groups);
    std::copy_n(list.averages.data() + average, table->average_count, table->averages);
    std::copy_n(list.gate.counters.data() + counter, table->counter_count, table->counters);
    launch_kernel(hyper_kernel, "launching the kernel of hyper-parameters", 1, kHyperThreads,
                  device, stream, *table);
    group += table->group_count;
    average += table->average_count;
    counter += table->counter_count;
  } while (group < groups || average < averages || counter < counters);
}

// What the rules in one type take. It is a multiple of 8 bytes.
template <typename T>
int64_t rules_bytes(int groups) {
  return groups * int64_t(sizeof(DeviceGroup<T>)) + int64_t(sizeof(DeviceAverages<T>));
}

// Places them in memory, and returns where that goes on.
template <typename T>
char* take_rules(char* memory, const TensorList& list, DeviceRules<T>& rules) {
  rules.averages = reinterpret_cast<DeviceAverages<T>*>(memory);
  rules.groups = reinterpret_cast<DeviceGroup<T>*>(memory + sizeof(DeviceAverages<T>));
  return memory + rules_bytes<T>(int(list.groups.size()));
}

void check_device(int device) {
  int current = -1;
  check(cudaGetDevice(&current), "asking for the current device");
  if (current != device) {
    throw std::logic_error("the tensors are on cuda:" + std::to_string(device) +
                           ", but the current device is cuda:" + std::to_string(current));
  }
}

}  // namespace

void multi_tensor_apply(const TensorList& list, int device, void* stream, void* memory) {
  check_device(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  DeviceRules<float> floats = {};
  DeviceRules<double> doubles = {};
  if (memory_bytes(list) > 0) {
    auto* next = static_cast<char*>(memory);
    next = take_rules(next, list, doubles);
    take_rules(next, list, floats);
    prepare_rules(list, floats, doubles, device, queue);
  }
  launch<float>(list, floats, device, queue);
  launch<double>(list, doubles, device, queue);
}

int64_t memory_bytes(int groups) {
  return rules_bytes<float>(groups) + rules_bytes<double>(groups);
}

int64_t memory_bytes(const TensorList& list) {
  bool needed = list.gate.found_inf != nullptr || !list.gate.counters.empty();
  needed = needed || list.average_steps.more_steps != nullptr ||
           int(list.averages.size()) > kTableAverages;
  for (const AverageHyper& average : list.averages)
    needed = needed || average.scalar.data != nullptr;
  for (const Group& group : list.groups) {
    for (const DeviceScalar& scalar : group.scalars) needed = needed || scalar.data != nullptr;
    needed = needed || group.rounding.more_steps != nullptr;
  }
  return needed ? memory_bytes(int(list.groups.size())) : 0;
}

void grad_norm(const TensorList& grads, const ClipHyper& hyper, int device, void* stream,
               double* result) {
  check_device(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const bool small = grads.rows.size() <= SmallGradTable::kRows;
  double* sums = result + 2;
  int64_t chunks = 0;
  for (const TensorRow& row : grads.rows) chunks += rules::sum_chunks(row.numel);
  (small ? norm_chunks<SmallGradTable> : norm_chunks<LargeGradTable>)(grads, hyper.infinity, device,
                                                                      queue, sums);
  launch_kernel(clip_kernel, "launching the kernel of clipping", 1, kThreads, device, queue, sums,
                chunks, hyper, result);
}

void run_pass(const PassList& list, int device, void* stream, double* sums) {
  check_device(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  double* const of_chunks = sums ? sums + list.hypers.size() * kPassSums : nullptr;
  (list.dtype == DType::kFloat64 ? launch_pass_in<double>
                                 : launch_pass_in<float>)(list, device, queue, of_chunks);
  if (sums) launch_sums(list, device, queue, sums, of_chunks);
}

void scale_grads(const TensorList& grads, const double* coefficient, int device, void* stream) {
  check_device(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const bool small = grads.rows.size() <= SmallGradTable::kRows;
  (small ? scale_chunks<SmallGradTable> : scale_chunks<LargeGradTable>)(grads, coefficient, device,
                                                                        queue);
}

void run_on_host(std::function<void()> work, void* stream) {
  auto owned = std::make_unique<std::function<void()>>(std::move(work));
  const auto call = [](void* pointer) {
    const std::unique_ptr<std::function<void()>> work(static_cast<std::function<void()>*>(pointer));
    (*work)();
  };
  check(cudaLaunchHostFunc(static_cast<cudaStream_t>(stream), call, owned.get()),
        "enqueuing work of the host");
  owned.release();  // to the call
}

}  // namespace fused_opt::cuda
