/* mm_fma.h: what crosses between the host half of the product on CUDA (C) and its kernels (CUDA). */
#ifndef FUSEDNORM_MM_FMA_H
#define FUSEDNORM_MM_FMA_H

#include "../mm_plan.h"

#include <cuda.h>

#ifdef __cplusplus
extern "C" {
#else
#include "cuda.h"
#endif

/* ---- mm_fma: any dtypes, on the units for fp32, with the bits of the CPU ----------------------------------------- */

/* How a kernel brings an operand to shared memory. */
typedef enum {
    FN_MM_COPIED,        /* fp32, side by side along k at 16-byte alignment: copied asynchronously */
    FN_MM_COPIED_SINGLY, /* fp32 at its own alignment: the same, one by one */
    FN_MM_HELD,          /* 4 neighbours in one access, along k or in 4 rows, through registers; no vector is cut off */
    FN_MM_ANY            /* each element by itself, at any address */
} fn_mm_access;

/* An operand: a, or b transposed. */
typedef struct {
    const char *data;
    int64_t row_stride, k_stride; /* in bytes */
    int64_t tile_step; /* the same, from a tile to the next; and what comes on top where a block's chunk ends */
    int64_t chunk_step, chunk_skip; /* in bytes, and in elements */
    int64_t rows;
    fn_dtype dtype;
    fn_mm_access access;
    bool along_rows; /* neighbours in memory are those of a column, not those along k */
} fn_mm_fma_side;

/* The result, in tiles, whose rows are a's rows or b's columns. */
typedef struct {
    int64_t k, rows, columns;
    char *out;
    const char *bias;                      /* NULL: none */
    int64_t out_stride[2], bias_stride[2]; /* in bytes, by row and by column */
    fn_dtype out_dtype, bias_dtype;
    bool whole_groups; /* neighbouring columns of out can be written together */
    uint32_t row_tiles, column_tiles;
    uint32_t panel;       /* row tiles that go through all columns together */
    int32_t cluster_bits; /* 2 to that power blocks have a tile together: each takes its share of the chunks */
} fn_fma_out;

typedef struct {
    fn_mm_fma_side rows, columns;
    fn_fma_out to;
} fn_mm_fma_args;

typedef struct {
    const void *function;
    int rows, columns, k; /* of a tile */
    int threads;
    int resident; /* blocks that a multiprocessor holds, if it has the shared memory */
    int shared_bytes;
} fn_mm_fma_kernel;

enum {
    FN_MM_FMA_KERNELS = 3,
    FN_MM_FMA_MOST_BLOCKS = 8,
    FN_MM_LANES = 16,
    FN_MM_CHUNK = 1024,
    FN_MM_FMA_BLOCK_BYTES = 1024 /* that a block has besides */
};

/* By the rows of a tile, ascending. */
extern const fn_mm_fma_kernel fn_mm_fma_kernels[FN_MM_FMA_KERNELS];

/* ---- mm_fma_few: the same for few tokens and fp32 weights, side by side along k ----------------------------------- */

/* `rows` rows along k, 16-byte aligned, as are the distances between them. */
typedef struct {
    const char *data;
    int64_t row_stride; /* in bytes */
    int64_t rows;
} fn_fma_few_side;

/* The weights are the operand with more rows, in fp32; k is a whole number of 16 bytes, of the tokens too. */
typedef struct {
    fn_fma_few_side weights, tokens;
    int64_t k;
    char *out;
    const char *bias; /* NULL: none */
    int64_t out_weight_stride, out_token_stride, bias_weight_stride, bias_token_stride;
    fn_dtype token_dtype, out_dtype, bias_dtype;
    bool early;          /* the weights may be read before the preceding kernel has finished */
    int32_t cluster;     /* blocks that take turns at the chunks */
    int32_t groups;      /* of tokens, each with blocks of its own */
    int32_t token_rooms; /* chunks of tokens that a block has room for: 2 if it goes through several, else 1 */
} fn_fma_few_args;

typedef struct {
    const void *function;
    int tokens;      /* of a block */
    int warp_rows;   /* weights of a warp */
    int warp_bytes;  /* shared memory: of a warp's weights, */
    int token_bytes; /* of a chunk of the block's tokens */
    int sums;        /* of a thread */
    int warps;       /* of a block that takes many chunks */
} fn_fma_few_kernel;

enum {
    FN_FMA_FEW_KERNELS = 5,
    FN_FMA_FEW_ROWS = 16, /* tokens that it serves: two groups of the most that a block has */
    FN_FMA_FEW_MOST_WARPS = 4,
    FN_FMA_FEW_MOST_SENT = 64, /* chunks whose sums blocks send each other */
    FN_FMA_FEW_BARRIER_BYTES = 8
};

/* By the tokens of a block, ascending; the last for many weights. */
extern const fn_fma_few_kernel fn_fma_few_kernels[FN_FMA_FEW_KERNELS];

/* Does one of them serve the product? If so, these are its arguments, as far as they do not depend on the kernel. */
bool fn_fma_few_serves(const fn_mm_plan *plan, fn_fma_few_args *args);
fn_status fn_mm_run_few(const fn_mm_plan *plan, fn_fma_few_args *args);
fn_status fn_fma_few_warmup(void);

/* ---- mm_fma_many: the same for many rows, brought by the copy engine of compute capability 9.0 --------------------------- */

typedef struct {
    CUtensorMap rows, columns;
    fn_fma_out to;
    uint32_t tiles;
} fn_fma_many_args;

enum { FN_FMA_MANY_K = 64, FN_FMA_MANY_KERNELS = 2 };

/* By the dtype of the rows; each: for many tiles, for few. mm_fma_many_sm90a.cu; in builds for compute capability 9.0. */
extern const fn_mm_fma_kernel fn_fma_many_kernels[FN_DTYPE_COUNT][FN_FMA_MANY_KERNELS];

#ifndef __cplusplus /* the host half, which is C */

/* Whether it serves the product: operands that the engine can move, the one with fewer bytes an element as rows, the other in
 * fp32; on the device; both with more rows than FN_FMA_FEW_ROWS. False in builds without compute capability 9.0. */
bool fn_fma_many_serves(const fn_mm_plan *plan, const fn_cuda_properties *device, bool *swapped);
fn_status fn_mm_run_many(const fn_mm_plan *plan, const fn_cuda_properties *device, bool swapped);
fn_status fn_fma_many_warmup(const fn_cuda_properties *device);

/* ---- what they share ---------------------------------------------------------------------------------------------------- */

/* Rows of tiles are a's rows or, swapped, b's columns. */
fn_fma_out fn_fma_result_of(const fn_mm_plan *plan, bool swapped);
static inline int64_t fn_fma_tiles(const fn_mm_fma_kernel *kernel, const fn_fma_out *to) {
    return fn_divide_up(to->rows, kernel->rows) * fn_divide_up(to->columns, kernel->columns);
}
void fn_fma_set_tiles(fn_fma_out *to, const fn_mm_fma_kernel *kernel, int cluster_bits);

enum { FN_FMA_CLUSTER_SIZES = 4 };
_Static_assert(1 << (FN_FMA_CLUSTER_SIZES - 1) == FN_MM_FMA_MOST_BLOCKS, "");

fn_cuda_launch fn_fma_launch_of(const fn_mm_plan *plan, const fn_mm_fma_kernel *kernel, const void *args,
                                int64_t clusters, int bits);

#endif

/* m, n > 0. */
fn_status fn_mm_run_fma(const fn_mm_plan *plan);
#ifndef __cplusplus
fn_status fn_mm_fma_warmup(const fn_cuda_properties *device);
#endif

#ifdef __cplusplus
}
#endif

#endif
