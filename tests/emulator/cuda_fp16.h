// What csrc/cuda takes from CUDA's header of this name, for the emulator of tests. CUDA makes one
// NaN of all.
#pragma once

#include <cmath>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const float sign = value.bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = value.bits >> 10 & 0x1f, fraction = value.bits & 0x3ff;
  if (exponent == 0x1f) return sign * (fraction == 0 ? INFINITY : NAN);
  if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
  return sign * std::ldexp(float(0x400 + fraction), exponent - 25);
}

// Rounds in units of the last place, by the processor's own rounding to nearest even: a carry goes
// on into the exponent, and from the largest number to infinity.
inline __half __float2half_rn(float value) {
  if (value != value) return {0x7fff};
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = 0;
  if (magnitude >= 0x1p-14f) exponent = std::ilogb(magnitude) + 14;
  const int units = int(std::nearbyint(std::ldexp(magnitude, 24 - exponent)));
  return {uint16_t(sign | ((exponent << 10) + units))};
}
