// The exponential moving average, written once for both backends.
#pragma once

#include "host_device.h"
#include "hyper.h"

namespace fused_opt::rules {
inline namespace FUSED_OPT_ISA {

// s' = s + weight (p - s), with weight = 1 - decay.
//
// From weight = 0.5 on it is evaluated from the other end, p - (p - s) decay, as torch.lerp does,
// which keeps the error relative to the smaller share. The ends are exact, also beside inf and
// NaN: weight 1 copies the parameter and weight 0 keeps the shadow.
template <typename T>
struct EmaRule {
  T weight, decay;

  EmaRule() = default;

  FUSED_OPT_HD explicit EmaRule(double decay_) : weight(T(1 - decay_)), decay(T(decay_)) {}

  FUSED_OPT_HD void update(T& shadow, T param) const {
    const T gap = param - shadow;
    const T near_shadow = weight == T(0) ? shadow : shadow + weight * gap;
    const T near_param = decay == T(0) ? param : param - gap * decay;
    shadow = weight < T(0.5) ? near_shadow : near_param;
  }
};

}  // namespace FUSED_OPT_ISA
}  // namespace fused_opt::rules
