// Checks the tensors of a step and turns them into the rows that a backend runs. No Python here.
#pragma once

#include <vector>

#include "overlap.h"
#include "tensor_list.h"
#include "tensor_view.h"

namespace fused_opt {

class Plan {
 public:
  // Starts a new step.
  void clear();

  // Returns the index by which rows name the group.
  uint16_t add_group(const Group& group);

  // Adds a parameter, known by its ordinal, with what is updated beside it; absent streams are null
  // pointers. Returns false, and adds nothing to run, if the streams do not share one dense order
  // of elements: the caller then offers copies that do, whose memory is new and need not be
  // checked. Throws RowError if they do not fit together.
  bool add_row(const TensorView* const (&views)[kStreams], uint16_t group, uint32_t ordinal,
               bool copies = false);

  // Adds a gradient that is written by itself. Returns false, and adds nothing to run, if it has
  // gaps: the caller then offers a copy that has none.
  bool add_grad(const TensorView& grad, bool copy = false);

  // Counts a row that is run elsewhere, so that the rows of errors stay those of the caller.
  void skip_row() { ++rows_; }

  // Throws RowError if tensors share memory that the step writes.
  void check_overlap() { overlap_.check(); }

  // The devices that have rows, and their rows: all, or those with a gradient.
  std::vector<int> devices() const;
  const TensorList& list(int device);
  TensorList grads(int device);

  // Before a device is run: where a number of all groups with these tensors lies on it. Tensors -1
  // stands for every group.
  void set_scalar(int tensors, Scalar which, DeviceScalar scalar);
  // And where steps were counted by which groups round stochastically.
  void set_rounding_steps(const int64_t* steps);
  // And what decides there whether the step is taken.
  void set_gate(const Gate& gate) { gate_ = gate; }

 private:
  struct DeviceList {
    int device;
    TensorList list;
  };

  TensorList& list_for(int device);

  std::vector<DeviceList> lists_;
  std::vector<Group> groups_;
  Gate gate_;
  OverlapCheck overlap_;
  uint32_t rows_ = 0;
};

}  // namespace fused_opt
