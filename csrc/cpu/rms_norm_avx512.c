/* rms_norm_avx512.c: the norm's vocabulary in AVX-512 (F, BW, DQ, VL): 16 floats a vector, 128 columns a block. */
#include "cpu.h"

#if defined(FN_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define LANES 16
#define PATH fn_norm_avx512
#define PATH_NAME "avx512"
typedef __m512 vector;

/* a[i] = value */
static inline vector set1(float value) { return _mm512_set1_ps(value); }
/* a[i] + b[i] */
static inline vector add(vector a, vector b) { return _mm512_add_ps(a, b); }
/* a[i] * b[i] */
static inline vector mul(vector a, vector b) { return _mm512_mul_ps(a, b); }

/* ---- conversions ---------------------------------------------------------------------------------------------------- */

static inline vector load_f32(const void *p) { return _mm512_loadu_ps(p); }

/* fn_f16_to_f32(p[i]) */
static inline vector load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }

/* fn_bf16_to_f32(p[i]): bits << 16 */
static inline vector load_bf16(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}

/* fn_f32_to_f16(v[i]) */
static inline __m256i narrow_f16(vector v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* fn_f32_to_bf16(v[i]) for numbers, its 16 bits still at the top of the 32: vcvtneps2bf16 would flush subnormals. */
static inline __m512i round_bits_of_numbers(vector v) {
    const __m512i bits = _mm512_castps_si512(v);
    /* bits + 0x7fff, + 1 if bits >> 16 is odd */
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x00010000));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
}

static inline __m512i round_bits_bf16(vector v) {
    /* a NaN: bits | 0x400000 */
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(round_bits_of_numbers(v), nan, _mm512_castps_si512(v), _mm512_set1_epi32(0x00400000));
}

static inline __m256i narrow_bf16(vector v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bits_bf16(v), 16)); }

/* fn_bf16_to_f32 of 32 neighbours, in the paired order: within each 128 bits, a zero below each of 4 elements */
static inline void load2_bf16(const void *p, vector *first, vector *second) {
    const __m512i elements = _mm512_loadu_si512(p), zero = _mm512_setzero_si512();
    *first = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, elements));
    *second = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, elements));
}

/* fn_f32_to_bf16 of both, back in the natural order */
static inline __m512i narrow2_bf16(vector first, vector second) {
    __m512i a = round_bits_of_numbers(first), b = round_bits_of_numbers(second);
    if (__builtin_expect(_mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q) != 0, 0)) {
        a = round_bits_bf16(first);
        b = round_bits_bf16(second);
    }
    return _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));
}

static inline void store2_bf16(void *p, vector first, vector second) {
    _mm512_storeu_si512(p, narrow2_bf16(first, second));
}
static inline void stream2_bf16(void *p, vector first, vector second) {
    _mm512_stream_si512(p, narrow2_bf16(first, second));
}

static inline vector round_f16(vector v) { return _mm512_cvtph_ps(narrow_f16(v)); }
static inline vector round_bf16(vector v) {
    return _mm512_castsi512_ps(_mm512_and_si512(round_bits_bf16(v), _mm512_set1_epi32((int)0xffff0000)));
}

static inline void store_f32(void *p, vector v) { _mm512_storeu_ps(p, v); }
static inline void store_f16(void *p, vector v) { _mm256_storeu_si256(p, narrow_f16(v)); }
static inline void store_bf16(void *p, vector v) { _mm256_storeu_si256(p, narrow_bf16(v)); }
static inline void stream_f32(void *p, vector v) { _mm512_stream_ps(p, v); }
static inline void stream_f16(void *p, vector v) { _mm256_stream_si256(p, narrow_f16(v)); }
static inline void stream_bf16(void *p, vector v) { _mm256_stream_si256(p, narrow_bf16(v)); }

/* ---- folds ------------------------------------------------------------------------------------------------------------ */

/* Quads are the 128-bit parts of a vector; quad q of four[j] holds group 4j + q, halved once. */
static inline vector fold4(const vector four[4]) {
    vector two[2];
    /* a[i] + a[i + 2]: quad q of two[j] holds two partial sums of group 8j + q and two of group 8j + 4 + q */
    _Pragma("GCC unroll 2") for (int j = 0; j < 2; j++) {
        const vector low = _mm512_shuffle_ps(four[2 * j], four[2 * j + 1], _MM_SHUFFLE(1, 0, 1, 0));
        const vector high = _mm512_shuffle_ps(four[2 * j], four[2 * j + 1], _MM_SHUFFLE(3, 2, 3, 2));
        two[j] = add(low, high);
    }
    /* a[i] + a[i + 1]: quad q holds groups q, 4 + q, 8 + q, 12 + q */
    const vector even = _mm512_shuffle_ps(two[0], two[1], _MM_SHUFFLE(2, 0, 2, 0));
    const vector odd = _mm512_shuffle_ps(two[0], two[1], _MM_SHUFFLE(3, 1, 3, 1));
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(in_order, add(even, odd));
}

/* a[i] + a[i + 4]: group g lies in half g % 2 of p[g / 2], as columns 0..3 and 4..7 */
static inline vector fold8(const vector p[8]) {
    vector four[4];
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
        const vector low = _mm512_shuffle_f32x4(p[2 * j], p[2 * j + 1], _MM_SHUFFLE(2, 0, 2, 0));
        const vector high = _mm512_shuffle_f32x4(p[2 * j], p[2 * j + 1], _MM_SHUFFLE(3, 1, 3, 1));
        four[j] = add(low, high);
    }
    return fold4(four);
}

/* a[i] + a[i + 4]: group 4j + q lies in quad q of p[2j] (columns 0..3) and of p[2j + 1] (columns 4..7) */
static inline vector fold8_paired(const vector p[8]) {
    vector four[4];
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) four[j] = add(p[2 * j], p[2 * j + 1]);
    return fold4(four);
}

/* 16 -> 8 -> 4 -> 2 -> 1: a[i] + a[i + half] */
static inline float fold_lanes(vector v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
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
