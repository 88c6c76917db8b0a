/* mm_check.h: from a caller's arguments to a product that any device can run. */
#ifndef FUSEDNORM_MM_CHECK_H
#define FUSEDNORM_MM_CHECK_H

#include "mm_plan.h"

/* On FN_OK with plan->m == 0 or plan->n == 0 there is nothing to do. */
fn_status fn_mm_check(const fn_mm_args *args, fn_mm_plan *plan);

#endif
