// The door between the CPU driver and the loops, which are compiled once per ISA level. Only plain
// functions cross it: a template or an inline function seen by two levels could be merged by the
// linker, and AVX-512 code would then run on a machine without it.
#pragma once

#include <cstdint>

#include "../tensor_list.h"

namespace fused_opt::cpu {

// Updates elements [begin, end) of a row.
using ChunkKernel = void (*)(const TensorRow& row, const Group& group, int64_t begin, int64_t end);

}  // namespace fused_opt::cpu

extern "C" {
void fused_opt_kernels_baseline(const fused_opt::TensorRow&, const fused_opt::Group&, int64_t,
                                int64_t);
void fused_opt_kernels_x86_64_v3(const fused_opt::TensorRow&, const fused_opt::Group&, int64_t,
                                 int64_t);
void fused_opt_kernels_x86_64_v4(const fused_opt::TensorRow&, const fused_opt::Group&, int64_t,
                                 int64_t);
}
