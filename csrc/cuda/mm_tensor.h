/* mm_tensor.h: what crosses between the host half of 16-bit products (C) and their kernels (CUDA). */
#ifndef FUSEDNORM_MM_TENSOR_H
#define FUSEDNORM_MM_TENSOR_H

#include "../mm_plan.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    FN_MM_STEP = 16,              /* k that a tensor core adds at once */
    FN_MM_TILE_K = 64,            /* k of a tile in shared memory: rows of 128 bytes */
    FN_MM_GATE_CHUNK = 256,       /* k of a chunk where N is at most FN_MM_GATE_COLUMNS; else K is one chunk */
    FN_MM_GATE_COLUMNS = 512,     /* docs/numerics.md has why. They decide bits: frozen with the first release */
    FN_MM_TENSOR_MOST_BLOCKS = 8, /* of a cluster */
};

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
    int64_t chunk_tiles; /* tiles of FN_MM_TILE_K in a chunk */
    int32_t chunks;      /* at least 1 */
    int32_t chunks_each; /* of a block of the cluster */
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
    int shared_bytes; /* without the sums that a cluster exchanges */
    int sums_bytes;   /* of these, for each chunk */
    bool chunked;     /* serves K in chunks; else in one */
    bool whole;       /* for operands that are; else for any */
} fn_mm_tensor_kernel;

enum { FN_MM_TILE_KERNELS = 13, FN_MM_GATE_KERNELS = 4 };

typedef struct {
    fn_mm_tensor_kernel tile[FN_MM_TILE_KERNELS];
    fn_mm_tensor_kernel gate[FN_MM_GATE_KERNELS]; /* for a warp a chunk */
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
