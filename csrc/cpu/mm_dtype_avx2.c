/* mm_dtype_avx2.c: the product's vocabulary in AVX2, FMA and F16C: the 16 lanes of a sum are two vectors. */
#include "mm_dtype.h"

#if defined(FN_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define LANES 8
#define TILE_ROWS 3
#define TILE_COLUMNS 2
#define PATH fn_mm_avx2
#define PATH_NAME "avx2"
typedef __m256 vector;

static inline vector zero(void) { return _mm256_setzero_ps(); }
static inline vector broadcast(float x) { return _mm256_set1_ps(x); }
static inline vector add(vector a, vector b) { return _mm256_add_ps(a, b); }
static inline vector multiply_add(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }
static inline vector load_f32(const void *p) { return _mm256_loadu_ps(p); }
static inline vector load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
static inline vector load_bf16(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
static inline void store(float *p, vector v) { _mm256_storeu_ps(p, v); }

static inline float fold_lanes(const vector sum[2]) {
    const __m256 eight = _mm256_add_ps(sum[0], sum[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Halves are the 128-bit parts of a vector. */
static inline void transpose16(const vector block[16][2], float *to, int64_t to_stride) {
    for (int k = 0; k < 16; k += 8)
        for (int p = 0; p < 2; p++) {
            vector half[2][4]; /* [g][r]: half h has element 4 * h + r of rows k + 4 * g to k + 4 * g + 3 */
            _Pragma("GCC unroll 2") for (int g = 0; g < 2; g++) {
                const vector a = block[k + 4 * g][p], b = block[k + 4 * g + 1][p];
                const vector c = block[k + 4 * g + 2][p], d = block[k + 4 * g + 3][p];
                const vector ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
                const vector cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
                half[g][0] = _mm256_shuffle_ps(ab_low, cd_low, _MM_SHUFFLE(1, 0, 1, 0));
                half[g][1] = _mm256_shuffle_ps(ab_low, cd_low, _MM_SHUFFLE(3, 2, 3, 2));
                half[g][2] = _mm256_shuffle_ps(ab_high, cd_high, _MM_SHUFFLE(1, 0, 1, 0));
                half[g][3] = _mm256_shuffle_ps(ab_high, cd_high, _MM_SHUFFLE(3, 2, 3, 2));
            }
            float *rows = to + 8 * p * to_stride + k;
            _Pragma("GCC unroll 4") for (int r = 0; r < 4; r++) {
                store(rows + r * to_stride, _mm256_permute2f128_ps(half[0][r], half[1][r], 0x20));
                store(rows + (4 + r) * to_stride, _mm256_permute2f128_ps(half[0][r], half[1][r], 0x31));
            }
        }
}

#include "mm_dtype_lanes.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
