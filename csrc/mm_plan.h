/* mm_plan.h: what dispatch.c hands to a device once all checks of a product have passed. Kernels check nothing. */
#ifndef FUSEDNORM_MM_PLAN_H
#define FUSEDNORM_MM_PLAN_H

#include "fusednorm.h"

typedef struct {
    char *data;        /* element (0, 0); NULL: absent, or without elements */
    int64_t stride[2]; /* in bytes, of the rows and of the columns */
    fn_dtype dtype;
} fn_matrix;

typedef struct {
    fn_matrix a, b, out;       /* (M, K), (K, N), (M, N) */
    fn_matrix bias;            /* one row of N; data NULL: none */
    int64_t m, n, k;           /* k may be 0 */
    bool weights_are_constant; /* CUDA: no kernel that is still at work writes b */
    int32_t device_id;         /* CUDA */
    void *stream;              /* CUDA */
} fn_mm_plan;

/* csrc/cpu/mm_dtype.c */
fn_status fn_mm_run_cpu(const fn_mm_plan *plan);

/* csrc/cuda/mm_dtype.c, or csrc/no_cuda.c */
fn_status fn_mm_run_cuda(const fn_mm_plan *plan);

#endif
