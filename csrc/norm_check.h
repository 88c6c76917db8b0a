/* norm_check.h: from a caller's arguments to a plan that any device can run. */
#ifndef FUSEDNORM_NORM_CHECK_H
#define FUSEDNORM_NORM_CHECK_H

#include "norm_plan.h"

/* On FN_OK with plan->rows == 0 there is nothing to do and the rest of the plan is not set. The caller's thread must be in
 * the default floating-point environment (fp_environment.h): eps is rounded here. */
fn_status fn_norm_check(const fn_norm_args *args, fn_norm_plan *plan);

#endif
