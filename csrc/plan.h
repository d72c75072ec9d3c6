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

  // The averages that rows have shadows of, and when they are updated.
  void set_averages(std::vector<AverageHyper> averages, const AverageSteps& steps);
  void set_schedule(int average, const ScheduleHyper& schedule);
  size_t averages() const { return averages_.size(); }

  // What is updated together: a parameter, known by its ordinal, and what lies beside it; absent
  // streams are null pointers. A row with a shadow has that of every average.
  struct Row {
    const TensorView* views[kStreams] = {};
    const std::vector<TensorView>& more_shadows;
    uint16_t group;
    uint32_t ordinal;
    bool frozen;  // its shadows copy it
  };

  // Adds a row. Returns false, and adds nothing to run, if the streams do not share one dense order
  // of elements: the caller then offers copies that do, whose memory is new and need not be
  // checked. Throws RowError if they do not fit together.
  bool add_row(const Row& row, bool copies = false);

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
  // And where steps were counted by which groups round stochastically,
  void set_rounding_steps(const int64_t* steps);
  // and those of averages, and where the decay of one lies.
  void set_average_steps(const int64_t* steps) { average_steps_.more_steps = steps; }
  void set_decay(int average, DeviceScalar scalar) { averages_.at(average).scalar = scalar; }
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
  std::vector<AverageHyper> averages_;
  AverageSteps average_steps_;
  Gate gate_;
  OverlapCheck overlap_;
  uint32_t rows_ = 0;
};

}  // namespace fused_opt
