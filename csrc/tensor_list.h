// What a backend receives: pointers, sizes, dtypes and hyper-parameters. Plain data, no Python, no
// torch. plan.cpp fills it; cpu/ and cuda/ run it.
#pragma once

#include <cstdint>
#include <vector>

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

// One parameter with everything that is updated beside it, element for element in memory order.
// An absent stream is null: no gradient means that only the shadow is updated, no momentum means
// plain SGD, no shadow means no average, no refinement means that the parameter is all there is.
struct TensorRow {
  void* data[kStreams] = {};
  int64_t numel = 0;
  uint32_t ordinal = 0;  // of the parameter among all, which stochastic rounding is keyed by
  DType dtype[kStreams] = {};
  uint16_t group = 0;  // index into TensorList::groups
};

// What all rows of a param group share.
struct Group {
  SgdHyper sgd;
  RoundingHyper rounding;
  double decay = 0;          // of the shadow
  bool reset_grads = false;  // fill the gradients with 0 after reading them
  // CUDA: read these from device memory instead of sgd.lr and sgd.clip.
  const double* device_lr = nullptr;
  const double* device_clip = nullptr;
};

struct TensorList {
  std::vector<TensorRow> rows;
  std::vector<Group> groups;
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
