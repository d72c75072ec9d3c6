// When averages are updated, and with which decay, written once for both backends. EmaRule (ema.h)
// is what an update does.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "hyper.h"
#include "schedule.h"

namespace fused_opt {

// One average: the shadows, one of each parameter, that share a decay.
struct AverageHyper {
  double decay = 0;
  DeviceScalar scalar = {};  // in place of the decay, where it is not null
  bool is_scheduled = false;
  ScheduleHyper schedule = {};  // in place of both, if is_scheduled
};

// What all averages of a step share: the steps before it, and which of them update shadows.
struct AverageSteps {
  int64_t steps = 0;
  const int64_t* more_steps = nullptr;  // on the device, which has counted them
  int64_t every = 1, after = 0;
};

namespace rules {
inline namespace FUSED_OPT_ISA {

// The decays at step t = 0, 1, ...
//
//     t mod every != 0    none: the step is not due, and leaves all shadows alone
//     t < after           0, which copies the parameter
//     otherwise           the average's own; of a schedule its value at k, the number of updates
//                         before: k = ceil(t / every) - ceil(after / every)
//
// To be made where the steps are counted, before this one is.
struct AverageRule {
  bool due, copies;
  int64_t updates;

  FUSED_OPT_HD explicit AverageRule(const AverageSteps& hyper) {
    const int64_t t = hyper.steps + (hyper.more_steps ? *hyper.more_steps : 0);
    due = t % hyper.every == 0;
    copies = t < hyper.after;
    updates = t / hyper.every - hyper.after / hyper.every - (hyper.after % hyper.every != 0);
  }

  FUSED_OPT_HD double decay(const AverageHyper& average) const {
    if (copies) return 0;
    if (average.is_scheduled) return evaluate(average.schedule, updates);
    double decay = average.decay;
    average.scalar.read_into(decay);
    return decay;
  }
};

}  // namespace FUSED_OPT_ISA
}  // namespace rules
}  // namespace fused_opt
