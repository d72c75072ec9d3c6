// Runs the CPU driver (csrc/cpu) with 1 to 8 threads on every ISA level, with no Python around it,
// and compares all memory with what one thread leaves. Built with -fsanitize=thread by
// .ci/sanitize, which also runs it with --plant: two threads then work on the same share, as a
// wrong cut would have it, and this must be reported.
//
// libgomp is not instrumented, so ThreadSanitizer does not see how it starts and joins threads. The
// functions of it that the driver calls stand here instead, over std::thread.
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cpu/multi_tensor_apply.h"

namespace {

thread_local int thread_number = 0, team_size = 1;
bool planted = false;

}  // namespace

extern "C" {
int omp_get_thread_num() { return planted && thread_number == 1 ? 0 : thread_number; }
int omp_get_num_threads() { return team_size; }
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> team;
  for (unsigned t = 0; t < threads; ++t) {
    team.emplace_back([=] {
      thread_number = int(t), team_size = int(threads);
      body(data);
    });
  }
  for (std::thread& thread : team) thread.join();
}
}

namespace {

using namespace fused_opt;

// Below and above a tile, a cut, a chunk and the share of a thread.
const int64_t kSizes[] = {1, 63, 64, 65, 1000, 16383, 16385, 32768, 50001, 131072, 0, 7, 70003};

// Numbered buffers, whose bytes are what is compared.
class Memory {
 public:
  void* add(int64_t bytes) {
    buffers_.emplace_back(bytes + 64);
    return buffers_.back().data();
  }
  template <typename T>
  void* add(int64_t count, T (*value)(int64_t)) {
    T* data = static_cast<T*>(add(count * sizeof(T)));
    for (int64_t i = 0; i < count; ++i) data[i] = value(i);
    return data;
  }
  bool operator==(const Memory& other) const { return buffers_ == other.buffers_; }

 private:
  std::vector<std::vector<char>> buffers_;
};

float number(int64_t i) { return float(i % 37) / 8 - 2; }
uint16_t bfloat16(int64_t i) {
  const float value = number(i);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return uint16_t(bits >> 16);
}

void* numbers(Memory& memory, DType dtype, int64_t count) {
  if (dtype == DType::kFloat32) return memory.add<float>(count, number);
  if (dtype == DType::kFloat64)
    return memory.add<double>(count, [](int64_t i) { return double(number(i)); });
  return memory.add<uint16_t>(count, bfloat16);
}

// How the rows of a step are stored.
struct Kind {
  const char* name;
  DType param, state;
  bool refined;
  DType refinement;
};
const Kind kKinds[] = {
    {"float32", DType::kFloat32, DType::kFloat32, false, DType::kFloat32},
    {"float64", DType::kFloat64, DType::kFloat64, false, DType::kFloat32},
    {"bfloat16", DType::kBFloat16, DType::kBFloat16, false, DType::kFloat32},
    {"bfloat16 beside float32", DType::kBFloat16, DType::kFloat32, false, DType::kFloat32},
    {"whole masters", DType::kBFloat16, DType::kFloat32, true, DType::kFloat32},
    {"split masters", DType::kBFloat16, DType::kFloat32, true, DType::kInt16},
    {"compensation", DType::kBFloat16, DType::kFloat32, true, DType::kBFloat16},
};

constexpr int kAverages = 3;

TensorList step_list(Memory& memory, const Kind& kind) {
  TensorList list;
  Group group;
  group.sgd.lr = 0.1, group.sgd.momentum = 0.9, group.sgd.weight_decay = 0.01;
  group.rounding.stochastic = !kind.refined && kind.param == DType::kBFloat16;
  group.rounding.seed = 7;
  group.reset_grads = true;
  list.groups = {group};
  list.averages.resize(kAverages);
  for (AverageHyper& average : list.averages) average.decay = 0.75;
  for (const int64_t size : kSizes) {
    TensorRow row;
    row.numel = size;
    row.ordinal = uint32_t(list.rows.size());
    const DType dtypes[kStreams] = {kind.param, kind.param, kind.state, kind.state,
                                    kind.refinement};
    for (int s = 0; s < kStreams; ++s) {
      row.dtype[s] = dtypes[s];
      if (s != kRefinement || kind.refined) row.data[s] = numbers(memory, dtypes[s], size);
    }
    if (size % 5 == 3) row.data[kGrad] = nullptr;  // Its shadows alone are updated.
    row.more_shadows = uint32_t(list.more_shadows.size());
    for (int k = 1; k < kAverages; ++k) {
      list.more_shadows.push_back(numbers(memory, kind.state, size));
    }
    list.rows.push_back(row);
  }
  list.gate.counters = {static_cast<int64_t*>(memory.add(sizeof(int64_t)))};
  const void* source = memory.add<float>(100, number);
  list.copies = {{memory.add(400), source, 400}};
  return list;
}

void step(Memory& memory, const Kind& kind, bool skipped, int threads) {
  TensorList list = step_list(memory, kind);
  const float found_inf = skipped;
  list.gate.found_inf = &found_inf;
  for (int repeat = 0; repeat < 2; ++repeat) cpu::multi_tensor_apply(list, threads);
}

void clip(Memory& memory, const Kind& kind, bool infinity, int threads) {
  const TensorList list = step_list(memory, kind);
  ClipHyper hyper;
  hyper.max_norm = 0.5, hyper.infinity = infinity;
  TensorList grads;
  for (const TensorRow& row : list.rows) {
    if (row.data[kGrad] != nullptr) grads.rows.push_back(row);
  }
  double* result = static_cast<double*>(memory.add(2 * sizeof(double)));
  cpu::grad_norm(grads, hyper, threads, result);
  cpu::scale_grads(grads, result[1], threads);
}

void pass(Memory& memory, PassKind kind, int streams, DType dtype, bool with_sums, int threads) {
  PassList list;
  list.kind = kind, list.dtype = dtype;
  list.hypers.resize(2);
  int64_t chunks = 0;
  for (uint32_t h = 0; h < 2; ++h) {
    for (double& value : list.hypers[h].numbers) value = 0.25 + h;
    for (const int64_t size : kSizes) {
      PassRow row;
      for (int s = 0; s < streams; ++s) row.data[s] = numbers(memory, dtype, size);
      row.numel = size, row.first_chunk = chunks, row.hyper = h;
      chunks += rules::sum_chunks(size);
      list.rows.push_back(row);
    }
  }
  void* sums = memory.add((2 + chunks) * kPassSums * int64_t(sizeof(double)));
  cpu::run_pass(list, threads, with_sums ? static_cast<double*>(sums) : nullptr);
}

int cases = 0, different = 0;

// Runs it with one thread on the lowest level, and with all others on all levels.
template <typename Run>
void check(const std::string& name, Run run) {
  cpu::set_isa_level(cpu::isa_levels().front());
  Memory expected;
  run(expected, 1);
  for (const std::string& level : cpu::isa_levels()) {
    cpu::set_isa_level(level);
    for (const int threads : {1, 2, 3, 5, 8}) {
      Memory found;
      run(found, threads);
      ++cases;
      if (found == expected) continue;
      ++different;
      std::printf("%s, %s, %d threads: other bits\n", name.c_str(), level.c_str(), threads);
    }
  }
}

void check_everything() {
  for (const Kind& kind : kKinds) {
    const std::string name = kind.name;
    for (const bool skipped : {false, true}) {
      check(name + (skipped ? ", a skipped step" : ", steps"),
            [&](Memory& memory, int threads) { step(memory, kind, skipped, threads); });
    }
  }
  for (const Kind* kind : {&kKinds[0], &kKinds[1], &kKinds[2]}) {
    for (const bool infinity : {false, true}) {
      check(std::string(kind->name) + ", clipping",
            [&](Memory& memory, int threads) { clip(memory, *kind, infinity, threads); });
    }
  }
  struct {
    PassKind kind;
    int streams;
    bool has_sums;
  } const passes[] = {{PassKind::kSgd, 5, false},
                      {PassKind::kSgdBackward, 9, true},
                      {PassKind::kEma, 3, false},
                      {PassKind::kEmaBackward, 5, true}};
  for (const auto& each : passes) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
      for (int with_sums = 0; with_sums <= each.has_sums; ++with_sums) {
        check("pass " + std::to_string(int(each.kind)), [&](Memory& memory, int threads) {
          pass(memory, each.kind, each.streams, dtype, with_sums, threads);
        });
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  planted = argc > 1 && std::strcmp(argv[1], "--plant") == 0;
  if (planted) {
    Memory memory;
    step(memory, kKinds[0], false, 4);
    return 0;
  }
  check_everything();
  std::string levels;
  for (const std::string& level : cpu::isa_levels()) levels += " " + level;
  std::printf("%d cases on%s: %d with other bits than one thread's\n", cases, levels.c_str(),
              different);
  return different == 0 ? 0 : 1;
}
