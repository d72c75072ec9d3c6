// The kernel: how a launch carries its table of tensors, how a block finds its chunk of one, and
// how a thread updates elements of it.
#pragma once

#include "../rules/ema.h"
#include "../rules/master.h"
#include "../rules/rounding.h"
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
  rules::RoundingRule rounding;
  // If not null, to be read in place of all this: what hyper_kernel.cuh has made of numbers that
  // only the device knows.
  const DeviceGroup* on_device;
  bool reset_grads, skipped;

  DeviceGroup() = default;

  FUSED_OPT_HD DeviceGroup(const Group& group, bool skipped_)
      : sgd(group.sgd),
        rounding(group.rounding),
        on_device(nullptr),
        reset_grads(group.reset_grads),
        skipped(skipped_) {}
};

// The rules of the averages, in the type that is computed in.
template <typename T, int kAverages = kMaxAverages>
struct alignas(double) DeviceAverages {
  rules::EmaRule<T> rules[kAverages];
  int32_t count;  // 0 where the step is not due: shadows are then left alone
};

// The table of a launch travels in its kernel parameters, so a step copies nothing to the device
// and may be captured in a graph. Arrays by field, since a row of 55 bytes would be padded to 56.
// With kStochastic_ its rows also have what stochastic rounding is keyed by.
//
// Rows have any number of averages. The shadows after the first are in entries of their own,
// kStreams in each, which lie before the row's and begin at the same chunk, so that row_of never
// finds them.
template <typename T, int kBytes, int kGroups_, bool kStochastic_>
struct LaunchTable {
  static constexpr int kGroups = kGroups_;
  static constexpr bool kStochastic = kStochastic_;
  static constexpr int kRowBytes = kStreams * sizeof(void*) + sizeof(int64_t) + sizeof(uint32_t) +
                                   sizeof(uint16_t) + sizeof(uint8_t) +
                                   (kStochastic ? sizeof(uint32_t) : 0);
  using Averages = DeviceAverages<T, kTableAverages>;
  static constexpr int kRows = (kBytes - kGroups * int(sizeof(DeviceGroup<T>)) -
                                int(sizeof(Averages)) - 3 * int(sizeof(int64_t))) /
                               kRowBytes;

  void* data[kStreams][kRows];
  int64_t numel[kRows];
  DeviceGroup<T> groups[kGroups];
  Averages averages;
  const DeviceAverages<T>* averages_on_device;  // if not null, to be read in place of these
  int32_t rows;
  uint32_t first_chunk[kRows];
  uint32_t ordinal[kStochastic ? kRows : 1];
  uint16_t dtypes[kRows];  // three bits a stream, and whether shadows copy the parameter
  uint8_t group[kRows];
};
static_assert(kDTypes <= 8 && 3 * kStreams < 16);
constexpr uint32_t kCopies = 1u << 15;

// CUDA 12.1 raised the limit of kernel parameters from 4 KB to 32,764 bytes. The launch copies all
// of them, so short lists use the small table.
template <typename T, bool kStochastic = false>
using SmallTable = LaunchTable<T, 4096, 4, kStochastic>;
template <typename T, bool kStochastic = false>
using LargeTable = LaunchTable<T, 32764, 16, kStochastic>;
static_assert(sizeof(SmallTable<float>) <= 4096 && sizeof(SmallTable<double>) <= 4096);
static_assert(sizeof(LargeTable<float>) <= 32764 && sizeof(LargeTable<double>) <= 32764);
static_assert(sizeof(SmallTable<float, true>) <= 4096 && sizeof(LargeTable<float, true>) <= 32764);

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

// One row, in the registers of each thread. An absent stream is null.
template <typename T, bool kMixed>
struct Row {
  char* data[kStreams];
  uint32_t dtypes;

  template <typename Table>
  __device__ __forceinline__ Row(const Table& table, int row) : dtypes(table.dtypes[row]) {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) data[s] = static_cast<char*>(table.data[s][row]);
  }

  __device__ __forceinline__ DType dtype(int stream) const {
    return kMixed ? DType(dtypes >> (3 * stream) & 7) : kWide<T>;
  }

  __device__ __forceinline__ char* at(int stream, int64_t i) const {
    return data[stream] + i * element_size(dtype(stream));
  }

  // Whether every stream is of the type that is computed in.
  __device__ __forceinline__ bool is_all_wide() const {
    bool all = true;
#pragma unroll
    for (int s = 0; s < kStreams; ++s) all = all && (!data[s] || dtype(s) == kWide<T>);
    return all;
  }

  // Elements before the first at which every stream is aligned for vectors of N elements, or -1 if
  // there is none: streams of different alignment never reach it together.
  template <int N>
  __device__ __forceinline__ int unaligned_head() const {
    for (int head = 0; head < N; ++head) {
      bool aligned = true;
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        const auto address = reinterpret_cast<uintptr_t>(at(s, head));
        aligned = aligned && (!data[s] || address % kVectorBytes == 0);
      }
      if (aligned) return head;
    }
    return -1;
  }
};

// The averages of a row. Without kMany there is one, whose rule each thread keeps; with it there
// are further shadows, of the first one's dtype, and their rules are read when they are needed.
template <typename T, bool kMany, typename Table>
class Averages {
 public:
  __device__ __forceinline__ Averages(const Table& table, int row) : table_(table), row_(row) {
    const auto* const on_device = table.averages_on_device;
    count_ = on_device ? on_device->count : table.averages.count;
    if (!kMany) first_ = read_rule(0);
  }

  // Whether the step updates them, and how many there are if it does.
  __device__ __forceinline__ bool due() const { return count_ > 0; }
  __device__ __forceinline__ int count() const { return kMany ? count_ : 1; }

  __device__ __forceinline__ rules::EmaRule<T> rule(int average) const {
    return kMany ? read_rule(average) : first_;
  }

  __device__ __forceinline__ char* shadow(int average) const {
    const int entry = average == 0 ? row_ : row_ - 1 - (average - 1) / kStreams;
    const int stream = average == 0 ? kShadow : (average - 1) % kStreams;
    return static_cast<char*>(table_.data[stream][entry]);
  }

  // Whether a vector that is aligned in the first shadow is aligned in all. A row without shadows
  // has no entries before it to look at.
  __device__ __forceinline__ bool aligned_alike() const {
    if (!kMany || shadow(0) == nullptr) return true;
    const auto offset = [&](int a) { return uintptr_t(shadow(a)) % kVectorBytes; };
    bool alike = true;
    for (int a = 1; a < count_; ++a) alike = alike && offset(a) == offset(0);
    return alike;
  }

 private:
  __device__ __forceinline__ rules::EmaRule<T> read_rule(int average) const {
    if (table_.dtypes[row_] & kCopies) return rules::EmaRule<T>(0);
    const auto* const on_device = table_.averages_on_device;
    return on_device ? on_device->rules[average] : table_.averages.rules[average];
  }

  const Table& table_;
  const int row_;
  int count_;
  rules::EmaRule<T> first_;
};

// Rounds the values of a row to what half types hold exactly, for a pack to store. Here to nearest,
// which the pack does by itself.
template <bool kStochastic>
struct Rounder {
  template <typename Table>
  __device__ __forceinline__ Rounder(const rules::RoundingRule&, const Table&, int, int64_t) {}

  template <typename T, int N>
  __device__ __forceinline__ void round(Stream, DType, int64_t, T (&)[N]) const {}
};

// And here stochastically, where the group asks for it. For elements whose offsets have the same
// upper half as that of element i.
template <>
struct Rounder<true> {
  rules::RoundingRule rule;
  uint32_t ordinal, upper_half;

  template <typename Table>
  __device__ __forceinline__ Rounder(const rules::RoundingRule& rule_, const Table& table, int row,
                                     int64_t i)
      : rule(rule_), ordinal(table.ordinal[row]), upper_half(uint32_t(i >> 32)) {}

  // The values are those of elements from i on.
  template <int N>
  __device__ __forceinline__ void round(Stream stream, DType dtype, int64_t i,
                                        float (&values)[N]) const {
    if constexpr (!Pack<float, N>::kAlwaysWide) {
      if (!rule.stochastic || dtype == DType::kFloat32) return;
      const rules::RoundingKey key = rule.key(ordinal, stream, int64_t(upper_half) << 32);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const uint32_t random = key.random(uint32_t(i) + k);
        values[k] = dtype == DType::kBFloat16 ? rules::round_to_bfloat16(values[k], random)
                                              : rules::round_to_float16(values[k], random);
      }
    }
  }
};

// Reads the numbers that a step updates: the stored parameters or, with a refinement, the exact
// ones.
template <int N, typename T, bool kMixed>
__device__ __forceinline__ void unpack_weights(const Row<T, kMixed>& row, const Pack<T, N>& params,
                                               const Pack<T, N>& refinements, T (&values)[N]) {
  if constexpr (kMixed && sizeof(T) == sizeof(float)) {
    if (row.data[kRefinement] && row.dtype(kRefinement) == kWide<T>) {
      return refinements.unpack(kWide<T>, values);
    }
    if (row.data[kRefinement] && row.dtype(kRefinement) == DType::kInt16) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        values[k] = __uint_as_float(rules::join(params.half(k), refinements.half(k)));
      }
      return;
    }
    params.unpack(row.dtype(kParam), values);
    if (row.data[kRefinement] && row.data[kGrad]) {
      T compensations[N];
      refinements.unpack(row.dtype(kRefinement), compensations);
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] += compensations[k];
    }
  } else {
    params.unpack(row.dtype(kParam), values);
  }
}

// Packs them again, and leaves in them what the average follows: the master where there is one, and
// else the parameters as stored. What a refinement keeps is rounded to nearest.
template <int N, typename T, bool kMixed, bool kStochastic>
__device__ __forceinline__ void pack_weights(const Row<T, kMixed>& row,
                                             const Rounder<kStochastic>& rounder, int64_t i,
                                             Pack<T, N>& params, Pack<T, N>& refinements,
                                             T (&values)[N]) {
  if constexpr (kMixed && sizeof(T) == sizeof(float)) {
    const bool refined = row.data[kRefinement] != nullptr;
    const bool has_master = refined && row.dtype(kRefinement) != row.dtype(kParam);
    if (has_master && row.dtype(kParam) == DType::kBFloat16) {
      uint32_t masters[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        masters[k] = rules::settle(__float_as_uint(values[k]));
        values[k] = __uint_as_float(masters[k]);
        params.set_half(k, rules::param_of(masters[k]));
      }
      if (row.dtype(kRefinement) == kWide<T>) return refinements.pack(kWide<T>, values);
#pragma unroll
      for (int k = 0; k < N; ++k) refinements.set_half(k, rules::residual_of(masters[k]));
      return;
    }
    if (!refined) rounder.round(kParam, row.dtype(kParam), i, values);
    params.pack(row.dtype(kParam), values);
    if (has_master) return refinements.pack(kWide<T>, values);
    T stored[N];
    params.unpack(row.dtype(kParam), stored);
    if (refined) {
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] = rules::compensation_of(values[k], stored[k]);
      refinements.pack(row.dtype(kRefinement), values);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = stored[k];
  } else {
    params.pack(row.dtype(kParam), values);
    params.unpack(row.dtype(kParam), values);
  }
}

// Updates N elements of all shadows of a row, the first of which has been read. While one is
// updated the next is on its way: more of them at once would take more registers than there are.
template <int N, typename T, bool kMixed, bool kStochastic, typename Averages>
__device__ __forceinline__ void update_shadows(const Row<T, kMixed>& row, const Averages& averages,
                                               const Rounder<kStochastic>& rounder, int64_t i,
                                               const T (&params)[N], Pack<T, N> pack) {
  const DType dtype = row.dtype(kShadow);
  const int64_t offset = i * element_size(dtype);
  const int count = averages.count();
#pragma unroll 1
  for (int a = 0; a < count; ++a) {
    T s[N];
    pack.unpack(dtype, s);
    if (a + 1 < count) pack.read(averages.shadow(a + 1) + offset, dtype);
    const rules::EmaRule<T> rule = averages.rule(a);
#pragma unroll
    for (int k = 0; k < N; ++k) rule.update(s[k], params[k]);
    rounder.round(shadow_stream(a), dtype, i, s);
    Pack<T, N> updated;
    updated.pack(dtype, s);
    updated.write(averages.shadow(a) + offset, dtype);
  }
}

// Updates N elements from element i on.
template <int N, typename T, bool kMixed, bool kStochastic, bool kMany, typename Table>
__device__ __forceinline__ void update(const Row<T, kMixed>& row, const DeviceGroup<T>& group,
                                       const Averages<T, kMany, Table>& averages,
                                       const Rounder<kStochastic>& rounder, int64_t i) {
  Pack<T, N> packs[kStreams];
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    if (row.data[s]) packs[s].read(row.at(s, i), row.dtype(s));
  }
  const auto write = [&](Stream stream) {
    packs[stream].write(row.at(stream, i), row.dtype(stream));
  };

  T p[N];
  unpack_weights(row, packs[kParam], packs[kRefinement], p);
  if (row.data[kGrad]) {
    T g[N];
    packs[kGrad].unpack(row.dtype(kGrad), g);
    if (row.data[kMomentum]) {
      T v[N];
      packs[kMomentum].unpack(row.dtype(kMomentum), v);
#pragma unroll
      for (int k = 0; k < N; ++k) group.sgd.update(p[k], g[k], v[k]);
      rounder.round(kMomentum, row.dtype(kMomentum), i, v);
      packs[kMomentum].pack(row.dtype(kMomentum), v);
      write(kMomentum);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) group.sgd.update(p[k], g[k]);
    }
    pack_weights(row, rounder, i, packs[kParam], packs[kRefinement], p);
    write(kParam);
    if (row.data[kRefinement]) write(kRefinement);
    if (group.reset_grads) {
      packs[kGrad].clear();
      write(kGrad);
    }
  }
  if (row.data[kShadow]) update_shadows(row, averages, rounder, i, p, packs[kShadow]);
}

// Updates a chunk of a row, N elements at a time where all streams are aligned.
template <int N, typename T, bool kMixed, bool kMany, typename Table>
__device__ __forceinline__ void update_chunk(const Row<T, kMixed>& row, const DeviceGroup<T>& group,
                                             const Averages<T, kMany, Table>& averages,
                                             const Table& table, int index) {
  const auto rounder_at = [&](int64_t i) {
    return Rounder<Table::kStochastic>(group.rounding, table, index, i);
  };
  const int64_t chunk = blockIdx.x - table.first_chunk[index], numel = table.numel[index];
  // Chunks after the first begin at an aligned element; the first takes the head before it.
  const int head = averages.aligned_alike() ? row.template unaligned_head<N>() : -1;
  const int64_t shift = head > 0 ? head : 0;
  const int64_t begin = chunk == 0 ? 0 : min(numel, chunk * kChunkElements + shift);
  const int64_t end = min(numel, (chunk + 1) * kChunkElements + shift);
  // Random numbers have another key every 2^32 elements, which is rare inside a chunk.
  const bool two_keys = Table::kStochastic && begin >> 32 != (end - 1) >> 32;
  const bool has_vectors = head >= 0 && !two_keys;
  // The vectors are at [first, last), counted from the beginning of the chunk.
  const int size = int(end - begin);
  const int first = !has_vectors ? size : chunk == 0 ? min(int(shift), size) : 0;
  const int last = first + (size - first) / N * N;
  for (int k = first + threadIdx.x * N; k < last; k += kThreads * N) {
    // With many shadows there are no registers to keep what all vectors are rounded by.
    update<N>(row, group, averages, rounder_at(kMany ? begin + k : begin), begin + k);
  }
  // What lies before and behind them, in one loop, since the update takes long to compile.
#pragma unroll 1
  for (int k = threadIdx.x; k < size - (last - first); k += kThreads) {
    const int64_t i = begin + (k < first ? k : k + last - first);
    update<1>(row, group, averages, rounder_at(i), i);
  }
}

// All that a skipped step does to a chunk: infinite gradients must not stay.
template <typename T, bool kMixed, typename Table>
__device__ __forceinline__ void reset_grad(const Row<T, kMixed>& row, const DeviceGroup<T>& group,
                                           const Table& table, int index) {
  if (!group.reset_grads || !row.data[kGrad]) return;
  const int64_t chunk = blockIdx.x - table.first_chunk[index];
  // In units that every dtype is a multiple of.
  const int64_t units = element_size(row.dtype(kGrad)) / int(sizeof(uint16_t));
  const int64_t begin = chunk * kChunkElements * units;
  const int64_t end = min(table.numel[index], (chunk + 1) * kChunkElements) * units;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    reinterpret_cast<uint16_t*>(row.data[kGrad])[i] = 0;
  }
}

// Blocks that share a multiprocessor, at the least: the more, the more reads are under way. With
// one more, the kernels of mixed dtypes and of several averages would spill registers.
template <bool kMixed, bool kMany>
inline constexpr int kBlocksPerSM = kMixed ? 2 : 4 - kMany;

// kMixed: some stream is of a narrow type. Kept apart, because the kernel without them needs two
// thirds of the registers; kernels that may round stochastically, and those of several averages,
// are apart from others too.
template <typename T, bool kMixed, bool kMany, typename Table>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<kMixed, kMany>)
    step_kernel(const __grid_constant__ Table table) {
  const int index = row_of(table, blockIdx.x);
  Row<T, kMixed> row(table, index);
  const DeviceGroup<T>& in_table = table.groups[table.group[index]];
  const DeviceGroup<T> group = in_table.on_device ? *in_table.on_device : in_table;
  if (group.skipped) return reset_grad(row, group, table, index);
  const Averages<T, kMany, Table> averages(table, index);
  if (!averages.due()) row.data[kShadow] = nullptr;
  if (!row.data[kGrad] && !row.data[kShadow]) return;
  constexpr int kInVector = kVectorBytes / int(sizeof(T));
  if (kMixed && !row.is_all_wide()) {
    update_chunk<2 * kInVector>(row, group, averages, table, index);
  } else {
    update_chunk<kInVector>(row, group, averages, table, index);
  }
}

}  // namespace fused_opt::cuda
