// The door between the CPU driver and the loops, which are compiled once per ISA level. Only plain
// functions cross it: a template or an inline function seen by two levels could be merged by the
// linker, and AVX-512 code would then run on a machine without it.
#pragma once

#include <cstdint>

#include "../pass_list.h"
#include "../tensor_list.h"

namespace fused_opt::cpu {

// What a step does to the averages of all rows.
struct Averages {
  const double* decays;
  int count;                  // 0 where the step is not due: shadows are then left alone
  void* const* more_shadows;  // TensorList::more_shadows
};

// Each works on elements [begin, end) of a row.
struct Kernels {
  // Updates all streams.
  void (*step)(const TensorRow& row, const Group& group, const Averages& averages, int64_t begin,
               int64_t end);
  // What the elements of the gradient, one chunk of rules/sums.h, add to its norm.
  double (*norm)(const TensorRow& row, bool infinity, int64_t begin, int64_t end);
  // Multiplies the gradient.
  void (*scale)(const TensorRow& row, double coefficient, int64_t begin, int64_t end);
  // Runs a differentiable pass. Where `sums` is not null, begin is that of a chunk of rules/sums.h,
  // and sums[kPassSums * c + k] becomes what chunk c of the row adds to sum k.
  void (*pass)(PassKind kind, DType dtype, const PassRow& row, const PassHyper& hyper,
               int64_t begin, int64_t end, double* sums);
};

}  // namespace fused_opt::cpu

extern "C" {
fused_opt::cpu::Kernels fused_opt_kernels_baseline();
fused_opt::cpu::Kernels fused_opt_kernels_x86_64_v3();
fused_opt::cpu::Kernels fused_opt_kernels_x86_64_v4();
}
