// The CPU loops. This unit is compiled once per ISA level and exports one function; everything
// else in it is local or inlined (see kernels.h), so no std containers or algorithms here.
#include "kernels.h"

#include <cstring>

#include "../rules/ema.h"
#include "../rules/norm.h"
#include "../rules/rounding.h"
#include "../rules/sgd.h"
#include "dtypes.h"
#include "pass_loop.h"

namespace fused_opt::cpu {
namespace {

using rules::EmaRule;
using rules::NormRule;
using rules::RoundingRule;
using rules::SgdRule;

// Where a tile of a row lies.
struct Place {
  const TensorRow& row;
  const DType* dtypes;  // of the row: its own, or constants that they equal
  int64_t first;
  int count;  // at most kTile

  FUSED_OPT_HD bool has(Stream stream) const { return row.data[stream] != nullptr; }
  FUSED_OPT_HD DType dtype(Stream stream) const { return dtypes[stream]; }
  FUSED_OPT_HD char* at(Stream stream) const { return in(row.data[stream], stream); }
  // In other memory of that stream's dtype.
  FUSED_OPT_HD char* in(void* data, Stream stream) const {
    return static_cast<char*>(data) + first * element_size(dtypes[stream]);
  }
};

// Elements of a tile, always kTile of them, so that whoever runs over them has loops whose length
// the compiler knows: the stream's own and, where that ends, a padded copy.
template <typename E>
class FullTile {
 public:
  FUSED_OPT_HD FullTile(char* data, int count) : own_(reinterpret_cast<E*>(data)), count_(count) {}
  FullTile(const FullTile&) = delete;

  FUSED_OPT_HD const E* read() {
    if (count_ == kTile) return own_;
    for (int i = 0; i < kTile; ++i) padded_[i] = E{};
    std::memcpy(padded_, own_, count_ * sizeof(E));
    return padded_;
  }
  // Where to write; done() when written.
  FUSED_OPT_HD E* write() { return count_ == kTile ? own_ : padded_; }
  FUSED_OPT_HD void done() {
    if (count_ != kTile) std::memcpy(own_, padded_, count_ * sizeof(E));
  }

 private:
  E* own_;
  int count_;
  E padded_[kTile];
};

// A tile of a stream as numbers of T to compute with. Where the stream is of T itself they are its
// own memory, and elsewhere a converted copy. Which it is is asked once a tile, so that any mixture
// of dtypes runs in the same loops.
template <typename T>
class Tile {
 public:
  FUSED_OPT_HD Tile(const Place& place, Stream stream)
      : Tile(place, stream, stream, place.row.data[stream]) {}

  // Of another tensor than the row's, which has the dtype of that stream and is rounded by a number
  // of its own.
  FUSED_OPT_HD Tile(const Place& place, Stream alike, Stream number, void* data)
      : place_(place), stream_(number), data_(place.in(data, alike)), dtype_(place.dtype(alike)) {
    prefetch(data_, kTile * element_size(dtype_));
    values_ = in_place() ? reinterpret_cast<T*>(data_) : buffer_;
  }
  Tile(const Tile&) = delete;

  FUSED_OPT_HD T* values() { return values_; }

  FUSED_OPT_HD void load() {
    if (in_place()) return;
    visit([this](auto full) { widen_tile(full->read(), buffer_); });
  }

  FUSED_OPT_HD void store(const RoundingRule& rounding = {}) {
    if (in_place()) return;
    if (rounding.stochastic) round(rounding);
    visit([this](auto full) {
      narrow_tile(buffer_, full->write());
      full->done();
    });
  }

 private:
  FUSED_OPT_HD bool in_place() const {
    return dtype_ == (sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32);
  }

  FUSED_OPT_HD void round(const RoundingRule& rounding) {
    if constexpr (sizeof(T) == sizeof(float)) {
      const auto key = rounding.key(place_.row.ordinal, stream_, place_.first);
      const uint32_t offset = uint32_t(place_.first);
      if (dtype_ == DType::kBFloat16) {
        round_tile<BFloat16>(buffer_, key, offset);
      } else {
        round_tile<Float16>(buffer_, key, offset);
      }
    }
  }

  // Calls body with the elements as what they are. plan.cpp has refused all other dtypes.
  template <typename Body>
  FUSED_OPT_HD void visit(Body body) {
    if constexpr (sizeof(T) == sizeof(double)) {
      FullTile<float> full(data_, place_.count);
      body(&full);
    } else if (dtype_ == DType::kBFloat16) {
      FullTile<BFloat16> full(data_, place_.count);
      body(&full);
    } else {
      FullTile<Float16> full(data_, place_.count);
      body(&full);
    }
  }

  const Place place_;
  const Stream stream_;
  char* data_;
  DType dtype_;
  T* values_;
  alignas(64) T buffer_[kTile];
};

// A tile of parameters as the numbers that a step updates: the stored ones or, with a refinement,
// the exact ones. What a refinement keeps is rounded to nearest.
template <typename T>
class Weights {
 public:
  FUSED_OPT_HD explicit Weights(const Place& place) : place_(place), param_(place, kParam) {
    values_ = param_.values();
    param_.load();
  }
  FUSED_OPT_HD T* values() { return values_; }

  // Afterwards the values are what the average follows: the parameters as stored.
  FUSED_OPT_HD void store(const RoundingRule& rounding) {
    param_.store(rounding);
    if (place_.has(kShadow)) param_.load();
  }

 private:
  Place place_;
  Tile<T> param_;
  T* values_;
};

// With the whole master in float32. The average follows the master.
class MasterWeights {
 public:
  FUSED_OPT_HD explicit MasterWeights(const Place& place)
      : place_(place), master_(place, kRefinement), param_(place, kParam) {}
  FUSED_OPT_HD float* values() { return master_.values(); }

  FUSED_OPT_HD void store(const RoundingRule&) {
    FullTile<float> masters(place_.at(kRefinement), place_.count);
    if (place_.dtype(kParam) == DType::kBFloat16) {
      FullTile<BFloat16> params(place_.at(kParam), place_.count);
      masters.read();
      narrow_master_tile(masters.write(), params.write());
      masters.done();
      params.done();
    } else {
      std::memcpy(param_.values(), masters.read(), kTile * sizeof(float));
      param_.store();
    }
  }

 private:
  Place place_;
  Tile<float> master_, param_;
};

// With the lower half of the master beside the parameter, which is the upper one.
class SplitWeights {
 public:
  FUSED_OPT_HD explicit SplitWeights(const Place& place)
      : params_(place.at(kParam), place.count), residuals_(place.at(kRefinement), place.count) {
    prefetch(place.at(kParam), kTile * sizeof(BFloat16));
    prefetch(place.at(kRefinement), kTile * sizeof(uint16_t));
    join_tile(params_.read(), residuals_.read(), masters_);
  }
  FUSED_OPT_HD float* values() { return masters_; }

  FUSED_OPT_HD void store(const RoundingRule&) {
    split_tile(masters_, params_.write(), residuals_.write());
    params_.done();
    residuals_.done();
  }

 private:
  FullTile<BFloat16> params_;
  FullTile<uint16_t> residuals_;
  alignas(64) float masters_[kTile];
};

// With a compensation. The average follows the parameter as stored.
class CompensatedWeights {
 public:
  FUSED_OPT_HD explicit CompensatedWeights(const Place& place)
      : param_(place, kParam), compensation_(place, kRefinement) {
    param_.load();
    if (!place.has(kGrad)) return;
    compensation_.load();
    float *p = param_.values(), *c = compensation_.values();
#pragma omp simd
    for (int i = 0; i < kTile; ++i) p[i] += c[i];
  }
  FUSED_OPT_HD float* values() { return param_.values(); }

  FUSED_OPT_HD void store(const RoundingRule&) {
    float *p = param_.values(), *c = compensation_.values();
    std::memcpy(c, p, kTile * sizeof(float));
    param_.store();
    param_.load();
#pragma omp simd
    for (int i = 0; i < kTile; ++i) c[i] = rules::compensation_of(c[i], p[i]);
    compensation_.store();
  }

 private:
  Tile<float> param_, compensation_;
};

// The rules of a row, in the arithmetic of T.
template <typename T>
struct RowRules {
  SgdRule<T> sgd;
  EmaRule<T> ema;  // of the first average
  RoundingRule rounding;
  bool reset_grads;
  int shadows;  // that are updated
  const Averages& averages;

  FUSED_OPT_HD RowRules(const TensorRow& row, const Group& group, const Averages& averages_)
      : sgd(group.sgd),
        rounding(group.rounding),
        reset_grads(group.reset_grads),
        shadows(row.data[kShadow] != nullptr ? averages_.count : 0),
        averages(averages_) {
    if (shadows > 0) ema = ema_of(row, 0);
  }

  FUSED_OPT_HD EmaRule<T> ema_of(const TensorRow& row, int average) const {
    return EmaRule<T>(row.copies ? 0 : averages.decays[average]);
  }
};

template <typename T>
FUSED_OPT_HD void sgd_tile(const RowRules<T>& rules, T* params, const Place& place) {
  Tile<T> grad(place, kGrad);
  grad.load();
  const T* grads = grad.values();
  if (!place.has(kMomentum)) {
#pragma omp simd
    for (int i = 0; i < place.count; ++i) rules.sgd.update(params[i], grads[i]);
    return;
  }
  Tile<T> momentum(place, kMomentum);
  momentum.load();
  T* velocities = momentum.values();
#pragma omp simd
  for (int i = 0; i < place.count; ++i) rules.sgd.update(params[i], grads[i], velocities[i]);
  momentum.store(rules.rounding);
}

template <typename T>
FUSED_OPT_HD void ema_tile(const EmaRule<T>& rule, const RoundingRule& rounding, const T* params,
                           int count, Tile<T>& shadow) {
  shadow.load();
  T* shadows = shadow.values();
#pragma omp simd
  for (int i = 0; i < count; ++i) rule.update(shadows[i], params[i]);
  shadow.store(rounding);
}

// The shadows of all averages. Only the first has its rule at hand: a row has any number of them.
template <typename T>
FUSED_OPT_HD void average_tile(const RowRules<T>& rules, const T* params, const Place& place) {
  Tile<T> first(place, kShadow);
  ema_tile(rules.ema, rules.rounding, params, place.count, first);
  for (int k = 1; k < rules.shadows; ++k) {
    void* const data = rules.averages.more_shadows[place.row.more_shadows + k - 1];
    Tile<T> shadow(place, kShadow, shadow_stream(k), data);
    ema_tile(rules.ema_of(place.row, k), rules.rounding, params, place.count, shadow);
  }
}

// Updates a tile. Each loop runs over all of it, and the next one finds it in the L1 cache; over
// 1024 elements at a time they are 5 % slower, since the fetches of the streams no longer mix, and
// one loop over all streams is no faster.
template <typename SomeWeights, typename T>
FUSED_OPT_HD void step_tile(const RowRules<T>& rules, const Place& place) {
  SomeWeights weights(place);
  if (place.has(kGrad)) {
    sgd_tile(rules, weights.values(), place);
    weights.store(rules.rounding);
    if (rules.reset_grads) {
      std::memset(place.at(kGrad), 0, place.count * element_size(place.dtype(kGrad)));
    }
  }
  if (rules.shadows > 0) average_tile(rules, weights.values(), place);
}

template <typename SomeWeights, typename T>
FUSED_OPT_HD void step_chunk(const TensorRow& row, const DType* dtypes, const Group& group,
                             const Averages& averages, int64_t begin, int64_t end) {
  const RowRules<T> rules(row, group, averages);
  int64_t i = begin;
  // Whole tiles, whose count the compiler knows, and then the rest.
  for (; i + kTile <= end; i += kTile) step_tile<SomeWeights>(rules, {row, dtypes, i, kTile});
  if (i < end) step_tile<SomeWeights>(rules, {row, dtypes, i, int(end - i)});
}

// Calls body with the gradients of one tile after the other, and with its place in the row.
template <typename T, typename Body>
FUSED_OPT_HD void for_grad_tiles(const TensorRow& row, int64_t begin, int64_t end, Body body) {
  const auto visit = [&](const Place& place) {
    Tile<T> grad(place, kGrad);
    grad.load();
    body(grad, place);
  };
  int64_t i = begin;
  for (; i + kTile <= end; i += kTile) visit({row, row.dtype, i, kTile});
  if (i < end) visit({row, row.dtype, i, int(end - i)});
}

template <typename T>
double norm_chunk(const TensorRow& row, bool infinity, int64_t begin, int64_t end) {
  constexpr int kLanes = rules::kLanes<T>;
  const NormRule<T> rule = {infinity};
  alignas(64) T lanes[kLanes];
  const int used = int(end - begin < kLanes ? end - begin : kLanes);
  std::memset(lanes, 0, used * sizeof(T));
  for_grad_tiles<T>(row, begin, end, [&](Tile<T>& grad, const Place& place) {
    const T* g = grad.values();
    T* own = lanes + (place.first - begin) % kLanes;
#pragma omp simd
    for (int i = 0; i < place.count; ++i) rule.add(own[i], g[i]);
  });
  rules::fold<kLanes>(rule, lanes, used);
  return lanes[0];
}

template <typename T>
void scale_chunk(const TensorRow& row, T coefficient, int64_t begin, int64_t end) {
  for_grad_tiles<T>(row, begin, end, [&](Tile<T>& grad, const Place& place) {
    T* g = grad.values();
#pragma omp simd
    for (int i = 0; i < place.count; ++i) g[i] *= coefficient;
    grad.store();
  });
}

// The dtypes that most rows have. Loops that know them are 10 to 40 % faster in cache, and half
// types then come from memory as fast as they are converted.
constexpr DType kFloat32Row[kStreams] = {DType::kFloat32, DType::kFloat32, DType::kFloat32,
                                         DType::kFloat32, DType::kFloat32};
constexpr DType kBFloat16Row[kStreams] = {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16,
                                          DType::kFloat32, DType::kFloat32};
constexpr DType kFloat16Row[kStreams] = {DType::kFloat16, DType::kFloat16, DType::kFloat16,
                                         DType::kFloat32, DType::kFloat32};

bool fits(const TensorRow& row, const DType (&dtypes)[kStreams]) {
  for (int s = 0; s < kStreams; ++s) {
    if (row.data[s] != nullptr && row.dtype[s] != dtypes[s]) return false;
  }
  return true;
}

template <typename SomeWeights, typename T>
void step_any(const TensorRow& row, const Group& group, const Averages& averages, int64_t begin,
              int64_t end) {
  step_chunk<SomeWeights, T>(row, row.dtype, group, averages, begin, end);
}

template <const DType (&kDTypesOfRow)[kStreams]>
void step_known(const TensorRow& row, const Group& group, const Averages& averages, int64_t begin,
                int64_t end) {
  step_chunk<Weights<float>, float>(row, kDTypesOfRow, group, averages, begin, end);
}

using Step = decltype(Kernels::step);

Step step_unrefined(const TensorRow& row) {
  if (fits(row, kFloat32Row)) return step_known<kFloat32Row>;
  if (fits(row, kBFloat16Row)) return step_known<kBFloat16Row>;
  if (fits(row, kFloat16Row)) return step_known<kFloat16Row>;
  return step_any<Weights<float>, float>;
}

// By the kind of parameters that the row has.
Step step_of(const TensorRow& row) {
  if (row.dtype[kParam] == DType::kFloat64) return step_any<Weights<double>, double>;
  if (row.data[kRefinement] == nullptr) return step_unrefined(row);
  switch (row.dtype[kRefinement]) {
    case DType::kFloat32:
      return step_any<MasterWeights, float>;
    case DType::kInt16:
      return step_any<SplitWeights, float>;
    default:
      return step_any<CompensatedWeights, float>;
  }
}

void step(const TensorRow& row, const Group& group, const Averages& averages, int64_t begin,
          int64_t end) {
  if (row.data[kGrad] == nullptr && averages.count == 0) return;
  step_of(row)(row, group, averages, begin, end);
}

double norm(const TensorRow& row, bool infinity, int64_t begin, int64_t end) {
  if (row.dtype[kGrad] == DType::kFloat64) return norm_chunk<double>(row, infinity, begin, end);
  return norm_chunk<float>(row, infinity, begin, end);
}

void scale(const TensorRow& row, double coefficient, int64_t begin, int64_t end) {
  if (row.dtype[kGrad] == DType::kFloat64) return scale_chunk(row, coefficient, begin, end);
  scale_chunk(row, float(coefficient), begin, end);
}

}  // namespace
}  // namespace fused_opt::cpu

#define FUSED_OPT_CONCAT_(a, b) a##b
#define FUSED_OPT_CONCAT(a, b) FUSED_OPT_CONCAT_(a, b)

extern "C" fused_opt::cpu::Kernels FUSED_OPT_CONCAT(fused_opt_kernels_, FUSED_OPT_ISA)() {
  return {fused_opt::cpu::step, fused_opt::cpu::norm, fused_opt::cpu::scale, fused_opt::cpu::pass};
}
