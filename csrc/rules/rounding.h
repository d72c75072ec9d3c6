// Stochastic rounding to half precision, written once for both backends: which random number an
// element gets, and how it rounds by it. fused_opt/_rounding.py does the same in torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "hyper.h"

namespace fused_opt::rules {
inline namespace FUSED_OPT_ISA {

FUSED_OPT_HD uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FUSED_OPT_HD float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// A number is a function of (seed, step, ordinal of the parameter, stream, offset of the element in
// memory order) and of nothing else, so that no thread, chunk or device changes it. All but the
// lower half of the offset go into a key of 64 bits, once for many elements; the key and that half
// are mixed in 32-bit operations, which vectorise.

// The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
// generators", OOPSLA 2014): different arguments, different results.
FUSED_OPT_HD uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The key of the 2^32 elements of a stream whose offsets have the same upper half.
struct RoundingKey {
  uint32_t first, second;

  // 32 evenly distributed bits, the upper ones the better mixed. The halves of the key come in at
  // different places: with the first alone, the numbers of one key would be those of another in
  // another order. Three multiplications are needed: after two, a key's numbers are correlated with
  // their neighbours, and their mean is off by more than chance.
  FUSED_OPT_HD uint32_t random(uint32_t offset) const {
    uint32_t x = (offset ^ first) * 0x85ebca6bu;
    x = ((x ^ (x >> 16)) ^ second) * 0xc2b2ae35u;
    return (x ^ (x >> 15)) * 0x9e3779b1u;
  }
};

// How the rows of a group round.
struct RoundingRule {
  uint64_t state;
  bool stochastic;

  RoundingRule() = default;

  FUSED_OPT_HD explicit RoundingRule(const RoundingHyper& hyper)
      : state(hyper.stochastic ? mix(mix(hyper.seed) ^ hyper.step) : 0),
        stochastic(hyper.stochastic) {}

  // No two places share a key: memory ends at offsets of 2^56, and there are at most 256 streams.
  FUSED_OPT_HD RoundingKey key(uint32_t ordinal, int stream, int64_t offset) const {
    const uint64_t place =
        uint64_t(ordinal) << 32 | uint64_t(stream) << 24 | uint64_t(offset) >> 32;
    const uint64_t key = mix(state ^ place);
    return {uint32_t(key), uint32_t(key >> 32)};
  }
};

// A value between two neighbouring numbers of a half type becomes the one away from zero as often
// as it is nearer to it, in proportion, so that the mean is the value itself. The functions return
// a float that the type holds exactly, for the conversion to store.
//
// From the largest finite number on there is no mean to keep, for its neighbour is infinite: the
// value is returned as it is, and so rounded to nearest. So are inf and NaN.

// Without branches: g++ moves what only one side of a choice needs behind a branch, and then it
// does not vectorise.
FUSED_OPT_HD uint32_t choose(bool condition, uint32_t then, uint32_t otherwise) {
  return otherwise ^ ((then ^ otherwise) & (0u - uint32_t(condition)));
}

FUSED_OPT_HD float round_to_bfloat16(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + (random >> 16)) & 0xffff0000u;
  return float_of(choose((bits & 0x7fffffffu) < 0x7f7f0000u, rounded, bits));
}

FUSED_OPT_HD float round_to_float16(float value, uint32_t random) {
  const uint32_t bits = bits_of(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const uint32_t normal = (magnitude + (random >> 19)) & 0xffffe000u;
  // Below 2^-14 the spacing is 2^-24, and every operation here is exact. A fraction of it counts to
  // 31 bits: less than 2^-55 never becomes 2^-24.
  const bool small = magnitude < 0x38800000u;
  const float scaled = float_of(choose(small, magnitude, 0)) * 0x1p24f;
  const int32_t whole = int32_t(scaled);
  const int32_t fraction = int32_t((scaled - float(whole)) * 0x1p31f);
  const int32_t up = int32_t(uint32_t(int32_t(random >> 1) - fraction) >> 31);
  const uint32_t subnormal = bits_of(float(whole + up) * 0x1p-24f);
  return float_of(choose(magnitude < 0x477fe000u, sign | choose(small, subnormal, normal), bits));
}

}  // namespace FUSED_OPT_ISA
}  // namespace fused_opt::rules
