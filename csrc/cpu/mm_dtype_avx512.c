/* mm_dtype_avx512.c: the product's vocabulary in AVX-512 (F, BW, DQ, VL): the 16 lanes of a sum are one vector. Then pairs of
 * bfloat16, which need AVX512_BF16 too. */
#include "mm_dtype.h"

#if defined(FN_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define LANES 16
#define TILE_ROWS 4
#define TILE_COLUMNS 4
#define PATH fn_mm_avx512
#define PATH_NAME "avx512"
typedef __m512 vector;

static inline vector zero(void) { return _mm512_setzero_ps(); }
static inline vector broadcast(float x) { return _mm512_set1_ps(x); }
static inline vector add(vector a, vector b) { return _mm512_add_ps(a, b); }
static inline vector multiply_add(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }
static inline vector load_f32(const void *p) { return _mm512_loadu_ps(p); }
static inline vector load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
static inline vector load_bf16(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}

#define HAS_MASKED_LOADS
static inline __mmask16 lanes_of(int64_t count) { return (__mmask16)(count >= 16 ? 0xffff : (1 << count) - 1); }
static inline vector load_part_f32(const void *p, int64_t count) { return _mm512_maskz_loadu_ps(lanes_of(count), p); }
static inline vector load_part_f16(const void *p, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_of(count), p));
}
static inline vector load_part_bf16(const void *p, int64_t count) {
    const __m512i elements = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_of(count), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(elements, 16));
}
static inline void store(float *p, vector v) { _mm512_storeu_ps(p, v); }

static inline float fold_lanes(const vector sum[1]) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sum[0]), _mm512_extractf32x8_ps(sum[0], 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Quads are the 128-bit parts of a vector. */
#define HAS_FOLD_TILE
static inline void fold_tile(const vector acc[4][4][1], float *sums, int64_t stride, bool replace) {
    vector four[4], two[2];
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        vector eight[2];
        /* a[l] + a[l + 8]: quads 0, 1 of eight[h] are of sum (i, 2h), quads 2, 3 of sum (i, 2h + 1) */
        _Pragma("GCC unroll 2") for (int h = 0; h < 2; h++) {
            const vector a = acc[i][2 * h][0], b = acc[i][2 * h + 1][0];
            eight[h] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(1, 0, 1, 0)),
                                     _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(3, 2, 3, 2)));
        }
        /* a[l] + a[l + 4]: quad j of four[i] is of sum (i, j) */
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], _MM_SHUFFLE(2, 0, 2, 0)),
                                _mm512_shuffle_f32x4(eight[0], eight[1], _MM_SHUFFLE(3, 1, 3, 1)));
    }
    /* a[l] + a[l + 2]: quad j of two[h] has two lanes of sum (2h, j) and two of sum (2h + 1, j) */
    _Pragma("GCC unroll 2") for (int h = 0; h < 2; h++) {
        const vector a = four[2 * h], b = four[2 * h + 1];
        two[h] = _mm512_add_ps(_mm512_shuffle_ps(a, b, _MM_SHUFFLE(1, 0, 1, 0)),
                               _mm512_shuffle_ps(a, b, _MM_SHUFFLE(3, 2, 3, 2)));
    }
    /* a[l] + a[l + 1]: quad j has sums (0, j), (1, j), (2, j), (3, j) */
    const vector one = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], _MM_SHUFFLE(2, 0, 2, 0)),
                                     _mm512_shuffle_ps(two[0], two[1], _MM_SHUFFLE(3, 1, 3, 1)));
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const vector folded = _mm512_permutexvar_ps(in_order, one);
    const __m128 row[4] = {_mm512_castps512_ps128(folded), _mm512_extractf32x4_ps(folded, 1),
                           _mm512_extractf32x4_ps(folded, 2), _mm512_extractf32x4_ps(folded, 3)};
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        float *to = sums + i * stride;
        _mm_storeu_ps(to, replace ? row[i] : _mm_add_ps(_mm_loadu_ps(to), row[i]));
    }
}

static inline void transpose16(const vector block[16][1], float *to, int64_t to_stride) {
    vector quad[4][4]; /* [g][r]: quad q has element 4 * q + r of rows 4 * g to 4 * g + 3 */
    _Pragma("GCC unroll 4") for (int g = 0; g < 4; g++) {
        const vector a = block[4 * g][0], b = block[4 * g + 1][0], c = block[4 * g + 2][0], d = block[4 * g + 3][0];
        const vector ab_low = _mm512_unpacklo_ps(a, b), ab_high = _mm512_unpackhi_ps(a, b);
        const vector cd_low = _mm512_unpacklo_ps(c, d), cd_high = _mm512_unpackhi_ps(c, d);
        quad[g][0] = _mm512_shuffle_ps(ab_low, cd_low, _MM_SHUFFLE(1, 0, 1, 0));
        quad[g][1] = _mm512_shuffle_ps(ab_low, cd_low, _MM_SHUFFLE(3, 2, 3, 2));
        quad[g][2] = _mm512_shuffle_ps(ab_high, cd_high, _MM_SHUFFLE(1, 0, 1, 0));
        quad[g][3] = _mm512_shuffle_ps(ab_high, cd_high, _MM_SHUFFLE(3, 2, 3, 2));
    }
    _Pragma("GCC unroll 4") for (int r = 0; r < 4; r++) {
        const vector low01 = _mm512_shuffle_f32x4(quad[0][r], quad[1][r], _MM_SHUFFLE(1, 0, 1, 0));
        const vector low23 = _mm512_shuffle_f32x4(quad[2][r], quad[3][r], _MM_SHUFFLE(1, 0, 1, 0));
        const vector high01 = _mm512_shuffle_f32x4(quad[0][r], quad[1][r], _MM_SHUFFLE(3, 2, 3, 2));
        const vector high23 = _mm512_shuffle_f32x4(quad[2][r], quad[3][r], _MM_SHUFFLE(3, 2, 3, 2));
        store(to + r * to_stride, _mm512_shuffle_f32x4(low01, low23, _MM_SHUFFLE(2, 0, 2, 0)));
        store(to + (4 + r) * to_stride, _mm512_shuffle_f32x4(low01, low23, _MM_SHUFFLE(3, 1, 3, 1)));
        store(to + (8 + r) * to_stride, _mm512_shuffle_f32x4(high01, high23, _MM_SHUFFLE(2, 0, 2, 0)));
        store(to + (12 + r) * to_stride, _mm512_shuffle_f32x4(high01, high23, _MM_SHUFFLE(3, 1, 3, 1)));
    }
}

#include "mm_dtype_lanes.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* ---- pairs of bfloat16 ----------------------------------------------------------------------------------------------- */

#if defined(FN_AVX512_BF16)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))),                 \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

static inline vector high_half(vector pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32((int)0xffff0000)));
}
static inline vector low_half(vector pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}

/* 32 elements of a row: the first `left` of them, then zeros. */
INLINE __m512i load_elements(const char *from, int64_t left) {
    if (left >= 32) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16((__mmask32)((UINT32_C(1) << left) - 1), from);
}

/* Word 2 * l becomes element 16 + l, word 2 * l + 1 element l. */
INLINE __m512i in_pairs(__m512i elements) {
    const __m512i low = _mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
    const __m512i high = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_epi16(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)), elements);
}

INLINE void pair_tile(bool exact, int rows, int columns, const float *a, const char *b, int64_t count, float *sums,
                      int64_t sums_stride, bool first) {
    vector acc[TILE_ROWS][TILE_COLUMNS][1];
    FOR_ROWS FOR_COLUMNS acc[i][j][0] = zero();
    for (; count > 0; count -= 2 * LANES) {
        vector y[TILE_COLUMNS];
        FOR_COLUMNS y[j] = load_f32(b + j * 4 * LANES);
        FOR_ROWS {
            vector x = load_f32(a + i * LANES);
            KEEP(x);
            FOR_COLUMNS {
                vector *sum = &acc[i][j][0];
                if (!exact) {
                    *sum = _mm512_dpbf16_ps(*sum, (__m512bh)x, (__m512bh)y[j]);
                    continue;
                }
                *sum = multiply_add(high_half(x), high_half(y[j]), *sum);
                /* The contract's padding may end here, and a sum of -0 would not outlive more of it. */
                if (count > LANES) *sum = multiply_add(low_half(x), low_half(y[j]), *sum);
            }
        }
        a += rows * LANES;
        b += columns * 4 * LANES;
    }
    put_sums(acc, rows, columns, sums, sums_stride, first);
}

#define DEFINE_PAIR_TILE(name, exact, rows, columns)                                                                   \
    static void name(const float *a, const char *b, int64_t b_stride, int64_t count, float *sums, int64_t sums_stride, \
                     bool first) {                                                                                     \
        (void)b_stride;                                                                                                \
        pair_tile(exact, rows, columns, a, b, count, sums, sums_stride, first);                                        \
    }
#define DEFINE_PAIR_TILES(name, exact)                                                                                 \
    DEFINE_PAIR_TILE(name##_1, exact, 1, 1)                                                                            \
    DEFINE_PAIR_TILE(name##_1_wide, exact, 1, TILE_COLUMNS)                                                            \
    DEFINE_PAIR_TILE(name##_2, exact, 2, 1)                                                                            \
    DEFINE_PAIR_TILE(name##_2_wide, exact, 2, TILE_COLUMNS)                                                            \
    DEFINE_PAIR_TILE(name##_3, exact, 3, 1)                                                                            \
    DEFINE_PAIR_TILE(name##_3_wide, exact, 3, TILE_COLUMNS)                                                            \
    DEFINE_PAIR_TILE(name##_4, exact, 4, 1)                                                                            \
    DEFINE_PAIR_TILE(name##_4_wide, exact, 4, TILE_COLUMNS)
DEFINE_PAIR_TILES(pairs, false)
DEFINE_PAIR_TILES(exact, true)
#define PAIR_TILES(name)                                                                                               \
    {name##_1, name##_1_wide, name##_2, name##_2_wide, name##_3, name##_3_wide, name##_4, name##_4_wide}

/* The running minimum of magnitudes less 1: zeros are the greatest. */
INLINE __m512i less_of(__m512i least, __m512i elements) {
    const __m512i magnitude = _mm512_and_si512(elements, _mm512_set1_epi16(0x7fff));
    return _mm512_min_epu16(least, _mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)));
}

INLINE int least_exponent(__m512i least) {
    const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(least), _mm512_extracti64x4_epi64(least, 1));
    const __m128i quarter = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const int exponent = (_mm_extract_epi16(_mm_minpos_epu16(quarter), 0) + 1) >> 7;
    return exponent ? exponent : FN_MM_NEVER;
}

/* The pairs of 32 places k of each row; `left` of them are the rows'. */
INLINE __m512i pack_step(fn_dtype dtype, const char *from, int64_t stride, int64_t rows, int64_t left, float *panel,
                         __m512i least) {
    _Pragma("GCC unroll 4") for (int64_t i = 0; i < rows; i++) {
        const char *at = from + i * stride;
        __m512i pairs;
        if (dtype == FN_BFLOAT16) pairs = in_pairs(load_elements(at, left));
        else {
            const vector low = left > LANES ? load_part_f32(at + 4 * LANES, left - LANES) : zero();
            pairs = _mm512_or_si512(_mm512_castps_si512(load_part_f32(at, left)),
                                    _mm512_srli_epi32(_mm512_castps_si512(low), 16));
        }
        least = less_of(least, pairs);
        _mm512_store_si512(panel + i * LANES, pairs);
    }
    return least;
}

INLINE int pack_pairs_as(fn_dtype dtype, const char *from, int64_t stride, int64_t rows, int64_t count, float *panel) {
    __m512i least = _mm512_set1_epi32(-1);
    int64_t left = count;
    for (; left >= 2 * LANES; left -= 2 * LANES) {
        least = pack_step(dtype, from, stride, rows, 2 * LANES, panel, least);
        from += 2 * LANES * size_of(dtype);
        panel += rows * LANES;
    }
    if (left > 0) least = pack_step(dtype, from, stride, rows, left, panel, least);
    return least_exponent(least);
}

static int pack_pairs(const char *from, int64_t stride, fn_dtype dtype, int64_t rows, int64_t count, float *panel) {
    if (dtype != FN_BFLOAT16) return pack_pairs_as(FN_FLOAT32, from, stride, rows, count, panel);
    if (rows == TILE_COLUMNS) return pack_pairs_as(FN_BFLOAT16, from, stride, TILE_COLUMNS, count, panel);
    return pack_pairs_as(FN_BFLOAT16, from, stride, rows, count, panel);
}

/* 16 pairs of neighbouring columns, the first `part` of them: from[] above, 0 or the elements `low` bytes on below. */
INLINE __m512i column_pairs(const char *from, bool both, int64_t low, int64_t part) {
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_of(part), from));
    const __m512i pairs = _mm512_slli_epi32(high, 16);
    if (!both) return pairs;
    return _mm512_or_si512(pairs, _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_of(part), from + low)));
}

/* As column_step(), mm_dtype_lanes.h, with `depth` pairs: of one k each if not `both`. Returns less_of() all of b's. */
INLINE __m512i pair_column_step(bool exact, int depth, bool both, int width, int64_t part, const float *a,
                                int64_t a_step, int64_t rows, const char *b, int64_t b_step, float *sums,
                                int64_t sums_step, __m512i least) {
    vector y[DEPTH / 2][WIDTH];
    FOR_DEPTH FOR_WIDTH {
        const char *from = b + 2 * d * b_step + v * LANES * 2;
        const __m512i pairs = column_pairs(from, both, b_step, part);
        __builtin_prefetch(from + DEPTH * b_step, 0, 2);
        __builtin_prefetch(from + (DEPTH + 1) * b_step, 0, 2);
        least = less_of(least, pairs);
        y[d][v] = _mm512_castsi512_ps(pairs);
    }
    for (int64_t i = 0; i < rows; i++, a += LANES, sums += sums_step) {
        vector sum[WIDTH];
        FOR_WIDTH sum[v] = load_f32(sums + v * LANES);
        FOR_DEPTH {
            const vector x = broadcast(a[d * a_step]);
            FOR_WIDTH {
                if (!exact) sum[v] = _mm512_dpbf16_ps(sum[v], (__m512bh)x, (__m512bh)y[d][v]);
                else sum[v] = multiply_add(high_half(x), high_half(y[d][v]), sum[v]);
                if (exact && both) sum[v] = multiply_add(low_half(x), low_half(y[d][v]), sum[v]);
            }
        }
        FOR_WIDTH store(sums + v * LANES, sum[v]);
    }
    return least;
}

INLINE __m512i pair_column_steps(bool exact, int depth, bool both, int64_t columns, const float *a, int64_t rows,
                                 const char *b, int64_t b_step, float *sums, int64_t sums_step, __m512i least) {
    const int64_t a_step = rows * LANES;
    int64_t j = 0;
    for (; j + WIDTH * LANES <= columns; j += WIDTH * LANES)
        least = pair_column_step(exact, depth, both, WIDTH, LANES, a, a_step, rows, b + j * 2, b_step, sums + j,
                                 sums_step, least);
    for (; j < columns; j += LANES)
        least = pair_column_step(exact, depth, both, 1, columns - j, a, a_step, rows, b + j * 2, b_step, sums + j,
                                 sums_step, least);
    return least;
}

/* All lanes of a chunk. Returns b's least exponent. */
INLINE int pair_lanes(bool exact, const float *a, int64_t rows, const char *b, int64_t k_stride, int64_t columns,
                      int64_t count, float *lanes, int64_t step) {
    const int64_t lane_size = rows * step, b_step = FN_MM_LANES * k_stride;
    __m512i least = _mm512_set1_epi32(-1);
    memset(lanes, 0, (size_t)(FN_MM_LANES * lane_size) * sizeof *lanes);
    for (int64_t k = 0, depth; k < count; k += 2 * depth * FN_MM_LANES) {
        depth = count - k >= DEPTH * FN_MM_LANES ? DEPTH / 2 : count - k >= DEPTH / 2 * FN_MM_LANES ? DEPTH / 4 : 1;
        for (int64_t l = 0; l < FN_MM_LANES && k + l < count; l++) {
            const float *x = a + k / 2 * rows + l;
            const char *y = b + (k + l) * k_stride;
            float *lane = lanes + l * lane_size;
            if (depth == DEPTH / 2)
                least = pair_column_steps(exact, DEPTH / 2, true, columns, x, rows, y, b_step, lane, step, least);
            else if (depth > 1)
                least = pair_column_steps(exact, DEPTH / 4, true, columns, x, rows, y, b_step, lane, step, least);
            else if (k + l + FN_MM_LANES < count)
                least = pair_column_steps(exact, 1, true, columns, x, rows, y, b_step, lane, step, least);
            else least = pair_column_steps(exact, 1, false, columns, x, rows, y, b_step, lane, step, least);
        }
    }
    return least_exponent(least);
}

static void pairs_columns(const float *a, int a_least, int64_t rows, const char *b, int64_t k_stride, int64_t columns,
                          int64_t count, float *lanes, float *sums, int64_t sums_stride, bool first) {
    const int64_t step = (columns + LANES - 1) / LANES * LANES;
    int b_least = 254; /* the greatest of a finite number */
    if (a_least + b_least >= FN_MM_LEAST_EXPONENTS)
        b_least = pair_lanes(false, a, rows, b, k_stride, columns, count, lanes, step);
    if (a_least + b_least < FN_MM_LEAST_EXPONENTS) pair_lanes(true, a, rows, b, k_stride, columns, count, lanes, step);
    for (int64_t i = 0; i < rows; i++)
        fold_columns(lanes + i * step, rows * step, columns, count % FN_MM_LANES > 0, sums + i * sums_stride, first);
}

const fn_mm_pairs fn_mm_avx512_bf16 = {
    .tile = PAIR_TILES(pairs),
    .exact_tile = PAIR_TILES(exact),
    .pack = pack_pairs,
    .columns = pairs_columns,
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif /* FN_AVX512_BF16 */
#endif
