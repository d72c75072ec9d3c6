#include "multi_tensor_apply.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "../rules/norm.h"
#include "../rules/sums.h"
#include "kernels.h"

namespace fused_opt::cpu {
namespace {

struct IsaLevel {
  const char* name;
  Kernels kernels;
};

std::vector<IsaLevel> supported_levels() {
  std::vector<IsaLevel> levels = {{"baseline", fused_opt_kernels_baseline()}};
#if FUSED_OPT_ISA_LEVELS > 1
  if (__builtin_cpu_supports("x86-64-v3")) {
    levels.push_back({"x86-64-v3", fused_opt_kernels_x86_64_v3()});
  }
  if (__builtin_cpu_supports("x86-64-v4")) {
    levels.push_back({"x86-64-v4", fused_opt_kernels_x86_64_v4()});
  }
#endif
  return levels;
}

const std::vector<IsaLevel>& levels() {
  static const std::vector<IsaLevel> supported = supported_levels();
  return supported;
}

const IsaLevel*& current_level() {
  static const IsaLevel* current = &levels().back();
  return current;
}

// Below this many elements a second thread costs more to wake than it saves; torch's grain too.
constexpr int64_t kElementsPerThread = 32768;

// What starting a row costs, in elements.
constexpr int64_t kRowCost = 512;

// Whether this process is a fork of another.
std::atomic<bool> is_forked{false};
[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { is_forked.store(true, std::memory_order_relaxed); });

// Runs what has a team of threads. libgomp keeps a team for each thread that has had one, and waits
// for it at the next: in a fork, where only the thread that forked goes on, for ever. A new thread
// gets a new team.
template <typename Call>
void run_team(const Call& call) {
  if (!is_forked.load(std::memory_order_relaxed)) return call();
  std::thread(call).join();
}

// Where one thread's share ends and the next begins.
struct Position {
  size_t row;
  int64_t element;
};

// Cuts inside a row keep to whole cache lines, so that threads never write to the same one.
constexpr int64_t kCutElements = 64;

// Shares all rows out among threads. They are cut only at multiples of `cut` elements.
template <typename Row, typename Body>
class Shares {
 public:
  Shares(const std::vector<Row>& rows, int64_t cut, Body body)
      : rows_(rows), cut_(cut), body_(body), cost_before_(rows_.size() + 1, 0) {
    for (size_t r = 0; r < rows_.size(); ++r) {
      cost_before_[r + 1] = cost_before_[r] + rows_[r].numel + kRowCost;
    }
  }

  void run(int threads) const {
    const int64_t cost = cost_before_.back();
    threads = int(std::min<int64_t>(threads, cost / kElementsPerThread + 1));
    if (threads <= 1) return run({0, 0}, {rows_.size(), 0});
    run_team([&] {
#pragma omp parallel num_threads(threads)
      {
        const int thread = omp_get_thread_num();
        const int team = omp_get_num_threads();  // may be fewer than asked for
        run(position_of(cost * thread / team), position_of(cost * (thread + 1) / team));
      }
    });
  }

 private:
  Position position_of(int64_t cost) const {
    const auto after = std::upper_bound(cost_before_.begin(), cost_before_.end(), cost);
    const size_t row = after - cost_before_.begin() - 1;
    if (row == rows_.size()) return {row, 0};
    const int64_t element = (cost - cost_before_[row]) / cut_ * cut_;
    return {row, std::min(element, rows_[row].numel)};
  }

  void run(Position begin, Position end) const {
    for (size_t r = begin.row; r < rows_.size() && r <= end.row; ++r) {
      const int64_t first = r == begin.row ? begin.element : 0;
      const int64_t last = r == end.row ? end.element : rows_[r].numel;
      if (first < last) body_(r, first, last);
    }
  }

  const std::vector<Row>& rows_;
  const int64_t cut_;
  const Body body_;
  std::vector<int64_t> cost_before_;
};

// Sums what `count` chunks have left, every `stride` doubles.
template <typename Rule>
double total(const Rule& rule, const double* sums, int64_t count, int stride = 1) {
  constexpr int kLanes = rules::kLanes<double>;
  double lanes[kLanes];
  const int used = int(std::min<int64_t>(count, kLanes));
  std::fill_n(lanes, std::max(used, 1), 0.0);
  for (int64_t i = 0; i < count; ++i) rule.join(lanes[i % kLanes], sums[i * stride]);
  rules::fold<kLanes>(rule, lanes, used);
  return lanes[0];
}

// All that a skipped step does to a row: infinite gradients must not stay.
void reset_grad(const TensorRow& row, const Group& group, int64_t begin, int64_t end) {
  if (!group.reset_grads || row.data[kGrad] == nullptr) return;
  const int bytes = element_size(row.dtype[kGrad]);
  std::memset(static_cast<char*>(row.data[kGrad]) + begin * bytes, 0, (end - begin) * bytes);
}

}  // namespace

void multi_tensor_apply(const TensorList& list, int threads) {
  const Kernels& kernels = current_level()->kernels;
  std::vector<Group> groups = list.groups;
  for (Group& group : groups) group.read_scalars();
  const rules::AverageRule rule(list.average_steps);
  std::vector<double> decays;
  for (const AverageHyper& average : list.averages) decays.push_back(rule.decay(average));
  const Averages averages = {decays.data(), rule.due ? int(decays.size()) : 0,
                             list.more_shadows.data()};
  const bool skipped = is_skipped(list.gate.found_inf);
  const auto step = [&](size_t r, int64_t begin, int64_t end) {
    const Group& group = groups[list.rows[r].group];
    if (skipped) return reset_grad(list.rows[r], group, begin, end);
    kernels.step(list.rows[r], group, averages, begin, end);
  };
  Shares(list.rows, kCutElements, step).run(threads);
  if (rule.due && !skipped) {
    for (const ByteCopy& copy : list.copies) std::memcpy(copy.target, copy.source, copy.bytes);
  }
  for (int64_t* counter : list.gate.counters) *counter += !skipped;
}

void grad_norm(const TensorList& grads, ClipHyper hyper, int threads, double* result) {
  hyper.read_scalars();
  const Kernels& kernels = current_level()->kernels;
  std::vector<int64_t> first_chunk;
  int64_t chunks = 0;
  for (const TensorRow& row : grads.rows) {
    first_chunk.push_back(chunks);
    chunks += rules::sum_chunks(row.numel);
  }
  std::vector<double> sums(chunks, 0.0);
  const auto norm = [&](size_t r, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += rules::kSumChunk) {
      sums[first_chunk[r] + i / rules::kSumChunk] = kernels.norm(
          grads.rows[r], hyper.infinity, i, std::min<int64_t>(end, i + rules::kSumChunk));
    }
  };
  Shares(grads.rows, rules::kSumChunk, norm).run(threads);
  const rules::NormRule<double> norm_rule = {hyper.infinity};
  const rules::ClipRule rule(hyper, total(norm_rule, sums.data(), chunks));
  result[0] = rule.norm, result[1] = rule.coefficient;
}

void run_pass(PassList list, int threads, double* sums) {
  for (PassHyper& hyper : list.hypers) hyper.read_scalars();
  const Kernels& kernels = current_level()->kernels;
  double* const of_chunks = sums == nullptr ? nullptr : sums + list.hypers.size() * kPassSums;
  const auto pass = [&](size_t r, int64_t begin, int64_t end) {
    const PassRow& row = list.rows[r];
    double* const own = sums == nullptr ? nullptr : of_chunks + row.first_chunk * kPassSums;
    kernels.pass(list.kind, list.dtype, row, list.hypers[row.hyper], begin, end, own);
  };
  Shares(list.rows, sums == nullptr ? kCutElements : rules::kSumChunk, pass).run(threads);
  if (sums == nullptr) return;
  const std::vector<int64_t> bounds = list.chunk_bounds();
  for (size_t h = 0; h < list.hypers.size(); ++h) {
    for (int k = 0; k < kPassSums; ++k) {
      const double* const own = of_chunks + bounds[h] * kPassSums + k;
      const int64_t count = bounds[h + 1] - bounds[h];
      sums[h * kPassSums + k] = total(rules::SumRule<double>(), own, count, kPassSums);
    }
  }
}

void scale_grads(const TensorList& grads, double coefficient, int threads) {
  if (coefficient == 1) return;
  const Kernels& kernels = current_level()->kernels;
  const auto scale = [&](size_t r, int64_t begin, int64_t end) {
    kernels.scale(grads.rows[r], coefficient, begin, end);
  };
  Shares(grads.rows, kCutElements, scale).run(threads);
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const IsaLevel& level : levels()) names.push_back(level.name);
  return names;
}

std::string isa_level() { return current_level()->name; }

void set_isa_level(const std::string& name) {
  for (const IsaLevel& level : levels()) {
    if (level.name == name) {
      current_level() = &level;
      return;
    }
  }
  throw std::invalid_argument("this machine or build has no CPU level named '" + name + "'");
}

}  // namespace fused_opt::cpu
