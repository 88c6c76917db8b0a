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
 *   columns   the same sums for any number of a's rows, in one panel, and of columns, whose elements lie side by side in
 *             b's memory, k_stride bytes from one k to the next. `lanes`: room for 16 floats for each sum, with the columns
 *             rounded up to 16
 *   pack      a panel of `rows` rows of `count` elements: for k = 0, 16, 32, ... 16 elements of the first row, of the
 *             second, and so on, as fp32, zeros after the last. The panel is aligned to 64 bytes
 *   widen16   for each of 16 places k from first: the 16 neighbours at from + k * stride, to element k of 16 rows */
typedef struct {
    const char *name;
    int tile_rows, tile_columns;
    fn_mm_tile *tile[FN_MM_SOURCES][2 * FN_MM_MOST_ROWS];
    void (*columns)(const float *a, int64_t rows, const char *b, int64_t k_stride, fn_dtype dtype, int64_t columns,
                    int64_t count, float *lanes, float *sums, int64_t sums_stride, bool first);
    void (*pack)(const char *from, int64_t stride, fn_dtype dtype, int64_t rows, int64_t count, float *panel);
    void (*widen16)(const char *from, int64_t stride, fn_dtype dtype, float *to, int64_t to_stride);
} fn_mm_kernels;

/* What AVX512_BF16 adds for two operands of bfloat16. Its VDPBF16PS takes two k at a time into each of 16 sums: a fused
 * multiply-add of the elements in the high halves, then one of those in the low halves, each rounded to nearest even, but
 * with subnormals taken for zeros. So a panel holds pairs: for k = 0, 32, 64, ... 16 pairs of the first row, of the
 * second, and so on, where pair l has k + l in its high half and k + 16 + l in its low half, zeros after the last.
 *
 * No subnormal can occur if no operand is one and the last bits of all products are worth 2^-126 or more: so are those of
 * all sums then. An element with exponent e, as it is encoded, is a multiple of 2^(e - 134), which is where
 * FN_MM_LEAST_EXPONENTS comes from. */
typedef struct {
    fn_mm_tile *tile[2 * FN_MM_MOST_ROWS];       /* for two panels whose least exponents suffice */
    fn_mm_tile *exact_tile[2 * FN_MM_MOST_ROWS]; /* for any two: takes the pairs apart */
    /* `from`: bfloat16, or bfloat16 numbers as floats. Returns the least exponent of those that are not zero, a large
     * number if all are, FN_MM_NEVER if one is subnormal. */
    int (*pack)(const char *from, int64_t stride, fn_dtype dtype, int64_t rows, int64_t count, float *panel);
    /* As in fn_mm_kernels. b's exponents are seen on the way; if they do not suffice, all is done again. */
    void (*columns)(const float *a, int a_least, int64_t rows, const char *b, int64_t k_stride, int64_t columns,
                    int64_t count, float *lanes, float *sums, int64_t sums_stride, bool first);
} fn_mm_pairs;

#define FN_MM_LEAST_EXPONENTS (2 * 134 - 126) /* of both operands, added */
#define FN_MM_NEVER (-1000)

/* The whole product for rows [m, m_end) and columns [n, n_end), one output after the other. */
void fn_mm_scalar(const fn_mm_plan *plan, int64_t m, int64_t m_end, int64_t n, int64_t n_end);

#if defined(FN_X86)
extern const fn_mm_kernels fn_mm_avx2, fn_mm_avx512;
#if defined(FN_AVX512_BF16)
extern const fn_mm_pairs fn_mm_avx512_bf16;
#endif
#elif defined(FN_ARM64)
extern const fn_mm_kernels fn_mm_neon;
#endif

#endif
