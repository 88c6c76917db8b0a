/* rms_norm_neon.c: the norm's vocabulary in NEON (AArch64): 4 floats a vector, 32 columns a block. */
#include "cpu.h"

#if defined(FN_ARM64)
#include <arm_neon.h>

#define LANES 4
#define PATH fn_norm_neon
#define PATH_NAME "neon"
typedef float32x4_t vector;

/* a[i] = value */
static inline vector set1(float value) { return vdupq_n_f32(value); }
/* a[i] + b[i] */
static inline vector add(vector a, vector b) { return vaddq_f32(a, b); }
/* a[i] * b[i] */
static inline vector mul(vector a, vector b) { return vmulq_f32(a, b); }

/* ---- conversions ---------------------------------------------------------------------------------------------------- */

/* Through bytes: an address may be odd. */
static inline vector load_f32(const void *p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }

/* fn_f16_to_f32(p[i]) */
static inline vector load_f16(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }

/* fn_bf16_to_f32(p[i]): bits << 16 */
static inline vector load_bf16(const void *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}

/* fn_f32_to_f16(v[i]): FPCR is at its default, to nearest even */
static inline float16x4_t narrow_f16(vector v) { return vcvt_f16_f32(v); }

/* fn_f32_to_bf16(v[i]), its 16 bits still at the top of the 32 */
static inline uint32x4_t round_bits_bf16(vector v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    /* bits + 0x7fff + (bits >> 16 & 1) */
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    /* a NaN: bits | 0x400000 */
    const uint32x4_t number = vceqq_f32(v, v);
    return vbslq_u32(number, rounded, vorrq_u32(bits, vdupq_n_u32(0x00400000)));
}

static inline uint16x4_t narrow_bf16(vector v) { return vshrn_n_u32(round_bits_bf16(v), 16); }

static inline vector round_f16(vector v) { return vcvt_f32_f16(narrow_f16(v)); }
static inline vector round_bf16(vector v) {
    return vreinterpretq_f32_u32(vandq_u32(round_bits_bf16(v), vdupq_n_u32(0xffff0000)));
}

static inline void store_f32(void *p, vector v) { vst1q_u8(p, vreinterpretq_u8_f32(v)); }
static inline void store_f16(void *p, vector v) { vst1_u8(p, vreinterpret_u8_f16(narrow_f16(v))); }
static inline void store_bf16(void *p, vector v) { vst1_u8(p, vreinterpret_u8_u16(narrow_bf16(v))); }

/* The paired order of 8 neighbours is the natural one: 4 floats a vector. */
static inline void load2_bf16(const void *p, vector *first, vector *second) {
    const uint16x8_t elements = vreinterpretq_u16_u8(vld1q_u8(p));
    *first = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(elements), 16));
    *second = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(elements), 16));
}

static inline void store2_bf16(void *p, vector first, vector second) {
    const uint16x8_t elements = vshrn_high_n_u32(narrow_bf16(first), round_bits_bf16(second), 16);
    vst1q_u8(p, vreinterpretq_u8_u16(elements));
}

/* AArch64 cores detect streams of whole lines by themselves. */
#define stream_f32 store_f32
#define stream_f16 store_f16
#define stream_bf16 store_bf16
#define stream2_bf16 store2_bf16

/* ---- folds ------------------------------------------------------------------------------------------------------------ */

/* Group g is p[2g] and p[2g + 1]. */
static inline vector fold8(const vector p[8]) {
    vector four[4], two[2];
    /* a[i] + a[i + 4]: four[g] is group g */
    _Pragma("GCC unroll 4") for (int g = 0; g < 4; g++) four[g] = add(p[2 * g], p[2 * g + 1]);
    /* a[i] + a[i + 2]: two[j] holds two partial sums of group 2j and two of group 2j + 1 */
    _Pragma("GCC unroll 2") for (int j = 0; j < 2; j++) {
        const float64x2_t a = vreinterpretq_f64_f32(four[2 * j]), b = vreinterpretq_f64_f32(four[2 * j + 1]);
        two[j] = add(vreinterpretq_f32_f64(vtrn1q_f64(a, b)), vreinterpretq_f32_f64(vtrn2q_f64(a, b)));
    }
    /* a[i] + a[i + 1]: groups 0 1 2 3 */
    return add(vuzp1q_f32(two[0], two[1]), vuzp2q_f32(two[0], two[1]));
}

#define fold8_paired fold8

/* 4 -> 2 -> 1: a[i] + a[i + half] */
static inline float fold_lanes(vector v) {
    const float32x2_t two = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

#include "rms_norm_lanes.h"
#endif
