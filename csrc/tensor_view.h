// A tensor as its owner describes it, before it is checked. No Python, no torch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "tensor_list.h"

namespace fused_opt {

inline constexpr int kCpu = -1;  // as a device index; CUDA devices count from 0

// Shape and strides (in elements) are borrowed from the tensor and must be used at once.
struct TensorView {
  void* data = nullptr;
  int64_t numel = 0;
  int ndim = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;
  int device = kCpu;
  int item_bytes = 0;
  bool has_kernels = false;       // false: `dtype` means nothing
  DType dtype = DType::kFloat32;  // and this is none of ours,
  const char* dtype_kind = "";    // but "int", "complex" and so on
};

// A tensor that cannot take part in a step: the stream of the row that is at fault, and why. Rows
// are counted from the start of the step. binding.cpp turns it into a Python exception.
struct RowError : std::invalid_argument {
  RowError(uint32_t row_, Stream stream_, const std::string& what)
      : std::invalid_argument(what), row(row_), stream(stream_) {}
  uint32_t row;
  Stream stream;
};

// Whether the elements fill one range of memory without gaps, in whatever order of dimensions.
bool is_dense(const TensorView& view);

// Whether both lay their elements out in the same order. For tensors of one shape.
bool same_order(const TensorView& a, const TensorView& b);

}  // namespace fused_opt
