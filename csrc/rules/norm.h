// The norm of all gradients together, and how a step is clipped by it: written once for both
// backends. sums.h has the order of summation.
#pragma once

#include <math.h>

#include "host_device.h"
#include "hyper.h"
#include "sums.h"

namespace fused_opt::rules {
inline namespace FUSED_OPT_ISA {

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
