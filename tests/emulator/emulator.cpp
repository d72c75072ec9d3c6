#include "emulator.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "rules/sums.h"

// What kernels declare as `__shared__ char shared[rules::kLaneBytes]`.
namespace fused_opt::cuda {
extern char shared[rules::kLaneBytes];
alignas(16) char shared[rules::kLaneBytes];
}  // namespace fused_opt::cuda

namespace emulator {

Index thread_index, block_index;

namespace {

// --- one block -----------------------------------------------------------------------------------

constexpr unsigned kWarp = 32;
constexpr uint64_t kUndefined = ~uint64_t(0);  // NaN in every floating-point type

struct Thread {
  enum { kReady, kAtBarrier, kAtShuffle, kExited } state = kReady;
  const char* file = nullptr;  // where it waits
  int line = 0;
  // Of a shuffle.
  uint32_t mask = 0;
  unsigned distance = 0;
  uint64_t value = 0;
  // On which it waits or has waited.
  Fiber* fiber = nullptr;

  bool waits() const { return state == kAtBarrier || state == kAtShuffle; }
  bool waits_like(const Thread& other) const {
    return state == other.state && line == other.line && mask == other.mask &&
           std::string(file) == other.file;
  }
};

// Threads run one after the other, each until it waits for others; in what order is up to chance.
class Block {
 public:
  Block(unsigned threads, const std::function<void()>& kernel, std::mt19937_64& random)
      : kernel_(kernel), random_(random), threads_(threads), ready_(threads) {
    std::iota(ready_.begin(), ready_.end(), 0);
  }

  void run() {
    running = this;
    while (!ready_.empty()) {
      std::shuffle(ready_.begin(), ready_.end(), random_);
      run_ready();
      ready_.clear();
      release_warps();
      if (ready_.empty()) release_block();
    }
  }

  // On a fiber: lets others run until this thread is released.
  uint64_t wait(Thread waiting) {
    const unsigned index = thread_index.x;
    waiting.fiber = Fiber::current();
    threads_[index] = waiting;
    waiting.fiber->pause();
    thread_index.x = index;
    return threads_[index].value;
  }

  inline static Block* running = nullptr;

 private:
  // A fiber runs new threads one after the other until one of them has to wait, and is that
  // thread's from then on. So a kernel without barriers switches no stacks.
  void run_ready() {
    next_ = 0;
    while (next_ < ready_.size()) {
      Fiber* fiber = threads_[ready_[next_]].fiber;
      if (fiber != nullptr) {
        ++next_;
      } else {
        fiber = idle_fiber();
      }
      fiber->resume();
    }
  }

  void run_new_threads() {
    while (next_ < ready_.size() && threads_[ready_[next_]].fiber == nullptr) {
      const unsigned index = ready_[next_++];
      thread_index.x = index;
      kernel_();
      threads_[index].state = Thread::kExited;
    }
    idle_.push_back(Fiber::current());
  }

  static Fiber* idle_fiber() {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>([] { running->run_new_threads(); }));
      return fibers_.back().get();
    }
    Fiber* const fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }

  // Lets those warps go on whose threads have met at a shuffle.
  void release_warps() {
    for (unsigned t = 0; t < threads_.size(); ++t) {
      if (threads_[t].state == Thread::kAtShuffle && has_met(t)) shuffle(t);
    }
  }

  // Calls visit(lane, thread) for the lanes of the mask with which a thread waits.
  template <typename Visit>
  void for_each_lane(unsigned waiting, Visit visit) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (threads_[waiting].mask >> lane & 1) visit(lane, waiting / kWarp * kWarp + lane);
    }
  }

  bool has_met(unsigned waiting) {
    bool met = true;
    for_each_lane(waiting, [&](unsigned, unsigned t) {
      met = met && t < threads_.size() && threads_[t].waits_like(threads_[waiting]);
    });
    return met;
  }

  void shuffle(unsigned waiting) {
    uint64_t values[kWarp];
    std::fill_n(values, kWarp, kUndefined);
    for_each_lane(waiting, [&](unsigned lane, unsigned t) { values[lane] = threads_[t].value; });
    for_each_lane(waiting, [&](unsigned lane, unsigned t) {
      const unsigned from = lane + threads_[t].distance;
      threads_[t].value = values[from < kWarp ? from : lane];
      threads_[t].state = Thread::kReady;
      ready_.push_back(t);
    });
  }

  // Lets all go on if they have met at one barrier. Those that have exited are not waited for, as
  // on all GPUs since compute capability 7.0.
  void release_block() {
    const Thread* first = nullptr;
    for (unsigned t = 0; t < threads_.size(); ++t) {
      Thread& thread = threads_[t];
      if (!thread.waits()) continue;
      if (first == nullptr) first = &thread;
      if (!thread.waits_like(*first) || thread.state == Thread::kAtShuffle) fail();
      ready_.push_back(t);
    }
    for (unsigned t : ready_) threads_[t].state = Thread::kReady;
  }

  [[noreturn]] void fail() {
    idle_.clear();
    fibers_.clear();
    std::map<std::string, unsigned> places;
    for (unsigned t = 0; t < threads_.size(); ++t) {
      const std::string file = threads_[t].waits() ? threads_[t].file : "";
      if (file.empty()) continue;
      places.emplace(file.substr(file.rfind('/') + 1) + ":" + std::to_string(threads_[t].line), t);
    }
    std::string message = "not all threads of a block reach the same barrier or shuffle:";
    for (const auto& [place, t] : places) message += " thread " + std::to_string(t) + " " + place;
    throw std::runtime_error(message);
  }

  inline static std::vector<std::unique_ptr<Fiber>> fibers_;
  inline static std::vector<Fiber*> idle_;

  const std::function<void()>& kernel_;
  std::mt19937_64& random_;
  std::vector<Thread> threads_;
  std::vector<unsigned> ready_;
  size_t next_ = 0;  // of them to run
};

// --- the device ----------------------------------------------------------------------------------

// What tests ask for, and what they are told.
struct Device {
  std::recursive_mutex mutex;  // around all that follows, and around a kernel that runs
  std::mt19937_64 random;
  bool chooses_blocks = false;
  std::vector<unsigned> chosen_blocks;
  int64_t launches = 0, blocks = 0, largest_parameters = 0;
  std::map<std::string, int> errors;
  std::set<const void*> loaded;
};

Device& device() {
  static Device* const instance = new Device;  // never freed: threads may outlive the module
  return *instance;
}

using Lock = std::lock_guard<std::recursive_mutex>;

void run_grid(const Launch& launch, const std::function<void()>& kernel) {
  const Lock lock(device().mutex);
  std::vector<unsigned> blocks = device().chosen_blocks;
  if (!device().chooses_blocks) {
    blocks.resize(launch.grid.x);
    std::iota(blocks.begin(), blocks.end(), 0);
  }
  std::shuffle(blocks.begin(), blocks.end(), device().random);
  for (const unsigned block : blocks) {
    if (block >= launch.grid.x) continue;
    std::fill(std::begin(fused_opt::cuda::shared), std::end(fused_opt::cuda::shared),
              char(kUndefined));
    block_index.x = block;
    Block(launch.block.x, kernel, device().random).run();
    ++device().blocks;
  }
}

thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local size_t unfinished = 0;  // what this thread has enqueued and not run, on any stream

// As if every stream were being captured, since any may be: CUDA must not load a kernel then.
cudaError_t check_launch(const Launch& launch) {
  if (!device().loaded.count(launch.kernel)) return cudaErrorStreamCaptureUnsupported;
  if (launch.parameter_bytes > 32764) return cudaErrorInvalidValue;
  const uint64_t threads = uint64_t(launch.block.x) * launch.block.y * launch.block.z;
  const bool is_line = launch.grid.y == 1 && launch.grid.z == 1 && launch.block.x == threads;
  if (!is_line) return cudaErrorInvalidConfiguration;  // CUDA has more; the kernels here have not
  if (launch.grid.x < 1 || launch.grid.x > 0x7fffffffu) return cudaErrorInvalidConfiguration;
  if (threads < 1 || threads > 1024) return cudaErrorInvalidConfiguration;
  if (launch.shared_bytes != 0) return cudaErrorInvalidValue;
  return cudaSuccess;
}

}  // namespace
}  // namespace emulator

// --- streams -------------------------------------------------------------------------------------

struct CUstream_st {
  std::deque<std::function<void()>> work;

  CUstream_st() = default;
  CUstream_st(const CUstream_st&) = delete;
  ~CUstream_st() { drop(); }

  void add(std::function<void()> item) {
    work.push_back(std::move(item));
    ++emulator::unfinished;
  }
  void run() {
    while (!work.empty()) {
      const std::function<void()> item = std::move(work.front());
      work.pop_front();
      --emulator::unfinished;
      item();
    }
  }
  void drop() {
    emulator::unfinished -= work.size();
    work.clear();
  }
};

namespace emulator {
namespace {

// The null stream, which nothing here ever synchronises with.
CUstream_st& legacy_stream() {
  static thread_local CUstream_st stream;
  return stream;
}

}  // namespace

int enqueue(const Launch& launch, CUstream_st* stream, std::function<void()> run) {
  const Lock lock(device().mutex);
  const int error = error_of("cudaLaunchKernel");
  if (error != cudaSuccess) return error;
  const cudaError_t status = check_launch(launch);
  if (status != cudaSuccess) return status;
  ++device().launches;
  device().largest_parameters =
      std::max(device().largest_parameters, int64_t(launch.parameter_bytes));
  return enqueue(stream, [=] { run_grid(launch, run); });
}

int enqueue(CUstream_st* stream, std::function<void()> work) {
  (stream == nullptr ? legacy_stream() : *stream).add(std::move(work));
  return cudaSuccess;
}

void run_on_stream(const std::function<void(CUstream_st*)>& enqueue_all) {
  const size_t before = unfinished;
  CUstream_st stream;
  enqueue_all(&stream);
  stream.run();
  if (capture_mode != cudaStreamCaptureModeGlobal) {
    capture_mode = cudaStreamCaptureModeGlobal;
    throw std::runtime_error("the capture mode of the thread was not restored");
  }
  if (unfinished != before) {
    legacy_stream().drop();
    throw std::runtime_error("work was enqueued on another stream than the one that was asked for");
  }
}

int error_of(const char* function) {
  const Lock lock(device().mutex);
  return std::exchange(device().errors[function], 0);
}

int exchange_capture_mode(int mode) {
  return std::exchange(capture_mode, cudaStreamCaptureMode(mode));
}

int load(const void* kernel) {
  const Lock lock(device().mutex);
  const int error = error_of("cudaFuncGetAttributes");
  if (error != cudaSuccess) return error;
  if (capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  device().loaded.insert(kernel);
  return cudaSuccess;
}

void wait_for_block(const char* file, int line) {
  Thread thread;
  thread.state = Thread::kAtBarrier;
  thread.file = file;
  thread.line = line;
  Block::running->wait(thread);
}

uint64_t shift_down(uint32_t mask, uint64_t value, unsigned distance, const char* file, int line) {
  Thread thread;
  thread.state = Thread::kAtShuffle;
  thread.file = file;
  thread.line = line;
  thread.mask = mask;
  thread.value = value;
  thread.distance = distance;
  return Block::running->wait(thread);
}

}  // namespace emulator

// --- what tests call through ctypes; tests/emulated.py has the Python of it ----------------------

#define FOR_TESTS extern "C" __attribute__((visibility("default")))

using namespace emulator;

FOR_TESTS void emulator_seed(uint64_t seed) {
  const Lock lock(device().mutex);
  device().random.seed(seed);
}

// From now on, runs these blocks of every grid and no others; all, if `blocks` is null.
FOR_TESTS void emulator_choose_blocks(const uint32_t* blocks, int64_t count) {
  const Lock lock(device().mutex);
  device().chooses_blocks = blocks != nullptr;
  device().chosen_blocks.assign(blocks, blocks + count);
}

// Makes the next call of a function of CUDA fail.
FOR_TESTS void emulator_fail(const char* function, int error) {
  const Lock lock(device().mutex);
  device().errors[function] = error;
}

// Tells how many launches there were, how many blocks ran, and the most bytes of parameters; and
// counts from 0 again.
FOR_TESTS void emulator_counts(int64_t (*counts)[3]) {
  const Lock lock(device().mutex);
  (*counts)[0] = std::exchange(device().launches, 0);
  (*counts)[1] = std::exchange(device().blocks, 0);
  (*counts)[2] = std::exchange(device().largest_parameters, 0);
}

FOR_TESTS CUstream_st* emulator_new_stream() { return new CUstream_st; }
FOR_TESTS void emulator_run_stream(CUstream_st* stream) { stream->run(); }
FOR_TESTS void emulator_delete_stream(CUstream_st* stream) { delete stream; }
