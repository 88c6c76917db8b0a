/* rms_norm_strided.cu: the norm for any stride, any alignment, any row length and any dtypes. One block a row.
 *
 * A row may be longer than any register file, so it is read twice, the second time from cache where it fits: first for its
 * total, then to be normalised. residual_out is written in the second pass, since it may be residual itself.
 *
 * Moves: x (and residual, post) in twice, out (and residual_out) out once.
 */
#include "element.cuh"
#include "rms_norm.cuh"

enum { LEVELS = 28 }; /* of the fold that one thread makes: rows of up to 8 * FN_STRIDED_THREADS * 2^27 elements */

/* Where a row's operands lie; of those that are absent nothing is known. */
struct fn_strided_row {
    char *data[FN_OPERANDS];
};

/* Elements of group `group` of an operand, those past the row's end as +0. */
FN_DEVICE void load_group(const fn_norm_strided_args &a, const fn_strided_row &row, int operand, int64_t group,
                          float f[FN_GROUP]) {
    const fn_operand &o = a.plan.operand[operand];
    const char *at = row.data[operand] + group * FN_GROUP * o.column_stride;
    if (a.whole_groups >> operand & 1) {
        fn_raw<FN_ANY> raw;
        fn_load<FN_ANY>(&raw, at, o.dtype);
        fn_widen<FN_ANY>(raw, f, o.dtype);
        return;
    }
#pragma unroll
    for (int j = 0; j < FN_GROUP; j++)
        f[j] = group * FN_GROUP + j < a.plan.columns ? load_element(at + j * o.column_stride, o.dtype) : 0;
}

FN_DEVICE void store_group(const fn_norm_strided_args &a, const fn_strided_row &row, int operand, int64_t group,
                           const float f[FN_GROUP]) {
    const fn_operand &o = a.plan.operand[operand];
    char *at = row.data[operand] + group * FN_GROUP * o.column_stride;
    if (a.whole_groups >> operand & 1) {
        fn_store<FN_ANY>(at, fn_narrow<FN_ANY>(f, o.dtype), o.dtype);
        return;
    }
#pragma unroll
    for (int j = 0; j < FN_GROUP; j++)
        if (group * FN_GROUP + j < a.plan.columns) store_element(at + j * o.column_stride, f[j], o.dtype);
}

FN_DEVICE void round_group(float f[FN_GROUP], fn_dtype dtype) {
    fn_widen<FN_ANY>(fn_narrow<FN_ANY>(f, dtype), f, dtype);
}

FN_DEVICE void add_group(const fn_norm_strided_args &a, const fn_strided_row &row, int operand, int64_t group,
                         float f[FN_GROUP]) {
    float g[FN_GROUP];
    if (!a.plan.operand[operand].data) return;
    load_group(a, row, operand, group, g);
#pragma unroll
    for (int j = 0; j < FN_GROUP; j++) f[j] = fn_add(f[j], g[j]);
}

FN_DEVICE void sum_group(const fn_norm_strided_args &a, const fn_strided_row &row, int64_t group, float s[FN_GROUP]) {
    load_group(a, row, FN_X, group, s);
    add_group(a, row, FN_RESIDUAL, group, s);
    add_group(a, row, FN_POST, group, s);
}

FN_DEVICE float group_of_squares(const fn_norm_strided_args &a, const fn_strided_row &row, int64_t group) {
    float s[FN_GROUP];
    sum_group(a, row, group, s);
    if (a.plan.round_sum == FN_SUM_ROUNDED) round_group(s, a.plan.operand[FN_RESIDUAL_OUT].dtype);
#pragma unroll
    for (int j = 0; j < FN_GROUP; j++) s[j] = fn_mul(s[j], s[j]);
    return fn_fold8(s);
}

/* Of the groups thread, thread + THREADS, ...: folded by halves, as if padded with +0 to a power of two. Taken in bit-reversed
 * order, the two halves of each fold are neighbours, so that one partial sum a level suffices. */
FN_DEVICE float fold_thread(const fn_norm_strided_args &a, const fn_strided_row &row, int64_t groups,
                            float (*level)[FN_STRIDED_THREADS]) {
    const int thread = threadIdx.x;
    const int64_t own = (groups + FN_STRIDED_THREADS - 1) / FN_STRIDED_THREADS;
    const int bits = own > 1 ? 64 - __clzll(own - 1) : 0;
    float v = 0;
    for (int64_t i = 0; i < (int64_t)1 << bits; i++) {
        const int64_t k = bits ? (int64_t)(__brevll((uint64_t)i) >> (64 - bits)) : 0;
        const int64_t group = k * FN_STRIDED_THREADS + thread;
        v = group < groups ? group_of_squares(a, row, group) : 0;
        int depth = 0;
        for (; i >> depth & 1; depth++) v = fn_add(level[depth][thread], v);
        level[depth][thread] = v;
    }
    return v;
}

FN_DEVICE fn_strided_row find_row(const fn_norm_strided_args &a, int64_t index) {
    fn_strided_row row;
#pragma unroll
    for (int i = 0; i < FN_OPERANDS; i++) row.data[i] = a.plan.operand[i].data;
    for (int d = a.plan.leading_ndim - 1; d >= 0; d--) {
        const int64_t rest = index / a.plan.leading_shape[d], at = index - rest * a.plan.leading_shape[d];
#pragma unroll
        for (int i = 0; i < FN_ROW_OPERANDS; i++) row.data[i] += at * a.plan.leading_stride[i][d];
        index = rest;
    }
    return row;
}

static __global__ void __launch_bounds__(FN_STRIDED_THREADS)
    norm_strided(const __grid_constant__ fn_norm_strided_args a) {
    __shared__ float level[LEVELS][FN_STRIDED_THREADS], sums[1][FN_STRIDED_THREADS];
    const fn_norm_plan &plan = a.plan;
    const int64_t groups = (plan.columns + FN_GROUP - 1) / FN_GROUP;
    wait_for_previous();
    for (int64_t index = blockIdx.x; index < plan.rows; index += gridDim.x) {
        const fn_strided_row row = find_row(a, index);
        float r[1] = {fold_thread(a, row, groups, level)};
        fold_rows<FN_STRIDED_THREADS, 1, 1, false>(r, 0, sums, NULL, NULL);
        r[0] = fn_rsqrt(fn_add(fn_div(r[0], (float)plan.columns), plan.eps));
        for (int64_t group = threadIdx.x; group < groups; group += FN_STRIDED_THREADS) {
            float y[FN_GROUP], w[FN_GROUP];
            sum_group(a, row, group, y);
            if (plan.operand[FN_RESIDUAL_OUT].data) store_group(a, row, FN_RESIDUAL_OUT, group, y);
            if (plan.round_sum != FN_SUM_FP32) round_group(y, plan.operand[FN_RESIDUAL_OUT].dtype);
#pragma unroll
            for (int j = 0; j < FN_GROUP; j++) y[j] = fn_mul(y[j], r[0]);
            if (plan.cast_x_before_out_mul) round_group(y, plan.operand[FN_X].dtype);
            if (plan.operand[FN_WEIGHT].data) {
                load_group(a, row, FN_WEIGHT, group, w);
#pragma unroll
                for (int j = 0; j < FN_GROUP; j++) y[j] = fn_mul(y[j], fn_add(w[j], a.weight_offset));
            }
            store_group(a, row, FN_OUT, group, y);
        }
        __syncthreads(); /* sums is written again */
    }
    let_dependents_start();
}

extern const void *const fn_norm_strided_kernel = (const void *)norm_strided;
