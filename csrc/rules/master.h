// What keeps a half-precision parameter from standing still, written once for both backends: an
// exact float master, kept whole or as the half that a bfloat16 parameter lacks, or a compensation.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fused_opt::rules {
inline namespace FUSED_OPT_ISA {

// A bfloat16 parameter is its master rounded to nearest, ties away from zero:
//
//     param    = (bits(master) + 2^15) >> 16
//     residual = bits(master) mod 2^16, read as a signed number
//     bits(master) = (param << 16) + residual
//
// Ties to even could not be undone: the tie above an even parameter and the one below it would have
// the same residual. All of this is on the bits of the master, which must not be a NaN with a
// payload that rounds into the sign: settle() first.

// The master that is kept: any NaN becomes one quiet NaN of its sign.
FUSED_OPT_HD uint32_t settle(uint32_t master) {
  const bool is_nan = (master & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? (master & 0x80000000u) | 0x7fc00000u : master;
}

FUSED_OPT_HD uint16_t param_of(uint32_t master) { return uint16_t((master + 0x8000u) >> 16); }
FUSED_OPT_HD uint16_t residual_of(uint32_t master) { return uint16_t(master); }
FUSED_OPT_HD uint32_t join(uint16_t param, uint16_t residual) {
  return (uint32_t(param) << 16) + uint32_t(int32_t(int16_t(residual)));
}

// Compensated summation (Kahan, "Further remarks on reducing truncation errors", 1965): what is
// lost when the exact value is stored as the parameter, to be added at the next step. Nothing,
// where the parameter is not finite.
FUSED_OPT_HD float compensation_of(float exact, float stored) {
  const float lost = exact - stored;
  return lost - lost == 0.0f ? lost : 0.0f;
}

}  // namespace FUSED_OPT_ISA
}  // namespace fused_opt::rules
