// The hyper-parameters of a step as Python gives them, in fp64 or as tensors. Plain data.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fused_opt {

// A number in the memory of the device that runs the step, which may change there without the host
// knowing. Null where there is none.
struct DeviceScalar {
  const void* data = nullptr;
  bool is_double = false;  // or float

  FUSED_OPT_HD void read_into(double& number) const {
    if (data == nullptr) return;
    number =
        is_double ? *static_cast<const double*>(data) : double(*static_cast<const float*>(data));
  }
};

enum class Formulation { kTorch, kSutskever };

struct SgdHyper {
  double lr = 0;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  double grad_scale = 1;  // the gradients are this many times too large
  double clip = 1;        // and are multiplied by this, the coefficient of ClipRule
  bool nesterov = false;
  bool maximize = false;
  bool decoupled_weight_decay = false;  // shrinks the parameter itself, not through the gradient
  Formulation formulation = Formulation::kTorch;
};

// How a step rounds what it stores in half precision: to nearest, or stochastically, by random
// numbers that depend on the seed and on how many such steps there were before.
struct RoundingHyper {
  bool stochastic = false;
  uint64_t seed = 0;
  uint64_t step = 0;
  const int64_t* more_steps = nullptr;  // on the device, which has counted them
};

// How a step is clipped.
struct ClipHyper {
  double max_norm = 0;
  double grad_scale = 1;  // the gradients are this many times too large
  bool infinity = false;  // the norm is the largest magnitude, not the root of the sum of squares
  // In place of the numbers above, where they are not null.
  DeviceScalar max_norm_scalar = {}, grad_scale_scalar = {};

  // To be called on the device.
  FUSED_OPT_HD void read_scalars() {
    max_norm_scalar.read_into(max_norm);
    grad_scale_scalar.read_into(grad_scale);
  }
};

}  // namespace fused_opt
