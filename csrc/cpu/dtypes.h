// The element types of a stream on the CPU, and their conversion to the type that is computed in.
// Included only by kernels.cpp, once per ISA level; all of it is local to that unit.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../rules/host_device.h"
#include "../rules/master.h"
#include "../rules/rounding.h"

namespace fused_opt::cpu {
namespace {

// Elements that one vectorised loop handles: a few cache lines of every stream.
constexpr int kTile = 64;

// How far ahead to fetch. The hardware prefetchers stop at page ends and lose track of seven
// streams; on a tensor of 25 million elements this is worth 8 %.
constexpr int kPrefetchBytes = 2048;

FUSED_OPT_HD void prefetch(const char* tile, int bytes) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(tile + kPrefetchBytes + line);
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

using rules::bits_of;
using rules::float_of;

// Types are converted a tile at a time, in loops of their own: mixed into the loop of a rule g++
// vectorises them badly (bf16) or not at all (fp16).

FUSED_OPT_HD void widen_tile(const float* from, double* to) {
#pragma omp simd
  for (int i = 0; i < kTile; ++i) to[i] = from[i];
}
FUSED_OPT_HD void narrow_tile(const double* from, float* to) {
#pragma omp simd
  for (int i = 0; i < kTile; ++i) to[i] = float(from[i]);
}

FUSED_OPT_HD void widen_tile(const BFloat16* from, float* to) {
#pragma omp simd
  for (int i = 0; i < kTile; ++i) to[i] = float_of(uint32_t(from[i].bits) << 16);
}

// Stores the upper or the lower half of each number. Left to itself g++ narrows in two steps.
enum class Half { kLower, kUpper };

#if defined(__AVX512BW__)
template <Half kHalf>
FUSED_OPT_HD void store_halves(const uint32_t* from, void* to) {
  alignas(64) uint16_t which[32];
#pragma omp simd
  for (int i = 0; i < 32; ++i) which[i] = uint16_t(2 * i + (kHalf == Half::kUpper));
  const __m512i halves = _mm512_load_si512(which);
  for (int i = 0; i < kTile; i += 32) {
    const __m512i low = _mm512_loadu_si512(from + i), high = _mm512_loadu_si512(from + i + 16);
    _mm512_storeu_si512(static_cast<uint16_t*>(to) + i,
                        _mm512_permutex2var_epi16(low, halves, high));
  }
}
#elif defined(__AVX2__)
template <Half kHalf>
FUSED_OPT_HD void store_halves(const uint32_t* from, void* to) {
  const auto half = [](const uint32_t* numbers) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers));
    return kHalf == Half::kUpper ? _mm256_srli_epi32(bits, 16)
                                 : _mm256_blend_epi16(bits, _mm256_setzero_si256(), 0xaa);
  };
  for (int i = 0; i < kTile; i += 16) {
    // Packs within 128-bit lanes, so the quarters come out in the order 0, 2, 1, 3.
    const __m256i packed = _mm256_packus_epi32(half(from + i), half(from + i + 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(to) + i),
                        _mm256_permute4x64_epi64(packed, 0xd8));
  }
}
#else
template <Half kHalf>
FUSED_OPT_HD void store_halves(const uint32_t* from, void* to) {
  uint16_t* const halves = static_cast<uint16_t*>(to);
#pragma omp simd
  for (int i = 0; i < kTile; ++i) {
    halves[i] = uint16_t(kHalf == Half::kUpper ? from[i] >> 16 : from[i]);
  }
}
#endif

// Rounds to nearest, ties to even; a NaN keeps its sign and becomes quiet.
FUSED_OPT_HD void narrow_tile(const float* from, BFloat16* to) {
  alignas(64) uint32_t rounded[kTile];
#pragma omp simd
  for (int i = 0; i < kTile; ++i) {
    const uint32_t bits = bits_of(from[i]);
    const uint32_t quiet_nan = bits | 0x400000u;
    rounded[i] = from[i] != from[i] ? quiet_nan : bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  store_halves<Half::kUpper>(rounded, to);
}

#if defined(__AVX512F__)
FUSED_OPT_HD void widen_tile(const Float16* from, float* to) {
  for (int i = 0; i < kTile; i += 16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(0xffff, halves));
  }
}
FUSED_OPT_HD void narrow_tile(const float* from, Float16* to) {
  for (int i = 0; i < kTile; i += 16) {
    const __m256i halves =
        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), halves);
  }
}
#elif defined(__F16C__)
FUSED_OPT_HD void widen_tile(const Float16* from, float* to) {
  for (int i = 0; i < kTile; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
}
FUSED_OPT_HD void narrow_tile(const float* from, Float16* to) {
  for (int i = 0; i < kTile; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
}
#else
// In software. Multiplying by 2^112 moves the exponent from bias 15 to bias 127, and normalises
// subnormals on the way.
FUSED_OPT_HD void widen_tile(const Float16* from, float* to) {
#pragma omp simd
  for (int i = 0; i < kTile; ++i) {
    const uint32_t sign = uint32_t(from[i].bits & 0x8000u) << 16;
    const uint32_t magnitude = uint32_t(from[i].bits & 0x7fffu) << 13;
    const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;  // inf and NaN
    to[i] = float_of(sign | (magnitude >= 0x0f800000u ? special : finite));
  }
}
FUSED_OPT_HD void narrow_tile(const float* from, Float16* to) {
#pragma omp simd
  for (int i = 0; i < kTile; ++i) {
    const uint32_t bits = bits_of(from[i]);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the result is subnormal: adding 0.5 leaves it, rounded, in the low bits.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    to[i].bits = uint16_t(sign | (magnitude >= 0x47800000u ? special : finite));
  }
}
#endif

// Rounds floats to numbers that a half type holds exactly, which the conversions above then keep.
// Never inlined: it is long, and a step that rounds to nearest keeps its short loops.

FUSED_OPT_HD float rounded(float value, uint32_t random, BFloat16) {
  return rules::round_to_bfloat16(value, random);
}
FUSED_OPT_HD float rounded(float value, uint32_t random, Float16) {
  return rules::round_to_float16(value, random);
}

template <typename E>
__attribute__((noinline)) void round_tile(float* values, rules::RoundingKey key, uint32_t offset) {
#pragma omp simd
  for (int i = 0; i < kTile; ++i) values[i] = rounded(values[i], key.random(offset + i), E{});
}

// The same for a bfloat16 parameter beside its master, whole or in two halves.

FUSED_OPT_HD void narrow_master_tile(float* masters, BFloat16* params) {
  alignas(64) uint32_t rounded[kTile];
#pragma omp simd
  for (int i = 0; i < kTile; ++i) {
    const uint32_t master = rules::settle(bits_of(masters[i]));
    masters[i] = float_of(master);
    rounded[i] = uint32_t(rules::param_of(master)) << 16;
  }
  store_halves<Half::kUpper>(rounded, params);
}

FUSED_OPT_HD void join_tile(const BFloat16* params, const uint16_t* residuals, float* masters) {
#pragma omp simd
  for (int i = 0; i < kTile; ++i) masters[i] = float_of(rules::join(params[i].bits, residuals[i]));
}

FUSED_OPT_HD void split_tile(const float* masters, BFloat16* params, uint16_t* residuals) {
  alignas(64) uint32_t settled[kTile], rounded[kTile];
#pragma omp simd
  for (int i = 0; i < kTile; ++i) {
    settled[i] = rules::settle(bits_of(masters[i]));
    rounded[i] = uint32_t(rules::param_of(settled[i])) << 16;
  }
  store_halves<Half::kUpper>(rounded, params);
  store_halves<Half::kLower>(settled, residuals);
}

}  // namespace
}  // namespace fused_opt::cpu
