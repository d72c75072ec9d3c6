// What a backend receives: pointers, sizes, dtypes and hyper-parameters. Plain data, no Python, no
// torch. plan.cpp fills it; cpu/ and cuda/ run it.
#pragma once

#include <cstdint>
#include <vector>

#include "rules/average.h"
#include "rules/host_device.h"
#include "rules/hyper.h"

namespace fused_opt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt16 };
inline constexpr int kDTypes = 5;

// The memory streams that one pass walks side by side.
//
// The refinement is what a half-precision parameter lacks of its exact value (rules/master.h), and
// its dtype says which: the whole master (float32), its lower half (int16), or a compensation (the
// parameter's own dtype).
enum Stream : uint8_t { kParam, kGrad, kMomentum, kShadow, kRefinement };
inline constexpr int kStreams = 5;

// A parameter has a shadow in every average. The first is a stream of its row; the others are
// numbered after all streams, by which they are rounded and named in errors.
inline constexpr int kMaxAverages = 256 - kStreams + 1;  // which a Stream can number
FUSED_OPT_HD Stream shadow_stream(int average) {
  return Stream(average == 0 ? kShadow : kStreams + average - 1);
}

// One parameter with everything that is updated beside it, element for element in memory order.
// An absent stream is null: no gradient means that only the shadow is updated, no momentum means
// plain SGD, no shadow means no average, no refinement means that the parameter is all there is.
struct TensorRow {
  void* data[kStreams] = {};
  int64_t numel = 0;
  uint32_t ordinal = 0;        // of the parameter among all, which stochastic rounding is keyed by
  uint32_t more_shadows = 0;   // where those of further averages begin in TensorList::more_shadows
  DType dtype[kStreams] = {};  // further shadows have that of the first
  bool copies = false;         // a frozen parameter: where averages are updated, shadows copy it
  uint16_t group = 0;          // index into TensorList::groups
};

// What of a group may be a tensor of one number, in the memory of the rows' device.
enum Scalar : uint8_t {
  kLrScalar,
  kMomentumScalar,
  kDampeningScalar,
  kWeightDecayScalar,
  kGradScaleScalar,
  kClipScalar,
};
inline constexpr int kScalars = 6;

// What all rows of a param group share.
struct Group {
  SgdHyper sgd;
  RoundingHyper rounding;
  bool reset_grads = false;  // fill the gradients with 0 after reading them
  int tensors = -1;          // by which set_scalar() knows it, or -1
  DeviceScalar scalars[kScalars] = {};

  // Puts the numbers of the scalars where those of the host are. To be called on the device.
  FUSED_OPT_HD void read_scalars() {
    scalars[kLrScalar].read_into(sgd.lr);
    scalars[kMomentumScalar].read_into(sgd.momentum);
    scalars[kDampeningScalar].read_into(sgd.dampening);
    scalars[kWeightDecayScalar].read_into(sgd.weight_decay);
    scalars[kGradScaleScalar].read_into(sgd.grad_scale);
    scalars[kClipScalar].read_into(sgd.clip);
    if (rounding.more_steps) rounding.step += uint64_t(*rounding.more_steps);
  }
};

// Decides on the device whether a step is taken, and counts there those that are.
struct Gate {
  const float* found_inf = nullptr;  // any number but 0 skips: all that is left is reset_grads
  std::vector<int64_t*> counters;    // of steps
};

// Whether a step is skipped. A NaN is not 0. To be called on the device.
FUSED_OPT_HD bool is_skipped(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0;
}

// An exact copy, of any dtype.
struct ByteCopy {
  void* target;
  const void* source;
  int64_t bytes;
};

struct TensorList {
  std::vector<TensorRow> rows;
  std::vector<Group> groups;
  std::vector<AverageHyper> averages;
  AverageSteps average_steps;
  std::vector<void*> more_shadows;  // of all rows that have shadows: averages.size() - 1 each
  std::vector<ByteCopy> copies;     // made where averages are updated; on the CPU alone
  Gate gate;
};

// Bytes of an element. Inlined always, so that no ISA level exports a copy.
FUSED_OPT_HD int element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
      return 2;
  }
  return 0;
}

}  // namespace fused_opt
