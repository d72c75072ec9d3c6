// What a backend receives to run a differentiable pass: a step of SGD or EMA that writes new
// tensors, or the backward of one. Plain data, no Python, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "rules/differentiable.h"
#include "rules/sums.h"
#include "tensor_list.h"

namespace fused_opt {

// The streams of a pass are the inputs and then the outputs of its rule (rules/differentiable.h).
inline constexpr int kPassStreams = 9;

// Tensors that lie element for element in one order of memory. Those that are absent are null: an
// input is then -0.0 everywhere, which adds nothing to anything, and an output is not written.
struct PassRow {
  void* data[kPassStreams] = {};
  int64_t numel = 0;
  int64_t first_chunk = 0;  // of rules/sums.h, among those of all rows
  uint32_t hyper = 0;       // index into PassList::hypers
};

struct PassList {
  PassKind kind;
  DType dtype = DType::kFloat32;  // of all streams: kFloat32 or kFloat64
  std::vector<PassRow> rows;      // those of one hyper follow each other, in the order of hypers
  std::vector<PassHyper> hypers;

  // Where the chunks of each hyper begin, and where those of the last end.
  std::vector<int64_t> chunk_bounds() const {
    std::vector<int64_t> bounds(hypers.size() + 1, 0);
    for (const PassRow& row : rows) bounds[row.hyper + 1] += rules::sum_chunks(row.numel);
    for (size_t h = 0; h < hypers.size(); ++h) bounds[h + 1] += bounds[h];
    return bounds;
  }
};

}  // namespace fused_opt
