// The CPU loop of all differentiable passes. Included only by kernels.cpp, once per ISA level; all
// of it is local to that unit.
#pragma once

#include <cstring>
#include <utility>

#include "../pass_list.h"
#include "../rules/differentiable.h"
#include "dtypes.h"

namespace fused_opt::cpu {
namespace {

// What stands for a tile of an absent stream: an input is read here, an output written there.
template <typename T>
struct AbsentTiles {
  alignas(64) T input[kTile];
  alignas(64) T output[kTile];
  FUSED_OPT_HD AbsentTiles() {
    for (int i = 0; i < kTile; ++i) input[i] = T(-0.0);
  }
};

// The lanes of all sums of a rule, for one chunk after the other.
template <typename T, int kSums>
struct Lanes {
  alignas(64) T lanes[kSums > 0 ? kSums : 1][rules::kPassLanes<T>];

  FUSED_OPT_HD void clear(int used) {
    for (int k = 0; k < kSums; ++k) std::memset(lanes[k], 0, used * sizeof(T));
  }
  FUSED_OPT_HD void fold(int used, double* sums) {
    for (int k = 0; k < kSums; ++k) {
      rules::fold<rules::kPassLanes<T>>(rules::SumRule<T>(), lanes[k], used);
      sums[k] = lanes[k][0];
    }
  }
};

// The streams of a tile, and the lanes that take what it adds to the sums.
template <typename T, typename Pass>
struct PassTile {
  const T* in[Pass::kInputs];
  T* out[Pass::kOutputs];
  T* lanes[Pass::kSums > 0 ? Pass::kSums : 1];
};

template <int... k>
using Indices = std::integer_sequence<int, k...>;
template <int kCount>
using IndicesTo = std::make_integer_sequence<int, kCount>;

// No arrays in these loops: g++ would not vectorise them.
template <bool kWithSums, typename T, typename Pass, int... in, int... out, int... sum>
FUSED_OPT_HD void pass_tile(const Pass& pass, const PassTile<T, Pass>& tile, int count,
                            Indices<in...>, Indices<out...>, Indices<sum...>) {
  const Pass own = pass;  // which no output can overlap
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    if constexpr (kWithSums) own.add(tile.in[in][i]..., tile.lanes[sum][i]...);
    own.apply(tile.in[in][i]..., tile.out[out][i]...);
  }
}

// One tile from element `first` on. With sums, the lanes from `lane` on take theirs.
template <bool kWithSums, typename T, typename Pass>
FUSED_OPT_HD void pass_tile(const Pass& pass, const PassRow& row, int64_t first, int count,
                            AbsentTiles<T>& absent, Lanes<T, Pass::kSums>& lanes, int lane) {
  PassTile<T, Pass> tile;
  for (int s = 0; s < Pass::kInputs; ++s) {
    tile.in[s] = row.data[s] ? static_cast<const T*>(row.data[s]) + first : absent.input;
    prefetch(reinterpret_cast<const char*>(tile.in[s]), kTile * sizeof(T));
  }
  for (int s = 0; s < Pass::kOutputs; ++s) {
    T* const data = static_cast<T*>(row.data[Pass::kInputs + s]);
    tile.out[s] = data ? data + first : absent.output;
  }
  for (int k = 0; k < Pass::kSums; ++k) tile.lanes[k] = lanes.lanes[k] + lane;
  pass_tile<kWithSums>(pass, tile, count, IndicesTo<Pass::kInputs>(), IndicesTo<Pass::kOutputs>(),
                       IndicesTo<Pass::kSums>());
}

template <bool kWithSums, typename T, typename Pass>
FUSED_OPT_HD void pass_range(const Pass pass, const PassRow& row, int64_t begin, int64_t end,
                             double* sums) {
  constexpr int kLanes = rules::kPassLanes<T>;
  constexpr int64_t kStep = rules::kSumChunk;
  AbsentTiles<T> absent;
  Lanes<T, Pass::kSums> lanes;
  for (int64_t chunk = begin; chunk < end; chunk += kStep) {
    const int64_t stop = chunk + kStep < end ? chunk + kStep : end;
    const int used = int(stop - chunk < kLanes ? stop - chunk : kLanes);
    if (kWithSums) lanes.clear(used);
    int64_t i = chunk;
    for (; i + kTile <= stop; i += kTile) {
      pass_tile<kWithSums>(pass, row, i, kTile, absent, lanes, int(i - chunk) % kLanes);
    }
    if (i < stop) {
      pass_tile<kWithSums>(pass, row, i, int(stop - i), absent, lanes, int(i - chunk) % kLanes);
    }
    if (kWithSums) lanes.fold(used, sums + chunk / kStep * kPassSums);
  }
}

template <typename T>
void pass_of(PassKind kind, const PassRow& row, const PassHyper& hyper, int64_t begin, int64_t end,
             double* sums) {
  rules::with_pass<T>(kind, hyper, [&](const auto& pass) {
    if (sums == nullptr) return pass_range<false, T>(pass, row, begin, end, sums);
    if constexpr (pass.kSums > 0) pass_range<true, T>(pass, row, begin, end, sums);
  });
}

void pass(PassKind kind, DType dtype, const PassRow& row, const PassHyper& hyper, int64_t begin,
          int64_t end, double* sums) {
  if (dtype == DType::kFloat64) return pass_of<double>(kind, row, hyper, begin, end, sums);
  pass_of<float>(kind, row, hyper, begin, end, sums);
}

}  // namespace
}  // namespace fused_opt::cpu
