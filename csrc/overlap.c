#include "overlap.h"

#include <stdlib.h>

typedef struct {
    uint64_t low, high; /* addresses of the first byte and of the one behind the last */
} extent;

static extent extent_of(const fn_tensor *a) {
    uint64_t low = (uint64_t)(uintptr_t)a->data, high = low + (uint64_t)fn_dtypes[a->dtype].bytes;
    for (int32_t i = 0; i < a->ndim; i++) {
        const uint64_t reach = (uint64_t)(a->shape[i] - 1) * (uint64_t)a->stride_bytes[i];
        if (a->stride_bytes[i] < 0) low += reach;
        else high += reach;
    }
    return (extent){low, high};
}

bool fn_same_view(const fn_tensor *a, const fn_tensor *b) {
    if (a->data != b->data || a->dtype != b->dtype || a->ndim != b->ndim) return false;
    for (int32_t i = 0; i < a->ndim; i++)
        if (a->shape[i] != 1 && a->stride_bytes[i] != b->stride_bytes[i]) return false;
    return true;
}

/* ---- strides, largest first -------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t stride, size;
    int owner;
} step;

static int by_stride_descending(const void *left, const void *right) {
    const uint64_t a = ((const step *)left)->stride, b = ((const step *)right)->stride;
    return a < b ? 1 : a > b ? -1 : 0;
}

static int steps_of(const fn_tensor *a, int owner, step *steps) {
    int count = 0;
    for (int32_t i = 0; i < a->ndim; i++) {
        const int64_t stride = a->stride_bytes[i];
        if (a->shape[i] > 1)
            steps[count++] = (step){stride < 0 ? 0 - (uint64_t)stride : (uint64_t)stride, (uint64_t)a->shape[i], owner};
    }
    return count;
}

static uint64_t greatest_common_divisor(uint64_t a, uint64_t b) {
    while (b) {
        const uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

bool fn_may_overlap(const fn_tensor *a, const fn_tensor *b) {
    const extent ea = extent_of(a), eb = extent_of(b);
    if (ea.high <= eb.low || eb.high <= ea.low) return false;

    step steps[2 * FN_MAX_NDIM];
    int count = steps_of(a, 0, steps);
    count += steps_of(b, 1, steps + count);
    qsort(steps, (size_t)count, sizeof steps[0], by_stride_descending);

    /* Take a pitch that divides the k largest strides. Every byte of a view then lies, modulo the pitch, in one tile: what
     * the smaller strides span. Disjoint tiles mean disjoint views. */
    uint64_t pitch = 0, tile[2] = {ea.high - ea.low, eb.high - eb.low};
    for (int k = 0; k < count; k++) {
        pitch = greatest_common_divisor(pitch, steps[k].stride);
        tile[steps[k].owner] -= (steps[k].size - 1) * steps[k].stride;
        if (pitch == 0 || tile[0] > pitch || tile[1] > pitch) continue;
        const uint64_t distance =
            eb.low >= ea.low ? (eb.low - ea.low) % pitch : (pitch - (ea.low - eb.low) % pitch) % pitch;
        if (distance >= tile[0] && distance + tile[1] <= pitch) return false;
    }
    return true;
}

bool fn_may_overlap_itself(const fn_tensor *a) {
    step steps[FN_MAX_NDIM];
    const int count = steps_of(a, 0, steps);
    qsort(steps, (size_t)count, sizeof steps[0], by_stride_descending);
    uint64_t spanned = (uint64_t)fn_dtypes[a->dtype].bytes;
    for (int k = count - 1; k >= 0; k--) {
        if (steps[k].stride < spanned) return true;
        spanned += (steps[k].size - 1) * steps[k].stride;
    }
    return false;
}
