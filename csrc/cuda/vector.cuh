/* vector.cuh: 8 neighbours of a row, which every kernel moves and converts together.
 *
 * Above each line of PTX stands the scalar statement of numerics.h that it performs; all 2^32 inputs of each conversion are
 * compared with the CPU's by tests/test_cuda_exhaustive.py.
 */
#ifndef FUSEDNORM_VECTOR_CUH
#define FUSEDNORM_VECTOR_CUH

#include "../dtypes.h"
#include "../numerics.h"

#define FN_DEVICE static __device__ __forceinline__

enum { FN_GROUP = 8 };                      /* elements: the leaves that the contract's fold takes together */
constexpr fn_dtype FN_ANY = FN_DTYPE_COUNT; /* a template's dtype that the call decides */

/* ---- two neighbours of 16 bits ---------------------------------------------------------------------------------------- */

/* low = fn_bf16_to_f32(pair), high = fn_bf16_to_f32(pair >> 16) */
FN_DEVICE void fn_unpack2_bf16(uint32_t pair, float *low, float *high) {
    *low = __uint_as_float(pair << 16);
    *high = __uint_as_float(pair & 0xffff0000u);
}

/* fn_f32_to_bf16(low) | fn_f32_to_bf16(high) << 16 */
FN_DEVICE uint32_t fn_pack2_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/* low = fn_f16_to_f32(pair), high = fn_f16_to_f32(pair >> 16) */
FN_DEVICE void fn_unpack2_f16(uint32_t pair, float *low, float *high) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(*low), "=f"(*high)
        : "r"(pair));
}

/* fn_f32_to_f16(low) | fn_f32_to_f16(high) << 16 */
FN_DEVICE uint32_t fn_pack2_f16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/* ---- a group ---------------------------------------------------------------------------------------------------------- */

/* 8 elements as they lie in memory; those of 16 bits fill v[0] alone. */
template <fn_dtype D> struct fn_raw {
    static constexpr int vectors = D == FN_FLOAT32 || D == FN_ANY ? 2 : 1;
    uint4 v[vectors];
};

/* The dtype that is meant: the template's, or the call's. */
template <fn_dtype D> FN_DEVICE fn_dtype fn_known(fn_dtype dtype) { return D == FN_ANY ? dtype : D; }

template <fn_dtype D> FN_DEVICE int fn_group_bytes(fn_dtype dtype) {
    return fn_known<D>(dtype) == FN_FLOAT32 ? 32 : 16;
}

template <fn_dtype D> FN_DEVICE void fn_load(fn_raw<D> *raw, const char *at, fn_dtype dtype) {
    raw->v[0] = *(const uint4 *)at;
    if (fn_raw<D>::vectors == 2 && fn_known<D>(dtype) == FN_FLOAT32)
        raw->v[fn_raw<D>::vectors - 1] = *(const uint4 *)(at + 16);
}

template <fn_dtype D> FN_DEVICE void fn_store(char *at, const fn_raw<D> &raw, fn_dtype dtype) {
    *(uint4 *)at = raw.v[0];
    if (fn_raw<D>::vectors == 2 && fn_known<D>(dtype) == FN_FLOAT32)
        *(uint4 *)(at + 16) = raw.v[fn_raw<D>::vectors - 1];
}

template <fn_dtype D> FN_DEVICE void fn_widen(const fn_raw<D> &raw, float f[FN_GROUP], fn_dtype dtype) {
    const uint32_t pair[4] = {raw.v[0].x, raw.v[0].y, raw.v[0].z, raw.v[0].w};
    switch (fn_known<D>(dtype)) {
    case FN_FLOAT16:
#pragma unroll
        for (int i = 0; i < 4; i++) fn_unpack2_f16(pair[i], f + 2 * i, f + 2 * i + 1);
        return;
    case FN_BFLOAT16:
#pragma unroll
        for (int i = 0; i < 4; i++) fn_unpack2_bf16(pair[i], f + 2 * i, f + 2 * i + 1);
        return;
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: break;
    }
    const uint4 high = raw.v[fn_raw<D>::vectors - 1];
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = __uint_as_float(pair[i]);
    f[4] = __uint_as_float(high.x), f[5] = __uint_as_float(high.y);
    f[6] = __uint_as_float(high.z), f[7] = __uint_as_float(high.w);
}

template <fn_dtype D> FN_DEVICE fn_raw<D> fn_narrow(const float f[FN_GROUP], fn_dtype dtype) {
    fn_raw<D> raw;
    switch (fn_known<D>(dtype)) {
    case FN_FLOAT16:
        raw.v[0] = make_uint4(fn_pack2_f16(f[0], f[1]), fn_pack2_f16(f[2], f[3]), fn_pack2_f16(f[4], f[5]),
                              fn_pack2_f16(f[6], f[7]));
        return raw;
    case FN_BFLOAT16:
        raw.v[0] = make_uint4(fn_pack2_bf16(f[0], f[1]), fn_pack2_bf16(f[2], f[3]), fn_pack2_bf16(f[4], f[5]),
                              fn_pack2_bf16(f[6], f[7]));
        return raw;
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: break;
    }
    raw.v[0] = make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
    raw.v[fn_raw<D>::vectors - 1] =
        make_uint4(__float_as_uint(f[4]), __float_as_uint(f[5]), __float_as_uint(f[6]), __float_as_uint(f[7]));
    return raw;
}

/* 8 times 1.0 */
template <fn_dtype D> FN_DEVICE fn_raw<D> fn_ones(fn_dtype dtype) {
    const uint32_t one = fn_known<D>(dtype) == FN_FLOAT32   ? 0x3f800000u
                         : fn_known<D>(dtype) == FN_FLOAT16 ? 0x3c003c00u
                                                            : 0x3f803f80u;
    fn_raw<D> raw;
#pragma unroll
    for (int i = 0; i < fn_raw<D>::vectors; i++) raw.v[i] = make_uint4(one, one, one, one);
    return raw;
}

/* Stops the compiler from converting early what is only needed late: it would wait for the load, and hold wider registers. */
template <fn_dtype D> FN_DEVICE void fn_keep_raw(fn_raw<D> *raw) {
#pragma unroll
    for (int i = 0; i < fn_raw<D>::vectors; i++)
        asm volatile("" : "+r"(raw->v[i].x), "+r"(raw->v[i].y), "+r"(raw->v[i].z), "+r"(raw->v[i].w));
}

#endif
