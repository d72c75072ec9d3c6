#include "overlap.h"

#include <algorithm>
#include <tuple>

namespace fused_opt {
namespace {

[[noreturn]] void refuse(uint32_t row, Stream stream) {
  throw RowError(row, stream,
                 "shares memory with another tensor that the step reads or writes (or with "
                 "itself): expected memory of its own");
}

// Calls visit(address) for the first byte of every element.
template <typename Visit>
void for_each_element(uintptr_t data, int item_bytes, const std::vector<int64_t>& shape,
                      const std::vector<int64_t>& strides, Visit visit) {
  std::vector<int64_t> index(shape.size(), 0);
  while (true) {
    visit(data);
    size_t d = shape.size();
    while (d-- > 0) {
      data += strides[d] * item_bytes;
      if (++index[d] < shape[d]) break;
      data -= shape[d] * strides[d] * item_bytes;
      index[d] = 0;
      if (d == 0) return;
    }
    if (shape.empty()) return;
  }
}

}  // namespace

void OverlapCheck::Extents::add(const Extent& extent, bool same_layout) {
  if (count == all.size()) {
    all.push_back(extent);
    checked = false;
  } else {
    const Extent& known = all[count];
    const bool same_place = known.begin == extent.begin && known.end == extent.end &&
                            known.layout == extent.layout && same_layout;
    checked = checked && same_place;
    all[count] = extent;
  }
  ++count;
}

void OverlapCheck::Extents::finish() {
  if (count == all.size()) return;
  all.resize(count);
  checked = false;
}

// The index of this layout, and whether it was there before.
std::pair<int32_t, bool> OverlapCheck::add_layout(const TensorView& view) {
  Layout layout = {reinterpret_cast<uintptr_t>(view.data),
                   view.item_bytes,
                   {view.shape, view.shape + view.ndim},
                   {view.strides, view.strides + view.ndim}};
  const size_t index = layout_count_++;
  if (index == layouts_.size()) layouts_.emplace_back();
  const bool same = layouts_[index] == layout;
  layouts_[index] = std::move(layout);
  return {int32_t(index), same};
}

bool OverlapCheck::Layout::operator==(const Layout& other) const {
  return data == other.data && item_bytes == other.item_bytes && shape == other.shape &&
         strides == other.strides;
}

void OverlapCheck::clear() { written_.count = read_.count = layout_count_ = 0; }

void OverlapCheck::add(const TensorView& view, uint32_t row, Stream stream, bool dense,
                       bool written) {
  if (view.numel == 0) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(view.data);
  int64_t last = view.numel - 1;
  int32_t layout = kDense;
  bool same_layout = true;
  if (!dense) {
    last = 0;
    for (int d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
    std::tie(layout, same_layout) = add_layout(view);
  }
  const uintptr_t end = data + (last + 1) * view.item_bytes;
  const Extent extent = {data, end, row, layout, stream, uint8_t(view.item_bytes)};
  (written ? written_ : read_).add(extent, same_layout);
}

void OverlapCheck::check() {
  written_.finish();
  read_.finish();
  if (!written_.checked) {
    check_written();
    written_.checked = true;
    read_.checked = false;
  }
  if (!read_.checked) {
    check_read();
    read_.checked = true;
  }
}

void OverlapCheck::check_written() {
  sorted_ = written_.all;
  std::sort(sorted_.begin(), sorted_.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t first = 0; first < sorted_.size();) {
    uintptr_t end = sorted_[first].end;
    size_t last = first + 1;
    for (; last < sorted_.size() && sorted_[last].begin < end; ++last) {
      end = std::max(end, sorted_[last].end);
    }
    check_cluster(first, last);
    first = last;
  }
}

// Extents of sorted_ that touch: fine only if they interleave, like the columns of a matrix. Marks
// every element that has an owner, or every byte where elements of several sizes meet.
void OverlapCheck::check_cluster(size_t first, size_t last) const {
  if (last - first == 1 && sorted_[first].layout == kDense) return;
  const uintptr_t base = sorted_[first].begin;
  uintptr_t end = base;
  for (size_t i = first; i < last; ++i) end = std::max(end, sorted_[i].end);
  uintptr_t unit = sorted_[first].item_bytes;
  for (size_t i = first; i < last; ++i) {
    const Extent& extent = sorted_[i];
    if (uintptr_t(extent.item_bytes) != unit || (extent.begin - base) % unit != 0) unit = 1;
  }
  std::vector<bool> owned((end - base) / unit, false);
  for (size_t i = first; i < last; ++i) {
    const Extent& extent = sorted_[i];
    const auto own = [&](uintptr_t from, uintptr_t to) {
      for (uintptr_t place = (from - base) / unit; place < (to - base) / unit; ++place) {
        if (owned[place]) refuse(extent.row, extent.stream);
        owned[place] = true;
      }
    };
    if (extent.layout == kDense) {
      own(extent.begin, extent.end);
    } else {
      const Layout& layout = layouts_[extent.layout];
      for_each_element(layout.data, layout.item_bytes, layout.shape, layout.strides,
                       [&](uintptr_t element) { own(element, element + layout.item_bytes); });
    }
  }
}

// A gradient may share memory with another gradient, but not with what is written. Tensors with
// gaps are given the benefit of the doubt here: they are read in full before anything is written.
void OverlapCheck::check_read() const {
  for (const Extent& extent : read_.all) {
    if (extent.layout != kDense) continue;
    const auto after =
        std::upper_bound(sorted_.begin(), sorted_.end(), extent,
                         [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    const bool meets_next = after != sorted_.end() && after->begin < extent.end;
    const bool meets_previous = after != sorted_.begin() && std::prev(after)->end > extent.begin;
    if ((meets_next && after->layout == kDense) ||
        (meets_previous && std::prev(after)->layout == kDense)) {
      refuse(extent.row, extent.stream);
    }
  }
}

}  // namespace fused_opt
