/* overlap.h: may two views touch the same byte? Used once a call, by the argument checks. */
#ifndef FUSEDNORM_OVERLAP_H
#define FUSEDNORM_OVERLAP_H

#include "fusednorm.h"

/* The same bytes in the same order with the same meaning; both have elements and one shape. */
bool fn_same_view(const fn_tensor *a, const fn_tensor *b);

/* Whether an element of `a` shares a byte with an element of `b`: exact for all layouts that arise in practice (slices of a
 * fused buffer, interleaved elements, every other row, and these within each other); true where a search of some thousand
 * steps does not decide. Both have elements. */
bool fn_may_overlap(const fn_tensor *a, const fn_tensor *b);

/* False only if distinct indices are proved to name distinct bytes. */
bool fn_may_overlap_itself(const fn_tensor *a);

#endif
