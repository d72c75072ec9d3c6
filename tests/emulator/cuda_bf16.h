// What csrc/cuda takes from CUDA's header of this name, for the emulator of tests. CUDA makes one
// NaN of all.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(uint32_t(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  const uint32_t bits = __float_as_uint(value), odd = bits >> 16 & 1;
  return {uint16_t((bits + 0x7fff + odd) >> 16)};
}
