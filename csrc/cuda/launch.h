/* launch.h: what crosses between the host half of csrc/cuda (C) and the kernels (CUDA): a kernel's arguments, and tables of
 * kernels. The host half never sees a template, the kernels never see a plan. */
#ifndef FUSEDNORM_LAUNCH_H
#define FUSEDNORM_LAUNCH_H

#include "../norm_plan.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    FN_NORM_WEIGHT = 1,       /* there is one */
    FN_NORM_CAST = 2,         /* cast_x_before_out_mul, to a 16-bit dtype */
    FN_NORM_POST = 4,         /* there is a post_residual_addition */
    FN_NORM_ROUND = 8,        /* round_sum: before everything */
    FN_NORM_ROUND_AFTER = 16, /* round_sum: after the variance */
    FN_NORM_WEIGHT_PREFETCH =
        32, /* have it in L2 when the preceding kernel finishes: worth it while the blocks are few */
    FN_NORM_DEPENDENTS_SOON = 64 /* let the next kernel's blocks in after the loads, not after the reduction */
};

/* What a kernel of rms_norm.cuh is given: what every call reads first, so that it arrives in the fewest cache lines. Row
 * (blockIdx.y, i) of an operand lies at data + blockIdx.y * outer_stride + i * stride. */
typedef struct {
    uint32_t rows;  /* i is below it */
    int32_t groups; /* of 8 elements in a row */
    uint32_t flags;
    float columns,
        inverse_columns; /* 1/columns where that is a power of two, so that multiplying is dividing; else 0 */
    float eps;
    float weight_offset; /* -0 for none, which added changes nothing, where +0 would change a -0 */
    char *data[FN_OPERANDS];
    int64_t stride[FN_ROW_OPERANDS], outer_stride[FN_ROW_OPERANDS];
    fn_dtype dtype[FN_OPERANDS]; /* read by the kernels for any dtypes alone */
} fn_norm_kernel_args;

/* What the kernel of rms_norm_strided.cu is given: any stride, alignment, dtypes and row length. */
typedef struct {
    fn_norm_plan plan;
    float weight_offset;   /* as above */
    uint32_t whole_groups; /* bit i: operand i's groups of 8 are read and written whole, 16 bytes at a time */
} fn_norm_strided_args;

enum { FN_STRIDED_THREADS = 256 };

enum { FN_WARP = 32, FN_PACKED_BLOCK = 128 };

/* One kernel, by its schedule. */
typedef struct {
    const void *function;
    int threads; /* a row; up to a warp, a block of FN_PACKED_BLOCK threads does several rows */
    int blocks;  /* a row: a cluster if more than 1 */
    int groups;  /* of a row that a thread holds */
    int rows;    /* that a thread works on */
    bool fused;  /* adds a residual */
    bool early;  /* reads the weight before the preceding kernel has finished */
} fn_norm_kernel;

typedef struct {
    const fn_norm_kernel *kernels;
    int count;
} fn_norm_kernels;

/* One table per set of dtypes, each in its own file. */
extern const fn_norm_kernels fn_norm_kernels_f32, fn_norm_kernels_f16, fn_norm_kernels_bf16, fn_norm_kernels_bf16_f32,
    fn_norm_kernels_any;
extern const void *const fn_norm_strided_kernel;

#ifdef __cplusplus
}
#endif

#endif
