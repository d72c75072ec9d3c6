// Schedules: numbers, mostly decays, that depend on how many updates there were. Written once, in
// double, for the host and for a device that alone knows the count. fused_opt/schedules.py says
// where each comes from, and checks the parameters.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "portable_math.h"

namespace fused_opt {

// In the order of `_Kind` in fused_opt/schedules.py; with the parameters, in their order.
enum class ScheduleKind : int32_t {
  kConstant,         // value
  kTfWarmup,         // decay, min_decay, offset
  kInversePower,     // decay, gamma, power, min_decay
  kExponentialRamp,  // decay, tau
  kEqual,            //
  kPowerFunction,    // gamma
  kZeroDebias,       // decay
  kCosine,           // base, steps
  kCosineWarmup,     // max_update, base_lr, final_lr, warmup_steps, warmup_begin_lr
};
inline constexpr int kScheduleKinds = 9;
inline constexpr int kScheduleParameters = 5;

struct ScheduleHyper {
  ScheduleKind kind = ScheduleKind::kConstant;
  double parameters[kScheduleParameters] = {};
};

namespace rules {
inline namespace FUSED_OPT_ISA {

FUSED_OPT_HD double clamp(double value, double low, double high) {
  return value < low ? low : value > high ? high : value;
}

// From `start` at share 0 to `end` at share 1, and exactly these there.
FUSED_OPT_HD double blend(double start, double end, double share) {
  return (1 - share) * start + share * end;
}

// (1 + cos(pi k / steps)) / 2, from 1 down to 0, and 0 ever after. As a square of a sine it loses
// no digits where it is small.
FUSED_OPT_HD double half_cosine(double k, double steps) {
  if (k >= steps) return 0;
  const bool second_half = 2 * k > steps;
  const double sine = portable::sin(portable::kPi / 2 * ((second_half ? steps - k : k) / steps));
  return second_half ? sine * sine : 1 - sine * sine;
}

// The functions take the number of updates k >= 0 that were done before this one.

// min(decay, (1 + n) / (10 + n)), n = k + offset
FUSED_OPT_HD double tf_warmup(const double (&p)[kScheduleParameters], double k) {
  const double n = k + p[2];
  return clamp((1 + n) / (10 + n), p[1], p[0]);
}

// 1 - (1 + k / gamma)^-power, and a copy at first
FUSED_OPT_HD double inverse_power(const double (&p)[kScheduleParameters], double k) {
  if (k == 0) return 0;
  return clamp(-portable::expm1(-p[2] * portable::log1p(k / p[1])), p[3], p[0]);
}

// decay (1 - exp(-n / tau)), n = k + 1
FUSED_OPT_HD double exponential_ramp(const double (&p)[kScheduleParameters], double k) {
  return p[0] * -portable::expm1(-(k + 1) / p[1]);
}

// 1 - 1 / n, n = k + 1
FUSED_OPT_HD double equal(double k) { return k / (k + 1); }

// (1 - 1 / t)^(gamma + 1), t = k + 1
FUSED_OPT_HD double power_function(const double (&p)[kScheduleParameters], double k) {
  if (k == 0) return 0;
  return 1 + portable::expm1(-(p[0] + 1) * portable::log1p(1 / k));
}

// 1 - (1 - decay) / (1 - decay^n), n = k + 1
FUSED_OPT_HD double zero_debias(const double (&p)[kScheduleParameters], double k) {
  if (k == 0 || p[0] == 0) return 0;
  const double log_decay = portable::log(p[0]);
  return p[0] * portable::expm1(k * log_decay) / portable::expm1((k + 1) * log_decay);
}

// 1 - (1 - base) (1 + cos(pi k / steps)) / 2
FUSED_OPT_HD double cosine(const double (&p)[kScheduleParameters], double k) {
  return 1 - (1 - p[0]) * half_cosine(k, p[1]);
}

// final_lr + (base_lr - final_lr) (1 + cos(pi (k - w) / (max_update - w))) / 2 after w steps of
// warm-up
FUSED_OPT_HD double cosine_warmup(const double (&p)[kScheduleParameters], double k) {
  const double max_update = p[0], base_lr = p[1], final_lr = p[2], w = p[3], warmup_begin_lr = p[4];
  return k < w ? blend(warmup_begin_lr, base_lr, k / w)
               : blend(final_lr, base_lr, half_cosine(k - w, max_update - w));
}

// The schedule's value for the update before which there were k >= 0.
FUSED_OPT_HD double evaluate(const ScheduleHyper& schedule, int64_t k) {
  const auto& parameters = schedule.parameters;
  switch (schedule.kind) {
    case ScheduleKind::kConstant:
      return parameters[0];
    case ScheduleKind::kTfWarmup:
      return tf_warmup(parameters, double(k));
    case ScheduleKind::kInversePower:
      return inverse_power(parameters, double(k));
    case ScheduleKind::kExponentialRamp:
      return exponential_ramp(parameters, double(k));
    case ScheduleKind::kEqual:
      return equal(double(k));
    case ScheduleKind::kPowerFunction:
      return power_function(parameters, double(k));
    case ScheduleKind::kZeroDebias:
      return zero_debias(parameters, double(k));
    case ScheduleKind::kCosine:
      return cosine(parameters, double(k));
    case ScheduleKind::kCosineWarmup:
      return cosine_warmup(parameters, double(k));
  }
  return 0;
}

}  // namespace FUSED_OPT_ISA
}  // namespace rules
}  // namespace fused_opt
