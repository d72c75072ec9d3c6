// Elementary functions in double that have the same bits everywhere. Those of libm and of CUDA
// differ in their last bits, among each other and among their own releases. schedule.h calls them.
#pragma once

#include <math.h>

#include "host_device.h"

namespace fused_opt::rules {
inline namespace FUSED_OPT_ISA {
namespace portable {

// Sums, products and quotients are rounded in one way only, and frexp and ldexp are exact. On the
// arguments that are named here each function is within 5e-16 of the true value, relative to it.

inline constexpr double kPi = 3.14159265358979323846;

// ln 2 in two parts, the first of which has 33 bits: multiplied by an exponent it stays exact.
inline constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;

// 2 artanh(s), which is log((1 + s) / (1 - s)), for |s| < 0.172: s (2 + 2 s^2 / 3 + 2 s^4 / 5 ...).
FUSED_OPT_HD double log_ratio(double s) {
  const double square = s * s;
  double sum = 0;
  for (int i = 21; i > 1; i -= 2) sum = square * (2.0 / i + sum);
  return 2 * s + s * sum;
}

// For x > 0.
FUSED_OPT_HD double log(double x) {
  if (x == HUGE_VAL) return x;
  int exponent;
  double fraction = frexp(x, &exponent);  // in [0.5, 1), and then in [sqrt(0.5), sqrt(2))
  if (fraction < 0.70710678118654752440) {
    fraction *= 2;
    --exponent;
  }
  const double log_fraction = log_ratio((fraction - 1) / (fraction + 1));
  return exponent * kLn2High + (log_fraction + exponent * kLn2Low);
}

// log(1 + x) for x >= 0.
FUSED_OPT_HD double log1p(double x) { return x < 0.41 ? log_ratio(x / (2 + x)) : log(1 + x); }

// exp(x) - 1 for x <= 0.
FUSED_OPT_HD double expm1(double x) {
  if (x < -64) return -1;  // all that is left of exp(x) is below half a unit in the last place
  const int exponent = int(x * (1 / 0.69314718055994530942) - 0.5);
  const double rest = (x - exponent * kLn2High) - exponent * kLn2Low;  // |rest| < 0.35
  double sum = 0;  // rest + rest^2 / 2! + ... is rest (1 + sum)
  for (int i = 14; i > 1; --i) sum = rest * (1.0 / i) * (1 + sum);
  const double power_of_2 = ldexp(1.0, exponent);
  return power_of_2 * (rest + rest * sum) + (power_of_2 - 1);
}

// For x in [0, pi / 4].
FUSED_OPT_HD double sin(double x) {
  double sum = 0;  // x - x^3 / 3! + ... is x (1 + sum)
  for (int i = 18; i > 1; i -= 2) sum = x * x * (-1.0 / (i * (i + 1))) * (1 + sum);
  return x + x * sum;
}

}  // namespace portable
}  // namespace FUSED_OPT_ISA
}  // namespace fused_opt::rules
