// The CPU backend: one parallel loop over the chunks of all tensors together.
#pragma once

#include <string>
#include <vector>

#include "../pass_list.h"
#include "../tensor_list.h"

namespace fused_opt::cpu {

// Updates every row, unless the list's gate skips the step. `threads` is the most that may be used;
// a short list uses fewer.
void multi_tensor_apply(const TensorList& list, int threads);

// Writes what ClipRule makes of all gradients, the norm and the coefficient, to result[0] and [1].
// The same bits for any number of threads.
void grad_norm(const TensorList& grads, ClipHyper hyper, int threads, double* result);

// Multiplies every gradient, unless by 1.
void scale_grads(const TensorList& grads, double coefficient, int threads);

// Runs a differentiable pass. Where `sums` is not null, writes kPassSums sums for each entry of
// list.hypers there, with the same bits for any number of threads. Behind them it has place for as
// many of each chunk.
void run_pass(PassList list, int threads, double* sums);

// The ISA levels that were compiled in and that this machine runs, lowest first.
std::vector<std::string> isa_levels();

// The level in use: the highest of isa_levels() unless set otherwise.
std::string isa_level();
void set_isa_level(const std::string& name);

}  // namespace fused_opt::cpu
