// The hyper-parameters of a step as Python gives them, in fp64. Plain data.
#pragma once

#include <cstdint>

namespace fused_opt {

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
};

// How a step is clipped.
struct ClipHyper {
  double max_norm = 0;
  double grad_scale = 1;  // the gradients are this many times too large
  bool infinity = false;  // the norm is the largest magnitude, not the root of the sum of squares
};

}  // namespace fused_opt
