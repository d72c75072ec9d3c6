// The interface of csrc/cpu, by what is in csrc/cuda: all that the package does with tensors on the
// CPU then runs the launch code and the kernels of CUDA, in the emulator.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "cpu/multi_tensor_apply.h"
#include "cuda/multi_tensor_apply.h"
#include "emulator.h"
#include "rules/sums.h"

namespace fused_opt::cpu {
namespace {

constexpr int kDevice = 0;
constexpr const char* kLevel = "baseline";  // which every build has

// Memory of a device: just as much as was asked for, and full of NaN.
class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t bytes) : bytes_(bytes > 0 ? new char[bytes] : nullptr) {
    if (bytes > 0) std::memset(bytes_.get(), 0xff, bytes);
  }
  void* get() const { return bytes_.get(); }
  double* doubles() const { return static_cast<double*>(get()); }

 private:
  const std::unique_ptr<char[]> bytes_;
};

DeviceMemory doubles_of_device(int64_t count) {
  return DeviceMemory(count * int64_t(sizeof(double)));
}

}  // namespace

void multi_tensor_apply(const TensorList& list, int) {
  // Copies are the CPU's alone, and the step counts on.
  const bool copies =
      rules::AverageRule(list.average_steps).due && !is_skipped(list.gate.found_inf);
  const DeviceMemory memory(cuda::memory_bytes(list));
  emulator::run_on_stream(
      [&](CUstream_st* stream) { cuda::multi_tensor_apply(list, kDevice, stream, memory.get()); });
  if (!copies) return;
  for (const ByteCopy& copy : list.copies) std::memcpy(copy.target, copy.source, copy.bytes);
}

void grad_norm(const TensorList& grads, ClipHyper hyper, int, double* result) {
  int64_t chunks = 0;
  for (const TensorRow& row : grads.rows) chunks += rules::sum_chunks(row.numel);
  const DeviceMemory memory = doubles_of_device(2 + chunks);
  emulator::run_on_stream([&](CUstream_st* stream) {
    cuda::grad_norm(grads, hyper, kDevice, stream, memory.doubles());
  });
  std::copy_n(memory.doubles(), 2, result);
}

void scale_grads(const TensorList& grads, double coefficient, int) {
  const DeviceMemory memory = doubles_of_device(1);
  *memory.doubles() = coefficient;
  emulator::run_on_stream(
      [&](CUstream_st* stream) { cuda::scale_grads(grads, memory.doubles(), kDevice, stream); });
}

void run_pass(PassList list, int, double* sums) {
  const int64_t results = int64_t(list.hypers.size()) * kPassSums;
  const int64_t of_chunks = list.chunk_bounds().back() * kPassSums;
  const DeviceMemory memory = doubles_of_device(sums ? results + of_chunks : 0);
  emulator::run_on_stream(
      [&](CUstream_st* stream) { cuda::run_pass(list, kDevice, stream, memory.doubles()); });
  if (sums) std::copy_n(memory.doubles(), results, sums);
}

std::vector<std::string> isa_levels() { return {kLevel}; }

std::string isa_level() { return kLevel; }

void set_isa_level(const std::string& name) {
  if (name == kLevel) return;
  throw std::invalid_argument("this machine or build has no CPU level named '" + name + "'");
}

}  // namespace fused_opt::cpu
