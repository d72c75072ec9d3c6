// Finds tensors of one step that share memory, which no order of updates can serve.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "tensor_view.h"

namespace fused_opt {

// This runs in every step, and almost always on the tensors of the last one, where they lay. So a
// tensor is compared with the one that was added at its place before, and the costly check is
// made only if one of them has changed.
class OverlapCheck {
 public:
  // Starts a new step.
  void clear();

  // `written`: the step writes the tensor; otherwise it only reads it.
  void add(const TensorView& view, uint32_t row, Stream stream, bool dense, bool written);

  // Throws RowError if a written tensor shares memory with another tensor or with itself.
  void check();

 private:
  static constexpr int32_t kDense = -1;

  // The range of memory from a tensor's first byte to its last.
  struct Extent {
    uintptr_t begin, end;
    uint32_t row;
    int32_t layout;  // kDense, or an index into layouts_
    Stream stream;
    uint8_t item_bytes;
  };

  // Extents in the order of adding. What was there before is overwritten from the front.
  struct Extents {
    std::vector<Extent> all;
    size_t count = 0;
    bool checked = false;  // as they are now

    void add(const Extent& extent, bool same_layout);
    void finish();
  };

  // Where the elements of a tensor with gaps lie.
  struct Layout {
    uintptr_t data;
    int item_bytes;
    std::vector<int64_t> shape, strides;
    bool operator==(const Layout& other) const;
  };

  std::pair<int32_t, bool> add_layout(const TensorView& view);

  void check_written();
  void check_read() const;
  void check_cluster(size_t first, size_t last) const;

  Extents written_, read_;
  std::vector<Extent> sorted_;  // written_ by address
  std::vector<Layout> layouts_;
  size_t layout_count_ = 0;
};

}  // namespace fused_opt
