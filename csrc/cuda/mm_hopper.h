/* mm_hopper.h: what crosses between the host half of the products on compute capability 9.0 (C) and their kernels (CUDA):
 * out = a * b^T (+ bias), a (the tokens) of M rows and b (the weights) of N rows, K columns side by side in both.
 */
#ifndef FUSEDNORM_MM_HOPPER_H
#define FUSEDNORM_MM_HOPPER_H

#include "mm_tensor.h"

#include <cuda.h>

#ifdef __cplusplus
extern "C" {
#else
#include "cuda.h"
#endif

enum {
    FN_ATOM_BYTES = 128, /* of FN_MM_TILE_K columns: one row of a box that the copy engine swizzles */
    FN_STAGING_ROWS = 16,
    FN_WARPGROUP = 128,
    FN_PREFILL_THREADS = 3 * FN_WARPGROUP,
    FN_DECODE_THREADS = FN_WARPGROUP + 32,
    FN_DECODE_BLOCKS = 2, /* of FN_MM_TILE_K columns in a stage */
    FN_DECODE_MOST_STAGES = 64,
    FN_DECODE_SLACK = 64 * FN_ATOM_BYTES, /* behind the ring: what a product reads beyond the last stage's rows */
    FN_SHARED_ALIGNMENT = 1024,
};

/* Columns lie side by side, each at a multiple of its size. */
typedef struct {
    char *data;
    int64_t stride;   /* bytes from row to row */
    const char *bias; /* NULL: none */
    int64_t bias_stride;
    fn_dtype dtype, bias_dtype;
    uint32_t rows, columns;
    uint32_t
        by_engine; /* address, stride and length of a row are such that the copy engine can write it, and no more */
} fn_mm_out;

/* Of mm_wgmma.cuh. A unit is what a cluster works on at a time: as many tiles as it has blocks. */
typedef struct {
    CUtensorMap a, b, out;
    fn_mm_out to;
    uint32_t k_blocks; /* of FN_MM_TILE_K columns */
    uint32_t units, units_n, units_m;
    uint32_t group; /* units of a's rows that are worked on side by side, so that what they share stays in L2 */
    uint32_t early; /* the weight may be read before the preceding kernel has finished */
} fn_mm_prefill_args;

/* Of mm_decode.cuh. */
typedef struct {
    CUtensorMap a, b;
    fn_mm_out to;
    uint32_t k_stages;       /* of the ring's stages that K takes */
    uint32_t stages;         /* in the ring */
    uint32_t rows;           /* of the weight in a tile: 8 for each block of a cluster, or a multiple, up to 64 */
    uint32_t units, units_m; /* what a cluster works on at a time; of these, along a's rows */
    uint32_t stage_bytes;    /* that come into a stage */
    uint32_t early;          /* the weight may be read before the preceding kernel has finished */
} fn_mm_decode_args;

/* Of mm_split.cuh. */
typedef struct {
    CUtensorMap a, b, out;
    fn_mm_out to;
    uint32_t k_blocks;    /* of FN_MM_TILE_K columns */
    uint32_t part_blocks; /* of these, in a part */
    uint32_t tiles_m, tiles_n;
    uint32_t stage_bytes; /* that come into a stage */
    uint32_t early;       /* the weight may be read before the preceding kernel has finished */
} fn_mm_split_args;

typedef struct {
    const void *function;
    int unit_m, unit_n, a_box, b_box, shared_bytes, cluster; /* a box: rows that are loaded at once */
} fn_mm_prefill_kernel;

typedef struct {
    const void *function;
    int tokens, cluster; /* of a tile; blocks with the same rows of b */
} fn_mm_decode_kernel;

typedef struct {
    const char *name; /* as FUSEDNORM_CUDA_PRODUCT has it */
    const void *function;
    int tokens, weights, threads, cluster, resident, shared_bytes; /* resident: blocks that a multiprocessor holds */
    int out_tokens, out_weights; /* of a box of out; 0: the copy engine does not write it */
} fn_mm_split_kernel;

enum { FN_MM_DECODE_KERNELS = 6, FN_MM_PREFILL_KERNELS = 8, FN_MM_SPLIT_KERNELS = 15 };

typedef struct {
    fn_mm_decode_kernel decode[FN_MM_DECODE_KERNELS];    /* first those without clusters, by tokens, ascending */
    fn_mm_prefill_kernel prefill[FN_MM_PREFILL_KERNELS]; /* the first: for many tokens */
    fn_mm_split_kernel split[FN_MM_SPLIT_KERNELS];       /* K in parts and chunks */
} fn_mm_hopper_kernels;

/* mm_hopper_bf16_sm90a.cu, mm_hopper_f16_sm90a.cu; in builds for compute capability 9.0 */
extern const fn_mm_hopper_kernels fn_mm_hopper_bf16, fn_mm_hopper_f16;

#ifndef __cplusplus /* the host half, which is C */

/* Whether these kernels can take the product, and should. Both operands have the same 16-bit dtype; m, n > 0. False in builds
 * without compute capability 9.0. */
bool fn_mm_hopper_serves(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_cuda_properties *device);
fn_status fn_mm_run_hopper(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_cuda_properties *device);

/* mm_chain.c: one chain of K. Which kernel: its place in table->decode, or, counted on, in table->prefill; where it is none for
 * many tokens alone, after an estimate. And how many rows of the weight a decode kernel has in a tile. */
int fn_mm_choose_chain(const fn_mm_hopper_kernels *table, const fn_mm_plan *plan, int multiprocessors);
int fn_mm_decode_rows(const fn_mm_decode_kernel *kernel, const fn_mm_plan *plan, int multiprocessors);

/* What the copy engine loads at once of `all` rows: not more than there are, since to fill in the others takes longer than to load
 * them. What shared memory has in their place becomes sums that nobody writes. */
static inline int fn_mm_box(int rows, int64_t all) { return rows < all ? rows : (int)all; }

/* Nanoseconds, nearly, of which the device holds so many clusters at once. */
double fn_mm_split_time(const fn_mm_split_kernel *kernel, const fn_mm_plan *plan, const fn_mm_cut *cut,
                        uint32_t clusters_at_once);

/* Loads the kernels on the current device, whose compute capability is 9.0. */
fn_status fn_mm_hopper_warmup(void);
#endif

#ifdef __cplusplus
}
#endif

#endif
