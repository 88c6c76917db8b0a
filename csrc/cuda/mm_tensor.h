/* mm_tensor.h: what crosses between the host half of 16-bit products (C) and their kernels (CUDA). */
#ifndef FUSEDNORM_MM_TENSOR_H
#define FUSEDNORM_MM_TENSOR_H

#include "../mm_plan.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    FN_MM_STEP = 16,           /* k that a tensor core adds at once */
    FN_MM_TILE_K = 64,         /* k of a tile in shared memory: rows of 128 bytes */
    FN_MM_GATE_COLUMNS = 512,  /* N up to which K is cut into parts and these into chunks; else it is one chunk */
    FN_MM_GATE_CHUNK = 256,    /* docs/numerics.md has why. These four decide bits: frozen with the first release */
    FN_MM_GATE_PARTS = 8,      /* at most, and no more blocks in a cluster */
    FN_MM_GATE_MOST_WARPS = 4, /* of mm_gate.cuh: chunks in a part */
    FN_MM_FEW_MOST_WARPS = 8,  /* of mm_few.cuh: the same */
    FN_GATE_BARRIER_BYTES = 16,
};

/* How K is cut, in tiles of FN_MM_TILE_K: at multiples of part_tiles, and from there on at multiples of chunk_tiles. A part's sum
 * is its chunks', ascending; a half's is that of the parts 0 to 3, or 4 to 7, ascending; the total is the two halves'. */
typedef struct {
    int64_t part_tiles, chunk_tiles;
    int32_t parts; /* at least 1 */
} fn_mm_cut;

/* a, or b transposed: `rows` rows along k. */
typedef struct {
    const char *data;
    int64_t row_stride, k_stride; /* in bytes */
    int64_t rows;
    bool whole; /* 8 neighbours along k lie together at 16-byte alignment */
} fn_mm_tensor_side;

/* `tokens` are a's rows, `weights` are b's columns: out(token, weight). */
typedef struct {
    fn_mm_tensor_side tokens, weights;
    int64_t k;
    fn_mm_cut cut;
    int32_t parts_each; /* of a block of the cluster */
    int32_t cluster;
    bool early; /* the weights may be read before the preceding kernel has finished */
    char *out;
    const char *bias; /* NULL: none */
    int64_t out_token_stride, out_weight_stride, bias_stride;
    fn_dtype out_dtype, bias_dtype;
    bool out_whole; /* 4 neighbour weights are written together */
} fn_mm_tensor_args;

/* One kernel, by the tile of a block. */
typedef struct {
    const void *function;
    int weights, tokens, threads;
    int shared_bytes; /* tile: with sums for 2 parts; gate, few: of a warp, without sums */
    int sums_bytes;   /* of a part; few: of all */
    bool chunked;     /* serves K in parts and chunks; else in one */
    bool whole;       /* for operands that are; else for any */
} fn_mm_tensor_kernel;

/* N and K decide it, and nothing else. */
fn_mm_cut fn_mm_cut_of(int64_t n, int64_t k);

enum { FN_MM_TILE_KERNELS = 13, FN_MM_GATE_KERNELS = 4, FN_MM_FEW_KERNELS = 5 };

typedef struct {
    fn_mm_tensor_kernel tile[FN_MM_TILE_KERNELS];
    fn_mm_tensor_kernel gate[FN_MM_GATE_KERNELS]; /* a warp a chunk */
    fn_mm_tensor_kernel
        few[FN_MM_FEW_KERNELS]; /* up to 4 tokens, a warp the chunks of one number; by tokens, then weights */
} fn_mm_tensor_kernels;

/* mm_bf16.cu, mm_f16.cu */
extern const fn_mm_tensor_kernels fn_mm_bf16, fn_mm_f16;

/* a and b have the same dtype, of 16 bits; m, n > 0. */
fn_status fn_mm_run_tensor(const fn_mm_plan *plan);
fn_status fn_mm_tensor_warmup(void);

#ifdef __cplusplus
}
#endif

#endif
