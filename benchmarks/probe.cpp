// The CPU probe of the memory roof, the least arithmetic over the streams of an optimizer step; and
// what empties the caches before a sample. native.py compiles this file at run time.

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

constexpr std::int64_t kBlock = 64;  // elements between two rounds of prefetches
constexpr std::int64_t kLine = 16;   // floats in a cache line

// w <- r - w for each written stream w: done twice it restores w, so values never drift.
template <int kWritten>
void flip(float* const* written, const float* read, std::int64_t begin, std::int64_t end,
          std::int64_t ahead) {
  float* w[kWritten];
  std::copy(written, written + kWritten, w);
  for (std::int64_t i = begin; i < end; i += kBlock) {
    if (ahead > 0) {
      for (std::int64_t j = i + ahead; j < i + ahead + kBlock; j += kLine) {
        for (int k = 0; k < kWritten; ++k) __builtin_prefetch(w[k] + j, 1);
        __builtin_prefetch(read + j, 0);
      }
    }
    const std::int64_t stop = std::min(end, i + kBlock);
#pragma GCC ivdep
    for (std::int64_t j = i; j < stop; ++j) {
      const float r = read[j];
      for (int k = 0; k < kWritten; ++k) w[k][j] = r - w[k][j];
    }
  }
}

template <int kWritten>
void flip_parallel(float* const* written, const float* read, std::int64_t n, std::int64_t ahead,
                   int threads) {
  const std::int64_t share = (n / threads / kBlock + 1) * kBlock;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    flip<kWritten>(written, read, std::min(n, t * share), std::min(n, (t + 1) * share), ahead);
  }
}

}  // namespace

// Two written streams are SGD's (parameter, momentum), one more is each EMA's shadow.
extern "C" void probe(float* const* written, int streams, const float* read, std::int64_t n,
                      std::int64_t ahead, int threads) {
  if (streams == 1) flip_parallel<1>(written, read, n, ahead, threads);
  if (streams == 2) flip_parallel<2>(written, read, n, ahead, threads);
  if (streams == 3) flip_parallel<3>(written, read, n, ahead, threads);
  if (streams == 5) flip_parallel<5>(written, read, n, ahead, threads);
}

// Drives memory out of all caches, line by line. Returns false where the processor has no
// instruction for that.
extern "C" bool evict(const char* const* begin, const std::int64_t* bytes, std::int64_t count) {
#if defined(__x86_64__) || defined(__aarch64__)
  constexpr std::int64_t kLineBytes = 64;
  for (std::int64_t i = 0; i < count; ++i) {
    for (const char* p = begin[i]; p < begin[i] + bytes[i]; p += kLineBytes) {
#if defined(__CLFLUSHOPT__)
      __builtin_ia32_clflushopt(const_cast<char*>(p));
#elif defined(__x86_64__)
      __builtin_ia32_clflush(p);
#else
      asm volatile("dc civac, %0" ::"r"(p) : "memory");
#endif
    }
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);  // flushes are done before what follows
  return true;
#else
  return false;
#endif
}
