/* mm_dtype_neon.c: the product's vocabulary in NEON (AArch64): the 16 lanes of a sum are four vectors. */
#include "mm_dtype.h"

#if defined(FN_ARM64)
#include <arm_neon.h>

#define LANES 4
#define TILE_ROWS 3
#define TILE_COLUMNS 2
#define PATH fn_mm_neon
#define PATH_NAME "neon"
typedef float32x4_t vector;

static inline vector zero(void) { return vdupq_n_f32(0); }
static inline vector broadcast(float x) { return vdupq_n_f32(x); }
static inline vector add(vector a, vector b) { return vaddq_f32(a, b); }
static inline vector multiply_add(vector a, vector b, vector c) { return vfmaq_f32(c, a, b); }
/* Through bytes: an address may be odd. */
static inline vector load_f32(const void *p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
static inline vector load_f16(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
static inline vector load_bf16(const void *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
static inline void store(float *p, vector v) { vst1q_f32(p, v); }

static inline float fold_lanes(const vector sum[4]) {
    const vector four = vaddq_f32(vaddq_f32(sum[0], sum[2]), vaddq_f32(sum[1], sum[3])); /* 16 -> 8 -> 4 */
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

static inline void transpose16(const vector block[16][4], float *to, int64_t to_stride) {
    for (int k = 0; k < 16; k += 4)
        for (int p = 0; p < 4; p++) {
            const float32x4x2_t ab = vtrnq_f32(block[k][p], block[k + 1][p]);
            const float32x4x2_t cd = vtrnq_f32(block[k + 2][p], block[k + 3][p]);
            float *rows = to + 4 * p * to_stride + k;
            store(rows, vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0])));
            store(rows + to_stride, vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1])));
            store(rows + 2 * to_stride, vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0])));
            store(rows + 3 * to_stride, vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1])));
        }
}

#include "mm_dtype_lanes.h"
#endif
