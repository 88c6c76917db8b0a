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

/* Where a tile takes b's elements from: rows of a dtype, or a panel. */
enum { FN_MM_PACKED = FN_DTYPE_COUNT, FN_MM_SOURCES };

/* Sums of one chunk for a tile of outputs: those of row i and column j go to sums[i * sums_stride + j], replacing what is
 * there if `first`, else added to it. `a` is a panel of the tile's rows. So is b (of the product's columns) where it is
 * packed; else its rows lie b_stride bytes apart, with `count` elements side by side in each. */
typedef void fn_mm_tile(const float *a, const char *b, int64_t b_stride, int64_t count, float *sums,
                        int64_t sums_stride, bool first);

/* One instruction set's product.
 *   tile      by where b's elements come from, then for 1, 2, ... rows with one column and with tile_columns columns
 *   pack      a panel of `rows` rows of `count` elements: for k = 0, 16, 32, ... 16 elements of the first row, of the
 *             second, and so on, as fp32, zeros after the last. The panel is aligned to 64 bytes
 *   widen16   for each of 16 places k from first: the 16 neighbours at from + k * stride, to element k of 16 rows */
typedef struct {
    const char *name;
    int tile_rows, tile_columns;
    fn_mm_tile *tile[FN_MM_SOURCES][2 * FN_MM_MOST_ROWS];
    void (*pack)(const char *from, int64_t stride, fn_dtype dtype, int64_t rows, int64_t count, float *panel);
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
