#include "overlap.h"

#include <stdlib.h>

bool fn_same_view(const fn_tensor *a, const fn_tensor *b) {
    if (a->data != b->data || a->dtype != b->dtype || a->ndim != b->ndim) return false;
    for (int32_t i = 0; i < a->ndim; i++)
        if (a->shape[i] != 1 && a->stride_bytes[i] != b->stride_bytes[i]) return false;
    return true;
}

/* ---- one dimension of a view, or of two --------------------------------------------------------------------------------- */

__extension__ typedef __int128 wide; /* no sum of strides overflows it */

/* An address moves by stride * index, index in [low, high], stride > 0. */
typedef struct {
    wide stride, low, high;
} step;

static int by_stride_descending(const void *left, const void *right) {
    const wide a = ((const step *)left)->stride, b = ((const step *)right)->stride;
    return a < b ? 1 : a > b ? -1 : 0;
}

/* The view's steps with indices of `sign`, and the address from which they count. */
static int steps_of(const fn_tensor *a, int sign, step *steps, wide *origin) {
    int count = 0;
    *origin = (wide)(uintptr_t)a->data;
    for (int32_t i = 0; i < a->ndim; i++) {
        const wide stride = a->stride_bytes[i], last = a->shape[i] - 1;
        if (stride == 0 || last == 0) continue;
        if (stride < 0) *origin += stride * last;
        steps[count++] = (step){stride < 0 ? -stride : stride, sign < 0 ? -last : 0, sign < 0 ? 0 : last};
    }
    return count;
}

static wide reach(const step *steps, int count, bool upwards) {
    wide sum = 0;
    for (int k = 0; k < count; k++) sum += steps[k].stride * (upwards ? steps[k].high : steps[k].low);
    return sum;
}

/* ---- do two views meet? --------------------------------------------------------------------------------------------------- */

static wide divide_down(wide a, wide b) { return a / b - (a % b != 0 && a < 0); }

/* Can the steps, largest stride first, reach [low, high]? At each level the smaller strides bound what is left, so that in
 * a nested layout an index or two remain to try. */
static bool reaches(const step *steps, int count, wide low, wide high, int *budget) {
    if (count == 0) return low <= 0 && 0 <= high;
    const wide rest_low = reach(steps + 1, count - 1, false), rest_high = reach(steps + 1, count - 1, true);
    wide first = -divide_down(-(low - rest_high), steps->stride), last = divide_down(high - rest_low, steps->stride);
    if (first < steps->low) first = steps->low;
    if (last > steps->high) last = steps->high;
    for (wide index = first; index <= last; index++) {
        if (--*budget < 0) return true;
        const wide moved = steps->stride * index;
        if (reaches(steps + 1, count - 1, low - moved, high - moved, budget)) return true;
    }
    return false;
}

bool fn_may_overlap(const fn_tensor *a, const fn_tensor *b) {
    step steps[2 * FN_MAX_NDIM];
    wide origin_a, origin_b;
    int count = steps_of(a, -1, steps, &origin_a);
    count += steps_of(b, 1, steps + count, &origin_b);
    qsort(steps, (size_t)count, sizeof steps[0], by_stride_descending);
    int used = 0; /* equal strides of the two become one step */
    for (int k = 0; k < count; k++) {
        if (used > 0 && steps[used - 1].stride == steps[k].stride) {
            steps[used - 1].low += steps[k].low;
            steps[used - 1].high += steps[k].high;
        } else {
            steps[used++] = steps[k];
        }
    }
    /* Bytes are shared where b's element begins less than its length before a's, or less than a's length behind. */
    const wide apart = origin_a - origin_b;
    int budget = 10000;
    return reaches(steps, used, apart - fn_dtypes[b->dtype].bytes + 1, apart + fn_dtypes[a->dtype].bytes - 1, &budget);
}

bool fn_may_overlap_itself(const fn_tensor *a) {
    step steps[FN_MAX_NDIM];
    wide origin, spanned = fn_dtypes[a->dtype].bytes;
    for (int32_t i = 0; i < a->ndim; i++)
        if (a->stride_bytes[i] == 0 && a->shape[i] > 1) return true;
    const int count = steps_of(a, 1, steps, &origin);
    qsort(steps, (size_t)count, sizeof steps[0], by_stride_descending);
    for (int k = count - 1; k >= 0; k--) {
        if (steps[k].stride < spanned) return true;
        spanned += steps[k].high * steps[k].stride;
    }
    return false;
}
