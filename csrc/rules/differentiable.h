// Steps that write new tensors, and their derivatives: written once for both backends. Each is a
// pass, a rule that makes kOutputs elements of kInputs elements with apply(), and adds what they
// contribute to kSums sums with add(). What is absent among the inputs is -0.0, which adds nothing
// to anything.
#pragma once

#include <cstdint>

#include "ema.h"
#include "host_device.h"
#include "hyper.h"
#include "sgd.h"
#include "sums.h"

namespace fused_opt {

enum class PassKind : uint8_t { kSgd, kSgdBackward, kEma, kEmaBackward };

// The numbers of a pass, which are also what the sums of its backward belong to: those of SGD in
// this order, or the decay of an EMA as the first.
enum PassNumber : uint8_t { kLr, kMomentumOfPass, kWeightDecay, kDampening };
inline constexpr int kDecay = 0;
inline constexpr int kPassSums = 4;

struct PassHyper {
  double numbers[kPassSums] = {};
  DeviceScalar scalars[kPassSums] = {};  // in place of them, where they are not null
  bool nesterov = false, maximize = false;
  bool plain = false;  // without momentum

  // To be called on the device.
  FUSED_OPT_HD void read_scalars() {
    scalars[0].read_into(numbers[0]);
    scalars[1].read_into(numbers[1]);
    scalars[2].read_into(numbers[2]);
    scalars[3].read_into(numbers[3]);
  }
};

namespace rules {
inline namespace FUSED_OPT_ISA {

// Half of what a norm has: there are four sums at once, on CUDA one vector of 16 bytes in each.
template <typename T>
inline constexpr int kPassLanes = kLanes<T> / 2;

FUSED_OPT_HD SgdHyper sgd_hyper(const PassHyper& hyper) {
  SgdHyper sgd;
  sgd.lr = hyper.numbers[kLr];
  sgd.momentum = hyper.numbers[kMomentumOfPass];
  sgd.weight_decay = hyper.numbers[kWeightDecay];
  sgd.dampening = hyper.numbers[kDampening];
  sgd.nesterov = hyper.nesterov;
  sgd.maximize = hyper.maximize;
  return sgd;
}

// SgdRule: p, g, v to p', v'. At a first step v is absent and the dampening 0; without momentum
// that is 0 too, and v' is absent.
template <typename T>
struct SgdPass {
  static constexpr int kInputs = 3, kOutputs = 2, kSums = 0;
  SgdRule<T> rule;

  FUSED_OPT_HD explicit SgdPass(const PassHyper& hyper) : rule(sgd_hyper(hyper)) {}

  FUSED_OPT_HD void apply(T param, T grad, T velocity, T& new_param, T& new_velocity) const {
    rule.update(param, grad, velocity);
    new_param = param, new_velocity = velocity;
  }
};

// Its derivative. With u = a d + b v', the step's direction, where
//
//                        a    b
//     momentum           0    1
//     with nesterov      1    momentum
//     no momentum        1    0
//
// and with P and V the derivatives of the loss by p' and v', those by u, v' and d are
//
//     U = -lr P,   V^ = V + b U,   D = (1 - tau) V^ + a U
//
// (tau is the dampening). So those by p, g and v are
//
//     P + weight_decay D,   gradient_gain D,   momentum V^
//
// and those by lr, momentum, weight_decay and tau the sums of
//
//     -P u,   V^ v (+ U v' if nesterov),   D p,   -V^ d
//
// At a first step v is absent and tau = 0. Of p, g, v and v' only those have to be there that an
// output or a sum needs which is asked for. There are no conditions on elements: g++ would not
// vectorise a loop with so many.
template <typename T>
struct SgdBackwardPass {
  static constexpr int kInputs = 6, kOutputs = 3, kSums = 4;
  T step_size, momentum, weight_decay, undamped, gradient_gain, d_in_u, v_in_u, nesterov;

  FUSED_OPT_HD explicit SgdBackwardPass(const PassHyper& hyper) {
    const SgdRule<T> rule(sgd_hyper(hyper));
    step_size = rule.step_size;
    momentum = rule.momentum;
    weight_decay = rule.weight_decay;
    undamped = rule.velocity_gain;
    gradient_gain = rule.gradient_gain;
    nesterov = hyper.nesterov ? T(1) : T(0);
    d_in_u = hyper.plain ? T(1) : nesterov;
    v_in_u = hyper.plain ? T(0) : hyper.nesterov ? momentum : T(1);
  }

  FUSED_OPT_HD void apply(T of_param, T of_velocity, T, T, T, T, T& by_param, T& by_grad,
                          T& by_velocity) const {
    const T of_u = step_size * of_param;
    const T of_v = of_velocity + v_in_u * of_u;
    const T of_d = undamped * of_v + d_in_u * of_u;
    by_param = of_param + weight_decay * of_d;
    by_grad = gradient_gain * of_d;
    by_velocity = momentum * of_v;
  }

  FUSED_OPT_HD void add(T of_param, T of_velocity, T param, T grad, T velocity, T new_velocity,
                        T& by_lr, T& by_momentum, T& by_weight_decay, T& by_dampening) const {
    const T of_u = step_size * of_param;
    const T of_v = of_velocity + v_in_u * of_u;
    const T of_d = undamped * of_v + d_in_u * of_u;
    const T d = gradient_gain * grad + weight_decay * param;
    by_lr -= of_param * (d_in_u * d + v_in_u * new_velocity);
    by_momentum += of_v * velocity + nesterov * of_u * new_velocity;
    by_weight_decay += of_d * param;
    by_dampening -= of_v * d;
  }
};

// EmaRule: s, p to s'.
template <typename T>
struct EmaPass {
  static constexpr int kInputs = 2, kOutputs = 1, kSums = 0;
  EmaRule<T> rule;

  FUSED_OPT_HD explicit EmaPass(const PassHyper& hyper) : rule(hyper.numbers[kDecay]) {}

  FUSED_OPT_HD void apply(T shadow, T param, T& new_shadow) const {
    rule.update(shadow, param);
    new_shadow = shadow;
  }
};

// Its derivative. With S that of the loss by s', those by s and p are decay S and (1 - decay) S,
// and that by the decay is the sum of S (s - p).
template <typename T>
struct EmaBackwardPass {
  static constexpr int kInputs = 3, kOutputs = 2, kSums = 1;
  EmaRule<T> rule;

  FUSED_OPT_HD explicit EmaBackwardPass(const PassHyper& hyper) : rule(hyper.numbers[kDecay]) {}

  FUSED_OPT_HD void apply(T of_shadow, T, T, T& by_shadow, T& by_param) const {
    by_shadow = rule.decay * of_shadow;
    by_param = rule.weight * of_shadow;
  }

  FUSED_OPT_HD void add(T of_shadow, T shadow, T param, T& by_decay) const {
    by_decay += of_shadow * (shadow - param);
  }
};

// Calls body with the rule of a kind. On the host, which chooses loops and kernels.
template <typename T, typename Body>
inline __attribute__((always_inline)) void with_pass(PassKind kind, const PassHyper& hyper,
                                                     Body body) {
  switch (kind) {
    case PassKind::kSgd:
      return body(SgdPass<T>(hyper));
    case PassKind::kSgdBackward:
      return body(SgdBackwardPass<T>(hyper));
    case PassKind::kEma:
      return body(EmaPass<T>(hyper));
    case PassKind::kEmaBackward:
      return body(EmaBackwardPass<T>(hyper));
  }
}

}  // namespace FUSED_OPT_ISA
}  // namespace rules
}  // namespace fused_opt
