// The CPU loops. This unit is compiled once per ISA level and exports one function; everything
// else in it is local or inlined (see kernels.h), so no std containers or algorithms here.
#include "kernels.h"

#include <cstring>

#include "../rules/ema.h"
#include "../rules/sgd.h"
#include "dtypes.h"

namespace fused_opt::cpu {
namespace {

using rules::EmaRule;
using rules::SgdRule;

// Elements that all streams of a row pass through the L1 cache together: the shadow's loop finds
// the new parameter there, not in memory. A short block keeps the fetches of all streams mixed:
// 1024 elements are 5 % slower, and a single loop over all streams is no faster.

// How far ahead to fetch. The hardware prefetchers stop at page ends and lose track of seven
// streams; on a tensor of 25 million elements this is worth 8 %.
constexpr int kPrefetchBytes = 2048;

FUSED_OPT_HD void prefetch(const char* tile, int bytes) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(tile + kPrefetchBytes + line);
}

// A tile of a stream as numbers of T to compute with. Where the stream is of T itself they are its
// own memory, and elsewhere a converted copy. Which it is is asked once a tile, so that any mixture
// of dtypes runs in the same loops.
template <typename T>
class Tile {
 public:
  FUSED_OPT_HD Tile(char* data, DType dtype, int count)
      : data_(data), dtype_(dtype), count_(count) {
    prefetch(data, kTile * element_size(dtype));
    if (in_place()) {
      values_ = reinterpret_cast<T*>(data);
      return;
    }
    values_ = buffer_;
    reload();
  }
  Tile(const Tile&) = delete;

  FUSED_OPT_HD T* values() { return values_; }

  FUSED_OPT_HD void reload() {
    if (!in_place()) visit([this](auto* elements) { widen(elements); });
  }

  // Stores the values back.
  FUSED_OPT_HD void flush() {
    if (!in_place()) visit([this](auto* elements) { narrow(elements); });
  }

 private:
  FUSED_OPT_HD bool in_place() const {
    return dtype_ == (sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32);
  }

  // Calls body with the elements as what they are. plan.cpp has refused all other dtypes.
  template <typename Body>
  FUSED_OPT_HD void visit(Body body) {
    if constexpr (sizeof(T) == sizeof(double)) {
      body(reinterpret_cast<float*>(data_));
    } else if (dtype_ == DType::kBFloat16) {
      body(reinterpret_cast<BFloat16*>(data_));
    } else {
      body(reinterpret_cast<Float16*>(data_));
    }
  }

  // Whole tiles are converted in loops whose length the compiler knows; the rest is padded.
  template <typename E>
  FUSED_OPT_HD void widen(const E* elements) {
    if (count_ == kTile) return widen_tile(elements, buffer_);
    E padded[kTile] = {};
    std::memcpy(padded, elements, count_ * sizeof(E));
    widen_tile(padded, buffer_);
  }
  template <typename E>
  FUSED_OPT_HD void narrow(E* elements) {
    if (count_ == kTile) return narrow_tile(buffer_, elements);
    E padded[kTile];
    narrow_tile(buffer_, padded);
    std::memcpy(elements, padded, count_ * sizeof(E));
  }

  char* data_;
  DType dtype_;
  int count_;
  T* values_;
  alignas(64) T buffer_[kTile];
};

template <typename T>
FUSED_OPT_HD void sgd_tile(const SgdRule<T>& rule, Tile<T>& param, Tile<T>& grad, int count) {
  T *p = param.values(), *g = grad.values();
#pragma omp simd
  for (int i = 0; i < count; ++i) rule.update(p[i], g[i]);
}

template <typename T>
FUSED_OPT_HD void sgd_tile(const SgdRule<T>& rule, Tile<T>& param, Tile<T>& grad, Tile<T>& momentum,
                           int count) {
  T *p = param.values(), *g = grad.values(), *v = momentum.values();
#pragma omp simd
  for (int i = 0; i < count; ++i) rule.update(p[i], g[i], v[i]);
}

template <typename T>
FUSED_OPT_HD void ema_tile(const EmaRule<T>& rule, Tile<T>& param, Tile<T>& shadow, int count) {
  T *p = param.values(), *s = shadow.values();
#pragma omp simd
  for (int i = 0; i < count; ++i) rule.update(s[i], p[i]);
}

// Updates `count` elements from `first` on.
template <typename T>
FUSED_OPT_HD void step_tile(const SgdRule<T>& sgd, const EmaRule<T>& ema, const TensorRow& row,
                            bool reset_grads, int64_t first, int count) {
  const auto at = [&](Stream stream) {
    return static_cast<char*>(row.data[stream]) + first * element_size(row.dtype[stream]);
  };
  const auto has = [&](Stream stream) { return row.data[stream] != nullptr; };

  Tile<T> param(at(kParam), row.dtype[kParam], count);
  if (has(kGrad)) {
    Tile<T> grad(at(kGrad), row.dtype[kGrad], count);
    if (has(kMomentum)) {
      Tile<T> momentum(at(kMomentum), row.dtype[kMomentum], count);
      sgd_tile(sgd, param, grad, momentum, count);
      momentum.flush();
    } else {
      sgd_tile(sgd, param, grad, count);
    }
    param.flush();
    if (has(kShadow)) param.reload();  // the average follows what was stored
    if (reset_grads) std::memset(at(kGrad), 0, count * element_size(row.dtype[kGrad]));
  }
  if (has(kShadow)) {
    Tile<T> shadow(at(kShadow), row.dtype[kShadow], count);
    ema_tile(ema, param, shadow, count);
    shadow.flush();
  }
}

template <typename T>
void step_chunk(const TensorRow& row, const Group& group, int64_t begin, int64_t end) {
  const SgdRule<T> sgd(group.sgd);
  const EmaRule<T> ema(group.decay);
  int64_t i = begin;
  // Whole tiles, whose count the compiler knows, and then the rest.
  for (; i + kTile <= end; i += kTile) step_tile(sgd, ema, row, group.reset_grads, i, kTile);
  if (i < end) step_tile(sgd, ema, row, group.reset_grads, i, int(end - i));
}

}  // namespace
}  // namespace fused_opt::cpu

#define FUSED_OPT_CONCAT_(a, b) a##b
#define FUSED_OPT_CONCAT(a, b) FUSED_OPT_CONCAT_(a, b)

extern "C" void FUSED_OPT_CONCAT(fused_opt_kernels_, FUSED_OPT_ISA)(const fused_opt::TensorRow& row,
                                                                    const fused_opt::Group& group,
                                                                    int64_t begin, int64_t end) {
  using namespace fused_opt;
  using namespace fused_opt::cpu;
  if (row.dtype[kParam] == DType::kFloat64) return step_chunk<double>(row, group, begin, end);
  step_chunk<float>(row, group, begin, end);
}
