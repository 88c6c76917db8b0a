/* norm_plan.h: what dispatch.c hands to a device once all checks have passed.
 *
 * Leading dimensions of all operands are merged where their strides allow, so that nearly every call arrives as
 * leading_ndim <= 1: `rows` rows, each a constant distance from the last. Kernels check nothing.
 */
#ifndef FUSEDNORM_NORM_PLAN_H
#define FUSEDNORM_NORM_PLAN_H

#include "fusednorm.h"

typedef enum {
    FN_X,
    FN_RESIDUAL,
    FN_POST,
    FN_OUT,
    FN_RESIDUAL_OUT,
    FN_ROW_OPERANDS, /* those above advance from row to row */
    FN_WEIGHT = FN_ROW_OPERANDS,
    FN_OPERANDS
} fn_operand_index;

typedef struct {
    char *data; /* row 0, column 0; NULL: absent */
    int64_t column_stride;
    fn_dtype dtype;
} fn_operand;

typedef struct {
    fn_operand operand[FN_OPERANDS];
    int64_t rows, columns;
    bool contiguous; /* every operand's columns lie side by side */
    bool cast_x_before_out_mul;
    fn_round_sum round_sum;
    bool weights_are_constant; /* CUDA */
    float eps, weight_offset;
    int32_t device_id; /* CUDA */
    void *stream;      /* CUDA */
    int32_t leading_ndim;
    int64_t leading_shape[FN_MAX_NDIM]; /* outermost first */
    int64_t leading_stride[FN_ROW_OPERANDS][FN_MAX_NDIM];
} fn_norm_plan;

/* One per device: csrc/cpu/rms_norm.c, csrc/cuda/rms_norm.c (or no_cuda.c). */
fn_status fn_norm_run_cpu(const fn_norm_plan *plan);
fn_status fn_norm_run_cuda(const fn_norm_plan *plan);

#endif
