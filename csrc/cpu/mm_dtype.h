/* mm_dtype.h: what the product's paths share.
 *
 * The contract, of which mm_dtype_scalar.c is the readable form: K is cut into chunks of FN_MM_CHUNK. In a chunk, lane l of
 * FN_MM_LANES starts at +0 and takes k = l, l + 16, l + 32, ..., each by one fused multiply-add; the chunk is padded with
 * zeros to a multiple of FN_MM_LANES. The lanes are folded by halves, the chunks' sums added in order, then the bias, then
 * one rounding.
 */
#ifndef FUSEDNORM_MM_DTYPE_H
#define FUSEDNORM_MM_DTYPE_H

#include "../fp_environment.h"
#include "../mm_plan.h"
#include "../numerics.h"

#if defined(FN_X86)
#include <immintrin.h>
#endif

#define FN_MM_LANES 16
#define FN_MM_CHUNK 1024
#define FN_MM_MOST_ROWS 4 /* of a tile */

/* Sums of one chunk for a tile of outputs: those of row i and column j go to sums[i * sums_stride + j], replacing what is
 * there if `first`, else added to it. `a` and `b` have `count` elements side by side in each row (b's rows are columns
 * of the product), rows any number of bytes apart; a's are fp32. */
typedef void fn_mm_tile(const char *a, int64_t a_stride, const char *b, int64_t b_stride, int64_t count, float *sums,
                        int64_t sums_stride, bool first);

/* One instruction set's product.
 *   tile      by b's dtype, the number of rows - 1, and whether it has tile_columns columns or one
 *   widen     count elements side by side to fp32
 *   widen16   for each of 16 places k from first: the 16 neighbours at from + k * stride, to element k of 16 rows */
typedef struct {
    const char *name;
    int tile_rows, tile_columns;
    fn_mm_tile *tile[FN_DTYPE_COUNT][FN_MM_MOST_ROWS][2];
    void (*widen)(const char *from, fn_dtype dtype, int64_t count, float *to);
    void (*widen16)(const char *from, int64_t stride, fn_dtype dtype, float *to, int64_t to_stride);
} fn_mm_kernels;

/* The whole product for rows [m, m_end) and columns [n, n_end), one output after the other. */
void fn_mm_scalar(const fn_mm_plan *plan, int64_t m, int64_t m_end, int64_t n, int64_t n_end);

#if defined(FN_X86)
extern const fn_mm_kernels fn_mm_avx2, fn_mm_avx512;
#elif defined(FN_ARM64)
extern const fn_mm_kernels fn_mm_neon;
#endif

#endif
