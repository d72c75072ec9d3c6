// The order in which a pass over tensors sums what their elements contribute: written once for both
// backends.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fused_opt::rules {
inline namespace FUSED_OPT_ISA {

// Sums in floating point depend on their order, so the order is part of the rule and no backend may
// choose another:
//
//   - a row is cut into chunks of kSumChunk elements;
//   - element i of a chunk goes to lane i mod (number of lanes), where the lane takes it in after
//     those before it. Lanes are of the type that is computed in;
//   - the lanes are folded in halves: lane i takes in lane i + half, and so on, down to one;
//   - the results of all chunks, in double and in their order, are summed in kLanes<double> lanes
//     and folded in the same way.
inline constexpr int kSumChunk = 16384;

FUSED_OPT_HD int64_t sum_chunks(int64_t numel) { return (numel + kSumChunk - 1) / kSumChunk; }

// A CPU loop runs along the lanes, which stay in its L1 cache. On CUDA a block of 256 threads has
// them in registers, two vectors of 16 bytes each. So a chunk takes 8 + 11 additions deep, 16 + 10
// in double.
inline constexpr int kLaneBytes = 8192;
template <typename T>
inline constexpr int kLanes = kLaneBytes / int(sizeof(T));

// The lane of a sum.
template <typename T>
struct SumRule {
  FUSED_OPT_HD void join(T& sum, T other) const { sum += other; }
};

// Folds kWidth lanes, a power of two, into the first, by what rule.join(sum, other) makes of two.
// Only the first `count` may be other than 0; the others are not read.
template <int kWidth, typename Rule, typename T>
FUSED_OPT_HD void fold(const Rule& rule, T* lanes, int count = kWidth) {
  if constexpr (kWidth > 1) {
    constexpr int kHalf = kWidth / 2;
    const int pairs = count - kHalf;
    for (int i = 0; i < pairs; ++i) rule.join(lanes[i], lanes[i + kHalf]);
    fold<kHalf>(rule, lanes, count < kHalf ? count : kHalf);
  }
}

}  // namespace FUSED_OPT_ISA
}  // namespace fused_opt::rules
