// Finds tensors of one step that share memory, which no order of updates can serve.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor_view.h"

namespace fused_opt {

class OverlapCheck {
 public:
  // Starts a new step.
  void clear();

  // `written`: the step writes the tensor; otherwise it only reads it.
  void add(const TensorView& view, uint32_t row, Stream stream, bool dense, bool written);

  // Throws RowError if a written tensor shares memory with another tensor or with itself. What
  // passed in the last step and lies where it lay is not sorted again: this runs every step.
  void check();

 private:
  // The range of memory from a tensor's first byte to its last.
  struct Extent {
    uintptr_t begin, end;
    uint32_t row;
    Stream stream;
    int item_bytes;
    int layout;  // kDense, or an index into layouts_
  };
  static constexpr int kDense = -1;

  // Where the elements of a tensor with gaps lie.
  struct Layout {
    uintptr_t data;
    int item_bytes;
    std::vector<int64_t> shape, strides;
    bool operator==(const Layout& other) const;
  };

  static bool same_place(const std::vector<Extent>& a, const std::vector<Extent>& b);
  void check_written();
  void check_read() const;
  void check_cluster(size_t first, size_t last) const;

  std::vector<Extent> written_, read_;
  std::vector<Layout> layouts_;

  std::vector<Extent> checked_written_, checked_read_;
  std::vector<Layout> checked_layouts_;
  std::vector<Extent> sorted_;  // checked_written_ by address
};

}  // namespace fused_opt
