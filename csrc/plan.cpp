#include "plan.h"

#include <algorithm>
#include <string>
#include <utility>

namespace fused_opt {
namespace {

constexpr Stream kBesideParam[] = {kGrad, kMomentum, kShadow, kRefinement};

std::string name_of(Stream stream) {
  constexpr const char* kNames[kStreams] = {"parameter", "gradient", "momentum buffer", "shadow",
                                            "refinement"};
  return stream < kStreams ? kNames[stream] : kNames[kShadow];
}

std::string dtype_of(const TensorView& view) {
  if (!view.has_kernels) return view.dtype_kind + std::to_string(8 * view.item_bytes);
  constexpr const char* kNames[kDTypes] = {"float32", "float64", "bfloat16", "float16", "int16"};
  return kNames[int(view.dtype)];
}

std::string device_of(const TensorView& view) {
  return view.device == kCpu ? "cpu" : "cuda:" + std::to_string(view.device);
}

std::string shape_of(const TensorView& view) {
  std::string text = "(";
  for (int d = 0; d < view.ndim; ++d) text += (d ? ", " : "") + std::to_string(view.shape[d]);
  return text + (view.ndim == 1 ? ",)" : ")");
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// The dtype table, which README.md shows: what may stand beside a parameter.
bool dtype_fits(DType param, DType other, Stream stream) {
  if (stream == kRefinement) {
    if (param == DType::kBFloat16 && other == DType::kInt16) return true;
    const bool half = param == DType::kBFloat16 || param == DType::kFloat16;
    return half && (other == DType::kFloat32 || other == param);
  }
  if (other == DType::kInt16) return false;
  if (param != DType::kFloat64) return other != DType::kFloat64;
  return other == DType::kFloat64 || (stream == kShadow && other == DType::kFloat32);
}

void check_fit(const TensorView& param, const TensorView& other, uint32_t row, Stream stream) {
  const auto expect = [&](const std::string& what, const std::string& of_param,
                          const std::string& of_other) {
    throw RowError(row, stream,
                   "expected " + what + " " + of_param + " like the parameter, got " + of_other);
  };
  if (other.device != param.device) expect("device", device_of(param), device_of(other));
  if (!same_shape(param, other)) expect("shape", shape_of(param), shape_of(other));
  const Stream kind = stream < kStreams ? stream : kShadow;
  if (!other.has_kernels || !dtype_fits(param.dtype, other.dtype, kind)) {
    throw RowError(row, stream,
                   "there is no kernel for a " + dtype_of(other) + " " + name_of(stream) +
                       " beside a " + dtype_of(param) + " parameter");
  }
}

}  // namespace

void Plan::clear() {
  for (DeviceList& entry : lists_) {
    entry.list.rows.clear();
    entry.list.more_shadows.clear();
  }
  groups_.clear();
  averages_.clear();
  average_steps_ = {};
  gate_ = {};
  overlap_.clear();
  rows_ = 0;
}

uint16_t Plan::add_group(const Group& group) {
  if (groups_.size() > UINT16_MAX)
    throw std::length_error("a step takes at most 65536 param groups");
  groups_.push_back(group);
  return uint16_t(groups_.size() - 1);
}

bool Plan::add_row(const Row& offered, bool copies) {
  const uint32_t index = rows_++;
  const TensorView& param = *offered.views[kParam];
  for (Stream stream : kBesideParam) {
    const TensorView* const view = offered.views[stream];
    if (view != nullptr) check_fit(param, *view, index, stream);
  }
  int average = 0;
  for (const TensorView& view : offered.more_shadows) {
    const Stream stream = shadow_stream(++average);
    check_fit(param, view, index, stream);
    if (view.dtype == offered.views[kShadow]->dtype) continue;
    throw RowError(index, stream,
                   "expected dtype " + dtype_of(*offered.views[kShadow]) +
                       " like the shadow of the first average, got " + dtype_of(view));
  }

  TensorRow row;
  row.numel = param.numel;
  row.group = offered.group;
  row.ordinal = offered.ordinal;
  row.copies = offered.frozen;
  // Without a gradient the parameter is only read: the row updates its shadow.
  const auto writes = [&](Stream stream) {
    if (stream == kParam || stream == kRefinement) return offered.views[kGrad] != nullptr;
    return stream != kGrad || groups_[offered.group].reset_grads;
  };
  const bool param_dense = is_dense(param);
  bool common_order = param_dense;
  const auto add = [&](const TensorView& view, Stream stream) {
    const bool in_order = same_order(param, view);
    if (!copies) {
      const bool dense = in_order ? param_dense : is_dense(view);
      overlap_.add(view, index, stream, dense, writes(stream));
    }
    common_order = common_order && in_order;
  };
  for (int s = 0; s < kStreams; ++s) {
    const TensorView* const view = offered.views[s];
    if (view == nullptr) continue;
    row.data[s] = view->data;
    row.dtype[s] = view->dtype;
    add(*view, Stream(s));
  }
  average = 0;
  for (const TensorView& view : offered.more_shadows) add(view, shadow_stream(++average));

  if (param.numel == 0) return true;
  if (!common_order) return false;
  TensorList& list = list_for(param.device);
  row.more_shadows = uint32_t(list.more_shadows.size());
  for (const TensorView& view : offered.more_shadows) list.more_shadows.push_back(view.data);
  list.rows.push_back(row);
  return true;
}

bool Plan::add_grad(const TensorView& grad, bool copy) {
  const uint32_t index = rows_++;
  const bool dense = is_dense(grad);
  if (!copy) overlap_.add(grad, index, kGrad, dense, true);
  if (!dense || grad.numel == 0) return dense;
  TensorRow row;
  row.numel = grad.numel;
  row.data[kGrad] = grad.data;
  row.dtype[kGrad] = grad.dtype;
  list_for(grad.device).rows.push_back(row);
  return true;
}

TensorList& Plan::list_for(int device) {
  for (DeviceList& entry : lists_) {
    if (entry.device == device) return entry.list;
  }
  lists_.push_back({device, {}});
  return lists_.back().list;
}

std::vector<int> Plan::devices() const {
  std::vector<int> devices;
  for (const DeviceList& entry : lists_) {
    if (!entry.list.rows.empty()) devices.push_back(entry.device);
  }
  return devices;
}

const TensorList& Plan::list(int device) {
  TensorList& list = list_for(device);
  list.groups = groups_;
  list.averages = averages_;
  list.average_steps = average_steps_;
  list.gate = gate_;
  return list;
}

TensorList Plan::grads(int device) {
  TensorList grads;
  for (const TensorRow& row : list_for(device).rows) {
    if (row.data[kGrad] != nullptr) grads.rows.push_back(row);
  }
  return grads;
}

void Plan::set_scalar(int tensors, Scalar which, DeviceScalar scalar) {
  for (Group& group : groups_) {
    if (tensors == -1 || group.tensors == tensors) group.scalars[which] = scalar;
  }
}

void Plan::set_averages(std::vector<AverageHyper> averages, const AverageSteps& steps) {
  averages_ = std::move(averages);
  average_steps_ = steps;
}

void Plan::set_schedule(int average, const ScheduleHyper& schedule) {
  averages_.at(average).is_scheduled = true;
  averages_.at(average).schedule = schedule;
}

void Plan::set_rounding_steps(const int64_t* steps) {
  for (Group& group : groups_)
    group.rounding.more_steps = group.rounding.stochastic ? steps : nullptr;
}

}  // namespace fused_opt
