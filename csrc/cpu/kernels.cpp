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
constexpr int kBlock = 128;

// How far ahead to fetch. The hardware prefetchers stop at page ends and lose track of seven
// streams; on a tensor of 25 million elements this is worth 8 %.
constexpr int kPrefetchBytes = 2048;

template <typename E>
FUSED_OPT_HD void prefetch(const E* tile) {
  const char* ahead = reinterpret_cast<const char*>(tile) + kPrefetchBytes;
  for (int line = 0; line < int(kTile * sizeof(E)); line += 64) __builtin_prefetch(ahead + line);
}

// A tile of a stream as values to compute with: in place for float and double, through a buffer
// for half types.
template <typename E>
struct Tile {
  E* elements;
  FUSED_OPT_HD Tile(E* elements_, int) : elements(elements_) { prefetch(elements); }
  FUSED_OPT_HD E load(int i) const { return elements[i]; }
  FUSED_OPT_HD void store(int i, Compute<E> value) { elements[i] = E(value); }
  FUSED_OPT_HD void flush(int) {}
};

template <typename Half>
struct BufferedTile {
  Half* elements;
  alignas(64) float values[kTile];

  FUSED_OPT_HD BufferedTile(Half* elements_, int count) : elements(elements_) {
    prefetch(elements);
    if (count == kTile) {
      widen_tile(elements, values);
    } else {
      Half padded[kTile] = {};
      std::memcpy(padded, elements, count * sizeof(Half));
      widen_tile(padded, values);
    }
  }
  FUSED_OPT_HD float load(int i) const { return values[i]; }
  FUSED_OPT_HD void store(int i, float value) { values[i] = value; }
  FUSED_OPT_HD void flush(int count) {
    if (count == kTile) {
      narrow_tile(values, elements);
    } else {
      Half padded[kTile];
      narrow_tile(values, padded);
      std::memcpy(elements, padded, count * sizeof(Half));
    }
  }
};

template <>
struct Tile<BFloat16> : BufferedTile<BFloat16> {
  using BufferedTile::BufferedTile;
};
template <>
struct Tile<Float16> : BufferedTile<Float16> {
  using BufferedTile::BufferedTile;
};

template <typename P, typename G>
FUSED_OPT_HD void plain_sgd_tile(const SgdRule<Compute<P>>& rule, P* params, G* grads, int count) {
  Tile<P> param(params, count);
  Tile<G> grad(grads, count);
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    Compute<P> p = param.load(i);
    rule.update(p, grad.load(i));
    param.store(i, p);
  }
  param.flush(count);
}

template <typename P, typename G>
FUSED_OPT_HD void momentum_sgd_tile(const SgdRule<Compute<P>>& rule, P* params, G* grads,
                                    P* velocities, int count) {
  Tile<P> param(params, count);
  Tile<G> grad(grads, count);
  Tile<P> velocity(velocities, count);
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    Compute<P> p = param.load(i), v = velocity.load(i);
    rule.update(p, grad.load(i), v);
    param.store(i, p);
    velocity.store(i, v);
  }
  param.flush(count);
  velocity.flush(count);
}

template <typename P, typename S>
FUSED_OPT_HD void ema_tile(const EmaRule<Compute<P>>& rule, P* params, S* shadows, int count) {
  Tile<P> param(params, count);
  Tile<S> shadow(shadows, count);
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    Compute<P> s = shadow.load(i);
    rule.update(s, param.load(i));
    shadow.store(i, s);
  }
  shadow.flush(count);
}

// Runs whole tiles, whose count the compiler knows, and then the rest.
template <typename Body>
FUSED_OPT_HD void for_tiles(int count, Body body) {
  int i = 0;
  for (; i + kTile <= count; i += kTile) body(i, kTile);
  if (i < count) body(i, count - i);
}

template <typename P, typename G>
void sgd_block(const SgdRule<Compute<P>>& rule, P* params, void* grads, P* velocities, int count) {
  G* g = static_cast<G*>(grads);
  if (velocities == nullptr) {
    for_tiles(count, [&](int i, int n) { plain_sgd_tile(rule, params + i, g + i, n); });
  } else {
    for_tiles(count,
              [&](int i, int n) { momentum_sgd_tile(rule, params + i, g + i, velocities + i, n); });
  }
}

template <typename P, typename S>
void ema_block(const EmaRule<Compute<P>>& rule, P* params, void* shadows, int count) {
  S* s = static_cast<S*>(shadows);
  for_tiles(count, [&](int i, int n) { ema_tile(rule, params + i, s + i, n); });
}

template <typename P>
using SgdBlock = void (*)(const SgdRule<Compute<P>>&, P*, void*, P*, int);
template <typename P>
using EmaBlock = void (*)(const EmaRule<Compute<P>>&, P*, void*, int);

// Which loop serves a gradient or shadow of this dtype beside a parameter of type P. plan.cpp has
// refused all others.
template <typename P>
struct Loops {
  static SgdBlock<P> sgd(DType grad) {
    switch (grad) {
      case DType::kBFloat16:
        return sgd_block<P, BFloat16>;
      case DType::kFloat16:
        return sgd_block<P, Float16>;
      default:
        return sgd_block<P, float>;
    }
  }
  static EmaBlock<P> ema(DType shadow) {
    return shadow == DType::kFloat32 ? ema_block<P, float> : ema_block<P, P>;
  }
};

template <>
struct Loops<double> {
  static SgdBlock<double> sgd(DType) { return sgd_block<double, double>; }
  static EmaBlock<double> ema(DType shadow) {
    return shadow == DType::kFloat32 ? ema_block<double, float> : ema_block<double, double>;
  }
};

template <typename P>
void step_chunk(const TensorRow& row, const Group& group, int64_t begin, int64_t end) {
  const SgdRule<Compute<P>> sgd_rule(group.sgd);
  const EmaRule<Compute<P>> ema_rule(group.decay);
  const SgdBlock<P> sgd = Loops<P>::sgd(row.dtype[kGrad]);
  const EmaBlock<P> ema = Loops<P>::ema(row.dtype[kShadow]);

  for (int64_t i = begin; i < end; i += kBlock) {
    const int count = int(end - i < kBlock ? end - i : kBlock);
    const auto at = [&](Stream stream) -> char* {
      char* data = static_cast<char*>(row.data[stream]);
      return data == nullptr ? nullptr : data + i * element_size(row.dtype[stream]);
    };
    P* params = reinterpret_cast<P*>(at(kParam));
    if (char* grads = at(kGrad)) {
      sgd(sgd_rule, params, grads, reinterpret_cast<P*>(at(kMomentum)), count);
      if (group.reset_grads) std::memset(grads, 0, count * element_size(row.dtype[kGrad]));
    }
    if (char* shadows = at(kShadow)) ema(ema_rule, params, shadows, count);
  }
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
  switch (row.dtype[kParam]) {
    case DType::kFloat32:
      return step_chunk<float>(row, group, begin, end);
    case DType::kFloat64:
      return step_chunk<double>(row, group, begin, end);
    case DType::kBFloat16:
      return step_chunk<BFloat16>(row, group, begin, end);
    case DType::kFloat16:
      return step_chunk<Float16>(row, group, begin, end);
  }
}
