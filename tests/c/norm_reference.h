/* norm_reference.h: the norms' contract (docs/numerics.md), written once more from its text and slowly.
 *
 * Each statement is one IEEE-754 binary32 operation; the conversions are those of exact_dtypes.h. Nothing here comes from
 * csrc/numerics.h.
 */
#ifndef NORM_REFERENCE_H
#define NORM_REFERENCE_H

#include <float.h>

#include "norm_case.h"

#if !defined(FLT_EVAL_METHOD) || FLT_EVAL_METHOD != 0
#error "this test needs float expressions that are evaluated in binary32"
#endif

/* Adds the upper half of `width` numbers to the lower one until one number is left. */
static float fold_by_halves(float *numbers, int64_t width) {
    for (int64_t half = width / 2; half >= 1; half /= 2)
        for (int64_t i = 0; i < half; i++) numbers[i] = numbers[i] + numbers[i + half];
    return numbers[0];
}

static float sum_of_squares(const float *s, int64_t columns) {
    const int64_t groups = (columns + 7) / 8;
    int64_t width = 1;
    while (width < groups) width *= 2;
    float *const sums = calloc((size_t)width, sizeof *sums);
    if (!sums) CHECK_FAIL("out of memory");
    for (int64_t group = 0; group < groups; group++) {
        float p[8] = {0};
        for (int64_t i = 0; i < 8 && 8 * group + i < columns; i++) p[i] = s[8 * group + i] * s[8 * group + i];
        sums[group] = fold_by_halves(p, 8);
    }
    const float total = fold_by_halves(sums, width);
    free(sums);
    return total;
}

static float read_at(const norm_case *c, int role, int64_t row, int64_t column) {
    const norm_array *const array = &c->arrays[role];
    const int64_t offset = row_offset(c, array, role == WEIGHT ? 0 : row);
    return load_element(array->before + offset + column * array->stride_bytes[array->tensor.ndim - 1], c->dtype[role]);
}

static void write_at(const norm_case *c, int role, int64_t row, int64_t column, float number) {
    const norm_array *const array = &c->arrays[role];
    unsigned char *const first = array->after + row_offset(c, array, row);
    store_element(first + column * array->stride_bytes[array->tensor.ndim - 1], c->dtype[role], number);
}

/* Writes what the call must leave behind into the `after` of each array, and the totals. */
static inline void expect_case(norm_case *c) {
    float *const s = malloc((size_t)c->columns * sizeof *s);
    if (!s) CHECK_FAIL("out of memory");
    for (int64_t row = 0; row < row_count(c); row++) {
        for (int64_t i = 0; i < c->columns; i++) {
            s[i] = read_at(c, X, row, i);
            if (c->used[RESIDUAL]) s[i] = s[i] + read_at(c, RESIDUAL, row, i);
            if (c->used[POST]) s[i] = s[i] + read_at(c, POST, row, i);
            if (c->used[RESIDUAL]) write_at(c, RESIDUAL_OUT, row, i, s[i]);
            if (c->round_sum == FN_SUM_ROUNDED) s[i] = round_to_dtype(s[i], c->dtype[RESIDUAL_OUT]);
        }
        c->totals[row] = sum_of_squares(s, c->columns);
        const float mean = c->totals[row] / (float)c->columns;
        const float v = mean + (float)c->eps;
        const float r = (float)(1.0 / sqrt((double)v));
        for (int64_t i = 0; i < c->columns; i++) {
            if (c->round_sum == FN_SUM_ROUNDED_AFTER_VARIANCE) s[i] = round_to_dtype(s[i], c->dtype[RESIDUAL_OUT]);
            float y = s[i] * r;
            if (c->cast_x_before_out_mul) y = round_to_dtype(y, c->dtype[X]);
            if (c->used[WEIGHT]) {
                const float offset = (float)c->weight_offset;
                const float weight = read_at(c, WEIGHT, row, i);
                y = y * (offset == 0.0f ? weight : weight + offset);
            }
            write_at(c, OUT, row, i, y);
        }
    }
    free(s);
}

#endif
