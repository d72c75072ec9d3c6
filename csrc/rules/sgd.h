// Momentum SGD, written once: the CPU loops and the CUDA kernel both run this text.
#pragma once

#include "host_device.h"
#include "hyper.h"

namespace fused_opt::rules {
inline namespace FUSED_OPT_ISA {

// One step of momentum SGD on one element, in the arithmetic of T (float or double):
//
//     d  = gradient_gain g + weight_decay p
//     v' = momentum v + velocity_gain d
//     u  = update_gain d + momentum v'   if nesterov, else v'
//     p' = retained p + step_size u
//
// with gradient_gain = clip / grad_scale, negative to maximize, and the gains that make it one of
// two formulations (tau is the dampening):
//
//                     velocity_gain      update_gain    step_size
//     torch           1 - tau            1              -lr
//     sutskever       -lr (1 - tau)      -lr            1
//
// Without momentum there is no v, and u = d, step_size = -lr in both. Decoupled weight decay takes
// weight_decay out of d and makes retained 1 - lr weight_decay; otherwise that is 1, which changes
// no bit of p.
template <typename T>
struct SgdRule {
  T gradient_gain, weight_decay, momentum;
  T velocity_gain, update_gain, step_size, plain_step_size, retained;
  bool nesterov;

  SgdRule() = default;

  // Also on the device, where the numbers may live.
  FUSED_OPT_HD explicit SgdRule(const SgdHyper& hyper)
      : gradient_gain(T((hyper.maximize ? -1 : 1) / hyper.grad_scale * hyper.clip)),
        weight_decay(T(hyper.decoupled_weight_decay ? 0 : hyper.weight_decay)),
        momentum(T(hyper.momentum)),
        nesterov(hyper.nesterov) {
    const T lr = T(hyper.lr), undamped = T(1 - hyper.dampening);
    const bool sutskever = hyper.formulation == Formulation::kSutskever;
    velocity_gain = sutskever ? -lr * undamped : undamped;
    update_gain = sutskever ? -lr : T(1);
    step_size = sutskever ? T(1) : -lr;
    plain_step_size = -lr;
    retained = T(1) - lr * T(hyper.decoupled_weight_decay ? hyper.weight_decay : 0);
  }

  FUSED_OPT_HD T descent(T param, T grad) const {
    const T ascent = gradient_gain * grad;
    // Skipped, not multiplied by zero: 0 * inf would turn an infinite parameter into NaN.
    return weight_decay != T(0) ? ascent + weight_decay * param : ascent;
  }

  FUSED_OPT_HD void update(T& param, T grad) const {
    param = retained * param + plain_step_size * descent(param, grad);
  }

  FUSED_OPT_HD void update(T& param, T grad, T& velocity) const {
    const T d = descent(param, grad);
    velocity = momentum * velocity + velocity_gain * d;
    const T u = nesterov ? update_gain * d + momentum * velocity : velocity;
    param = retained * param + step_size * u;
  }
};

}  // namespace FUSED_OPT_ISA
}  // namespace fused_opt::rules
