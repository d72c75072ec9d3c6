// The CPU backend: one parallel loop over the chunks of all tensors together.
#pragma once

#include <string>
#include <vector>

#include "../tensor_list.h"

namespace fused_opt::cpu {

// Updates every row. `threads` is the most that may be used; a short list uses fewer.
void multi_tensor_apply(const TensorList& list, int threads);

// The ISA levels that were compiled in and that this machine runs, lowest first.
std::vector<std::string> isa_levels();

// The level in use: the highest of isa_levels() unless set otherwise.
std::string isa_level();
void set_isa_level(const std::string& name);

}  // namespace fused_opt::cpu
