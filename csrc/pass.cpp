#include "pass.h"

#include <algorithm>

namespace fused_opt {
namespace {

bool is_alike(const TensorView& a, const TensorView& b) {
  return b.has_kernels && a.dtype == b.dtype && a.device == b.device && a.ndim == b.ndim &&
         std::equal(a.shape, a.shape + a.ndim, b.shape);
}

}  // namespace

Pass::Fit Pass::add_row(const TensorView* const (&views)[kPassStreams], uint32_t hyper) {
  const auto present = std::find_if(std::begin(views), std::end(views),
                                    [](const TensorView* view) { return view != nullptr; });
  if (present == std::end(views)) return Fit::kKernels;
  const TensorView& first = **present;
  const bool computes = first.dtype == DType::kFloat32 || first.dtype == DType::kFloat64;
  if (!first.has_kernels || !computes) return Fit::kTorch;
  if (list_.rows.empty()) {
    device_ = first.device;
    list_.dtype = first.dtype;
  }
  if (first.device != device_ || first.dtype != list_.dtype) return Fit::kTorch;
  PassRow row;
  row.numel = first.numel;
  row.hyper = hyper;
  bool common_order = is_dense(first);
  for (int s = 0; s < kPassStreams; ++s) {
    if (views[s] == nullptr) continue;
    if (!is_alike(first, *views[s])) return Fit::kTorch;
    common_order = common_order && same_order(first, *views[s]);
    row.data[s] = views[s]->data;
  }
  list_.rows.push_back(row);
  return common_order ? Fit::kKernels : Fit::kCopies;
}

int64_t Pass::chunks() const {
  int64_t chunks = 0;
  for (const PassRow& row : list_.rows) chunks += rules::sum_chunks(row.numel);
  return chunks;
}

PassList& Pass::finish() {
  auto& rows = list_.rows;
  const auto before = [](const PassRow& a, const PassRow& b) { return a.hyper < b.hyper; };
  if (!std::is_sorted(rows.begin(), rows.end(), before)) {
    std::stable_sort(rows.begin(), rows.end(), before);
  }
  int64_t chunks = 0;
  for (PassRow& row : rows) {
    row.first_chunk = chunks;
    chunks += rules::sum_chunks(row.numel);
  }
  return list_;
}

}  // namespace fused_opt
