/* rms_norm_avx2.c: the norm's vocabulary in AVX2 and F16C: 8 floats a vector, 64 columns a block. */
#include "cpu.h"

#if defined(FN_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#define LANES 8
#define PATH fn_norm_avx2
#define PATH_NAME "avx2"
typedef __m256 vector;

/* a[i] = value */
static inline vector set1(float value) { return _mm256_set1_ps(value); }
/* a[i] + b[i] */
static inline vector add(vector a, vector b) { return _mm256_add_ps(a, b); }
/* a[i] * b[i] */
static inline vector mul(vector a, vector b) { return _mm256_mul_ps(a, b); }

/* ---- conversions ---------------------------------------------------------------------------------------------------- */

static inline vector load_f32(const void *p) { return _mm256_loadu_ps(p); }

/* fn_f16_to_f32(p[i]) */
static inline vector load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }

/* fn_bf16_to_f32(p[i]): bits << 16 */
static inline vector load_bf16(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}

/* fn_f32_to_f16(v[i]) */
static inline __m128i narrow_f16(vector v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* fn_f32_to_bf16(v[i]) for numbers, its 16 bits still at the top of the 32 */
static inline __m256i round_bits_of_numbers(vector v) {
    const __m256i bits = _mm256_castps_si256(v);
    /* bits + 0x7fff + (bits >> 16 & 1) */
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

static inline __m256i round_bits_bf16(vector v) {
    /* a NaN: bits | 0x400000 */
    const __m256i quiet = _mm256_or_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x00400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(round_bits_of_numbers(v), quiet, nan);
}

static inline __m128i narrow_bf16(vector v) {
    const __m256i top = _mm256_srli_epi32(round_bits_bf16(v), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
}

/* fn_bf16_to_f32 of 16 neighbours, in the paired order: within each 128 bits, a zero below each of 4 elements */
static inline void load2_bf16(const void *p, vector *first, vector *second) {
    const __m256i elements = _mm256_loadu_si256(p), zero = _mm256_setzero_si256();
    *first = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, elements));
    *second = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, elements));
}

/* fn_f32_to_bf16 of both, back in the natural order */
static inline __m256i narrow2_bf16(vector first, vector second) {
    __m256i a = round_bits_of_numbers(first), b = round_bits_of_numbers(second);
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(first, second, _CMP_UNORD_Q)) != 0, 0)) {
        a = round_bits_bf16(first);
        b = round_bits_bf16(second);
    }
    return _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
}

static inline void store2_bf16(void *p, vector first, vector second) {
    _mm256_storeu_si256(p, narrow2_bf16(first, second));
}
static inline void stream2_bf16(void *p, vector first, vector second) {
    _mm256_stream_si256(p, narrow2_bf16(first, second));
}

static inline vector round_f16(vector v) { return _mm256_cvtph_ps(narrow_f16(v)); }
static inline vector round_bf16(vector v) {
    return _mm256_castsi256_ps(_mm256_and_si256(round_bits_bf16(v), _mm256_set1_epi32((int)0xffff0000)));
}

static inline void store_f32(void *p, vector v) { _mm256_storeu_ps(p, v); }
static inline void store_f16(void *p, vector v) { _mm_storeu_si128(p, narrow_f16(v)); }
static inline void store_bf16(void *p, vector v) { _mm_storeu_si128(p, narrow_bf16(v)); }
static inline void stream_f32(void *p, vector v) { _mm256_stream_ps(p, v); }
static inline void stream_f16(void *p, vector v) { _mm_stream_si128(p, narrow_f16(v)); }
static inline void stream_bf16(void *p, vector v) { _mm_stream_si128(p, narrow_bf16(v)); }

/* ---- folds ------------------------------------------------------------------------------------------------------------ */

/* Halves are the 128-bit parts of a vector; those of four[j] hold groups at[j][0] and at[j][1], halved once, where
 * at = {0, 4}, {1, 5}, {2, 6}, {3, 7}. */
static inline vector fold4(const vector four[4]) {
    vector two[2];
    /* a[i] + a[i + 2]: two[j] holds two partial sums of each of groups 2j, 2j + 1 | 2j + 4, 2j + 5 */
    _Pragma("GCC unroll 2") for (int j = 0; j < 2; j++) {
        const vector low = _mm256_shuffle_ps(four[2 * j], four[2 * j + 1], _MM_SHUFFLE(1, 0, 1, 0));
        const vector high = _mm256_shuffle_ps(four[2 * j], four[2 * j + 1], _MM_SHUFFLE(3, 2, 3, 2));
        two[j] = add(low, high);
    }
    /* a[i] + a[i + 1]: groups 0 1 2 3 | 4 5 6 7 */
    const vector even = _mm256_shuffle_ps(two[0], two[1], _MM_SHUFFLE(2, 0, 2, 0));
    const vector odd = _mm256_shuffle_ps(two[0], two[1], _MM_SHUFFLE(3, 1, 3, 1));
    return add(even, odd);
}

/* a[i] + a[i + 4]: p[g] is group g */
static inline vector fold8(const vector p[8]) {
    vector four[4];
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
        const vector low = _mm256_permute2f128_ps(p[j], p[j + 4], 0x20);
        const vector high = _mm256_permute2f128_ps(p[j], p[j + 4], 0x31);
        four[j] = add(low, high);
    }
    return fold4(four);
}

/* a[i] + a[i + 4]: group 2j + h lies in half h of p[2j] (columns 0..3) and of p[2j + 1] (columns 4..7) */
static inline vector fold8_paired(const vector p[8]) {
    vector pair[4], four[4];
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) pair[j] = add(p[2 * j], p[2 * j + 1]);
    /* groups 0 1 | 2 3 | 4 5 | 6 7 to 0 4 | 1 5 | 2 6 | 3 7 */
    _Pragma("GCC unroll 2") for (int j = 0; j < 2; j++) {
        four[2 * j] = _mm256_permute2f128_ps(pair[j], pair[j + 2], 0x20);
        four[2 * j + 1] = _mm256_permute2f128_ps(pair[j], pair[j + 2], 0x31);
    }
    return fold4(four);
}

/* 8 -> 4 -> 2 -> 1: a[i] + a[i + half] */
static inline float fold_lanes(vector v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#include "rms_norm_lanes.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
