// Makes the rows of a differentiable pass from tensors. No Python here.
#pragma once

#include "pass_list.h"
#include "tensor_view.h"

namespace fused_opt {

class Pass {
 public:
  // What can run a pass.
  enum class Fit {
    kKernels,  // they can as it is,
    kCopies,   // or with dense copies of its tensors in one order of elements,
    kTorch,    // or not at all
  };

  explicit Pass(PassKind kind) { list_.kind = kind; }

  // Adds a row; absent streams are null pointers. Those before it have fitted.
  Fit add_row(const TensorView* const (&views)[kPassStreams], uint32_t hyper);

  // Adds the next hyper. Its tensors have to be of one element.
  void add_hyper(const PassHyper& hyper) { list_.hypers.push_back(hyper); }

  // The device of all rows; the CPU where there are none.
  int device() const { return device_; }
  bool empty() const { return list_.rows.empty(); }
  int64_t chunks() const;

  // All rows, in the order that PassList asks for.
  PassList& finish();

 private:
  PassList list_;
  int device_ = kCpu;
};

}  // namespace fused_opt
