/* cpu.h: what the CPU half shares: the paths' function tables and the walk over rows. */
#ifndef FUSEDNORM_CPU_H
#define FUSEDNORM_CPU_H

#include <stddef.h>

#include "../fp_environment.h"
#include "../norm_plan.h"
#include "../numerics.h"

#if defined(FN_X86)
#include <immintrin.h>
#endif

/* Where the row operands of one row begin. */
typedef struct {
    char *data[FN_ROW_OPERANDS];
} fn_row;

/* A row and its place among the leading dimensions. */
typedef struct {
    fn_row row;
    int64_t index[FN_MAX_NDIM];
} fn_walk;

/* How a call's memory is best treated; a set. */
typedef enum {
    FN_STREAM = 1,  /* write outputs past the cache, but those that are their own input */
    FN_PREFETCH = 2 /* ask for the rows to come */
} fn_hints;

/* One instruction set's norm. A row's arithmetic has three steps, so that threads may share a long row:
 *   sum_groups  squares of columns [begin, end), folded to one float for each 8; begin is a multiple of FN_COLUMN_QUANTUM.
 *               Writes sums[begin / 8 ...]; the last group's missing columns, and the groups up to the next multiple of
 *               16, count as +0.
 *   fold        the row's sum of squares; `sums` has room for the groups rounded up to 16, and is overwritten.
 *   finish      residual_out and out for columns [begin, end), any begin.
 * `rows` does all three for rows [begin, end), with `sums` as scratch.
 * widen and narrow are the path's own loads and stores, on contiguous memory, for the exhaustive tests; `paired` (bfloat16
 * only) takes those of calls that are bfloat16 throughout, where a path has them. */
typedef struct {
    const char *name;
    void (*rows)(const fn_norm_plan *plan, int64_t begin, int64_t end, int hints, float *sums);
    void (*sum_groups)(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float *sums);
    float (*fold)(float *sums, int64_t columns);
    void (*finish)(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float r, int hints);
    void (*widen)(const void *source, fn_dtype dtype, float *target, int64_t count, bool paired);
    void (*narrow)(const float *source, fn_dtype dtype, void *target, int64_t count, bool paired);
} fn_norm_kernels;

#define FN_COLUMN_QUANTUM 128

extern const fn_norm_kernels fn_norm_scalar;
#if defined(FN_X86)
extern const fn_norm_kernels fn_norm_avx2, fn_norm_avx512;
#elif defined(FN_ARM64)
extern const fn_norm_kernels fn_norm_neon;
#endif

/* NULL where the path is not built. */
extern const fn_norm_kernels *const fn_norm_paths[FN_PATH_COUNT];

/* r of a row from its sum of squares: steps 3 of docs/numerics.md. */
static inline float fn_norm_scale(float sum_of_squares, const fn_norm_plan *plan) {
    return fn_rsqrt(fn_add(fn_div(sum_of_squares, (float)plan->columns), plan->eps));
}

/* ---- rows ----------------------------------------------------------------------------------------------------------- */

static inline void fn_walk_to(const fn_norm_plan *plan, int64_t number, fn_walk *walk) {
    for (int operand = 0; operand < FN_ROW_OPERANDS; operand++) walk->row.data[operand] = plan->operand[operand].data;
    for (int dimension = plan->leading_ndim - 1; dimension >= 0; dimension--) {
        const int64_t size = plan->leading_shape[dimension], index = number ? number % size : 0;
        number = number ? number / size : 0;
        walk->index[dimension] = index;
        for (int operand = 0; index && operand < FN_ROW_OPERANDS; operand++)
            if (walk->row.data[operand]) walk->row.data[operand] += index * plan->leading_stride[operand][dimension];
    }
}

static inline void fn_walk_on(const fn_norm_plan *plan, fn_walk *walk) {
    for (int dimension = plan->leading_ndim - 1; dimension >= 0; dimension--) {
        const bool wraps = ++walk->index[dimension] == plan->leading_shape[dimension];
        const int64_t steps = wraps ? 1 - plan->leading_shape[dimension] : 1;
        if (wraps) walk->index[dimension] = 0;
        for (int operand = 0; operand < FN_ROW_OPERANDS; operand++)
            if (walk->row.data[operand]) walk->row.data[operand] += steps * plan->leading_stride[operand][dimension];
        if (!wraps) return;
    }
}

#endif
