#include "tensor_view.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace fused_opt {
namespace {

bool is_contiguous(const TensorView& view) {
  int64_t expected = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] == 1) continue;
    if (view.strides[d] != expected) return false;
    expected *= view.shape[d];
  }
  return true;
}

}  // namespace

bool is_dense(const TensorView& view) {
  if (view.numel <= 1 || is_contiguous(view)) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int d = 0; d < view.ndim; ++d) {
    if (view.shape[d] != 1) dims.emplace_back(view.strides[d], view.shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_order(const TensorView& a, const TensorView& b) {
  for (int d = 0; d < a.ndim; ++d) {
    if (a.strides[d] != b.strides[d] && a.shape[d] != 1) return false;
  }
  return true;
}

}  // namespace fused_opt
