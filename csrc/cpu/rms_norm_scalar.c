/* rms_norm_scalar.c: the specification, executable. Every other path has these bits.
 *
 *   1. s = x, or s = x + residual, or s = (x + residual) + post_residual_addition;  residual_out = round(s)
 *   2. p[i] = s[i] * s[i], folded by halves: 8 neighbours to one group sum, then the group sums to one total
 *   3. r = 1/sqrt(total / H + eps)
 *   4. y = s * r, rounded to x's dtype if cast_x_before_out_mul
 *   5. out = round(y * (weight + weight_offset))
 *
 * Moves: rms_norm reads x twice (the second time from cache) and writes out; fused add reads residual too, writes both.
 */
#include "cpu.h"
#include "element.h"

static inline float round_to(float value, fn_dtype dtype) {
    char element[4];
    fn_store_element(element, value, dtype);
    return fn_load_element(element, dtype);
}

static inline float operand(const fn_norm_plan *plan, const fn_row *row, int which, int64_t column) {
    const fn_operand *o = &plan->operand[which];
    const char *data = which == FN_WEIGHT ? o->data : row->data[which];
    return fn_load_element(data + column * o->column_stride, o->dtype);
}

static inline void put(const fn_norm_plan *plan, const fn_row *row, int which, int64_t column, float value) {
    const fn_operand *o = &plan->operand[which];
    fn_store_element(row->data[which] + column * o->column_stride, value, o->dtype);
}

static inline float sum_at(const fn_norm_plan *plan, const fn_row *row, int64_t column) {
    float s = operand(plan, row, FN_X, column);
    if (row->data[FN_RESIDUAL]) s = fn_add(s, operand(plan, row, FN_RESIDUAL, column));
    if (row->data[FN_POST]) s = fn_add(s, operand(plan, row, FN_POST, column));
    return s;
}

static void sum_groups(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float *sums) {
    for (int64_t group = begin; group < end; group += 8) {
        float p[8] = {0};
        for (int64_t column = group; column < end && column < group + 8; column++) {
            float s = sum_at(plan, row, column);
            if (plan->round_sum == FN_SUM_ROUNDED) s = round_to(s, plan->operand[FN_RESIDUAL_OUT].dtype);
            p[column - group] = fn_mul(s, s);
        }
        sums[group / 8] = fn_fold8(p);
    }
}

static float fold(float *sums, int64_t columns) {
    const int64_t groups = (columns + 7) / 8;
    int64_t width = 1;
    while (width < groups) width *= 2;
    /* Groups at `groups` and beyond are +0. A sum of squares is never -0, so adding them changes nothing: skip them. */
    for (int64_t half = width / 2; half >= 1; half /= 2)
        for (int64_t group = 0; group < half && group + half < groups; group++)
            sums[group] = fn_add(sums[group], sums[group + half]);
    return sums[0];
}

static void finish(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float r, int hints) {
    (void)hints;
    for (int64_t column = begin; column < end; column++) {
        float s = sum_at(plan, row, column);
        if (row->data[FN_RESIDUAL]) {
            const float rounded = round_to(s, plan->operand[FN_RESIDUAL_OUT].dtype);
            if (plan->round_sum != FN_SUM_FP32) s = rounded;
            put(plan, row, FN_RESIDUAL_OUT, column, rounded);
        }
        float y = fn_mul(s, r);
        if (plan->cast_x_before_out_mul) y = round_to(y, plan->operand[FN_X].dtype);
        if (plan->operand[FN_WEIGHT].data) {
            float weight = operand(plan, row, FN_WEIGHT, column);
            if (plan->weight_offset != 0) weight = fn_add(weight, plan->weight_offset);
            y = fn_mul(y, weight);
        }
        put(plan, row, FN_OUT, column, y);
    }
}

static void rows(const fn_norm_plan *plan, int64_t begin, int64_t end, int hints, float *sums) {
    fn_walk walk;
    fn_walk_to(plan, begin, &walk);
    for (int64_t number = begin; number < end; number++, fn_walk_on(plan, &walk)) {
        sum_groups(plan, &walk.row, 0, plan->columns, sums);
        const float r = fn_norm_scale(fold(sums, plan->columns), plan);
        finish(plan, &walk.row, 0, plan->columns, r, hints);
    }
}

static void widen(const void *source, fn_dtype dtype, float *target, int64_t count, bool paired) {
    (void)paired;
    for (int64_t i = 0; i < count; i++)
        target[i] = fn_load_element((const char *)source + i * fn_dtypes[dtype].bytes, dtype);
}

static void narrow(const float *source, fn_dtype dtype, void *target, int64_t count, bool paired) {
    (void)paired;
    for (int64_t i = 0; i < count; i++) fn_store_element((char *)target + i * fn_dtypes[dtype].bytes, source[i], dtype);
}

const fn_norm_kernels fn_norm_scalar = {"scalar", rows, sum_groups, fold, finish, widen, narrow};
