/* numerics.h: every operation that decides a bit, for C11 and for CUDA.
 *
 * docs/numerics.md is the contract; this file is its alphabet. Each function is one IEEE-754 binary32 operation, rounded
 * to nearest even, with subnormals kept. Kernels use these functions, or an intrinsic that performs the same statement
 * lane by lane, and nothing else. A compiler that contracts `a * b + c` or approximates a division breaks the contract
 * silently, so host code is compiled with -ffp-contract=off, device code spells its rounding out, and fast math is refused.
 */
#ifndef FUSEDNORM_NUMERICS_H
#define FUSEDNORM_NUMERICS_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) ||                         \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "fusednorm: -ffast-math, or a part of it, changes results; compile without it"
#endif
/* 16 differs from 0 for _Float16 alone: gcc says it for processors with AVX512-FP16. */
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "fusednorm: float expressions must be evaluated in binary32 (FLT_EVAL_METHOD 0; on x86-32: -msse2 -mfpmath=sse)"
#endif

#if defined(__CUDACC__)
#define FN_NUMERIC static __device__ __forceinline__
#else
#define FN_NUMERIC static inline
#endif

/* ---- encodings ---------------------------------------------------------------------------------------------------- */

FN_NUMERIC uint32_t fn_f32_bits(float value) {
#if defined(__CUDACC__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

FN_NUMERIC float fn_bits_f32(uint32_t bits) {
#if defined(__CUDACC__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

/* ---- arithmetic --------------------------------------------------------------------------------------------------- */

#if defined(__CUDACC__)
FN_NUMERIC float fn_add(float a, float b) { return __fadd_rn(a, b); }
FN_NUMERIC float fn_mul(float a, float b) { return __fmul_rn(a, b); }
FN_NUMERIC float fn_div(float a, float b) { return __fdiv_rn(a, b); }
FN_NUMERIC float fn_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FN_NUMERIC float fn_rsqrt(float v) { return __frsqrt_rn(v); }
#else
FN_NUMERIC float fn_add(float a, float b) { return a + b; }
FN_NUMERIC float fn_mul(float a, float b) { return a * b; }
FN_NUMERIC float fn_div(float a, float b) { return a / b; }
/* a * b + c, rounded once: asked for by name, never made by contraction. */
FN_NUMERIC float fn_fma(float a, float b, float c) { return fmaf(a, b, c); }

/* 1/sqrt(v), correctly rounded: the double result is close enough to the real one that rounding it again never crosses a
 * boundary of binary32. tests/c/rsqrt_exhaustive.c shows it for every non-negative float. */
FN_NUMERIC float fn_rsqrt(float v) { return (float)(1.0 / sqrt((double)v)); }
#endif

/* The sum of 8 neighbours, by halves. */
FN_NUMERIC float fn_fold8(const float p[8]) {
    const float a0 = fn_add(p[0], p[4]), a1 = fn_add(p[1], p[5]), a2 = fn_add(p[2], p[6]), a3 = fn_add(p[3], p[7]);
    return fn_add(fn_add(a0, a2), fn_add(a1, a3));
}

/* ---- conversions: widening is exact, narrowing rounds to nearest even; a NaN stays a NaN ------------------------------ */

FN_NUMERIC float fn_bf16_to_f32(uint16_t half) { return fn_bits_f32((uint32_t)half << 16); }

FN_NUMERIC uint16_t fn_f32_to_bf16(float value) {
    const uint32_t bits = fn_f32_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x0040u);
    /* Half of the last kept place, less one unless the kept part is odd: a tie goes to even. The carry may reach Inf. */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

FN_NUMERIC float fn_f16_to_f32(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t exponent = half >> 10 & 0x1fu, mantissa = half & 0x3ffu;
    if (exponent == 0x1f) return fn_bits_f32(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return fn_bits_f32(sign | (exponent + 112u) << 23 | mantissa << 13);
    /* A subnormal is mantissa * 2^-24, a normal binary32 number: both factors and the product are exact. */
    return fn_bits_f32(sign | fn_f32_bits(fn_mul((float)mantissa, 0x1p-24f)));
}

FN_NUMERIC uint16_t fn_f32_to_f16(float value) {
    const uint32_t bits = fn_f32_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x1ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and more round to Inf */
    if (magnitude >= 0x38800000u) {                                  /* 2^-14 and more: a normal half */
        const uint32_t rebased = magnitude - (112u << 23);
        return (uint16_t)(sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13);
    }
    if (magnitude < 0x33000000u) return (uint16_t)sign; /* below 2^-25, half of the smallest subnormal */
    {
        /* In units of 2^-24, the last place of a subnormal half: significand * 2^-shift. */
        const uint32_t shift = 126u - (magnitude >> 23), significand = (magnitude & 0x7fffffu) | 0x800000u;
        const uint32_t kept = significand >> shift, rest = significand & ((1u << shift) - 1u), tie = 1u << (shift - 1u);
        return (uint16_t)(sign | (kept + (rest > tie || (rest == tie && (kept & 1u)))));
    }
}

#endif
