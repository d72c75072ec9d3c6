// The norm of all gradients together, and how a step is clipped by it: written once for both
// backends, the order of summation included.
#pragma once

#include <math.h>

#include <cstdint>

#include "host_device.h"
#include "hyper.h"

namespace fused_opt::rules {
inline namespace FUSED_OPT_ISA {

// Sums in floating point depend on their order, so the order is part of the rule and no backend may
// choose another:
//
//   - a row is cut into chunks of kNormChunk elements;
//   - element i of a chunk goes to lane i mod kLanes<T>, where the lane takes it in after those
//     before it. T is float, and double for float64;
//   - the lanes are folded in halves: lane i takes in lane i + kLanes / 2, and so on, down to one;
//   - the results of all chunks of all rows, in double and in their order, are summed in lanes of
//     double and folded in the same way.
//
// Each sum of a chunk so takes 8 + 11 additions deep, 16 + 10 in double.
inline constexpr int kNormChunk = 16384;

FUSED_OPT_HD int64_t norm_chunks(int64_t numel) { return (numel + kNormChunk - 1) / kNormChunk; }

// A CPU loop runs along the lanes, which stay in its L1 cache. On CUDA a block of 256 threads has
// them in registers, two vectors of 16 bytes each.
inline constexpr int kLaneBytes = 8192;
template <typename T>
inline constexpr int kLanes = kLaneBytes / int(sizeof(T));

// What a lane does: it sums squares, or keeps the largest magnitude. Never less than 0, so that a
// lane that starts at 0, or takes in one that is empty, is not changed by that.
template <typename T>
struct NormRule {
  bool infinity;

  // The share of one element.
  FUSED_OPT_HD T part(T value) const {
    const T magnitude = value < T(0) ? -value : value;
    return infinity ? magnitude : value * value;
  }

  // A NaN stays, in the largest magnitude too.
  FUSED_OPT_HD void join(T& sum, T other) const {
    const T largest = other > sum || other != other ? other : sum;
    sum = infinity ? largest : sum + other;
  }

  FUSED_OPT_HD void add(T& lane, T value) const { join(lane, part(value)); }

  // Folds kWidth lanes, a power of two, into the first. Only the first `count` may be other than 0;
  // the others are not read.
  template <int kWidth>
  FUSED_OPT_HD void fold(T* lanes, int count = kWidth) const {
    if constexpr (kWidth > 1) {
      constexpr int kHalf = kWidth / 2;
      const int pairs = count - kHalf;
      for (int i = 0; i < pairs; ++i) join(lanes[i], lanes[i + kHalf]);
      fold<kHalf>(lanes, count < kHalf ? count : kHalf);
    }
  }
};

// What becomes of the sum:
//
//     norm        = sqrt(sum) / grad_scale       (the largest magnitude is not rooted)
//     coefficient = min(1, max_norm / (norm + 1e-6))
//
// as in torch.nn.utils.clip_grad_norm_, but in double. A NaN makes the coefficient NaN.
struct ClipRule {
  double norm, coefficient;

  FUSED_OPT_HD ClipRule(const ClipHyper& hyper, double sum)
      : norm((hyper.infinity ? sum : sqrt(sum)) / hyper.grad_scale),
        coefficient(hyper.max_norm / (norm + 1e-6)) {
    coefficient = coefficient > 1 ? 1 : coefficient;
  }
};

}  // namespace FUSED_OPT_ISA
}  // namespace fused_opt::rules
