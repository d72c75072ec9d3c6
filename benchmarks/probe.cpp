// The CPU probe of the memory roof: the least arithmetic over the streams of an optimizer step.
// roof.py compiles it at run time and calls it through ctypes.

#include <algorithm>
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
