/* element.cuh: one element, of any dtype, at any address. */
#ifndef FUSEDNORM_ELEMENT_CUH
#define FUSEDNORM_ELEMENT_CUH

#include "vector.cuh"

/* A device refuses a number that does not lie at a multiple of its size. */
FN_DEVICE uint32_t load_bits(const char *at, int bytes) {
    if ((uintptr_t)at % bytes == 0) return bytes == 4 ? *(const uint32_t *)at : *(const uint16_t *)at;
    uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < bytes; i++) bits |= (uint32_t)(unsigned char)at[i] << 8 * i;
    return bits;
}

FN_DEVICE void store_bits(char *at, uint32_t bits, int bytes) {
    if ((uintptr_t)at % bytes == 0) {
        if (bytes == 4) *(uint32_t *)at = bits;
        else *(uint16_t *)at = (uint16_t)bits;
        return;
    }
#pragma unroll 1
    for (int i = 0; i < bytes; i++) at[i] = (char)(bits >> 8 * i);
}

FN_DEVICE int bytes_of(fn_dtype dtype) { return dtype == FN_FLOAT32 ? 4 : 2; }

FN_DEVICE float load_element(const char *at, fn_dtype dtype) {
    const uint32_t bits = load_bits(at, bytes_of(dtype));
    float low, high;
    switch (dtype) {
    case FN_FLOAT16: fn_unpack2_f16(bits, &low, &high); return low;
    case FN_BFLOAT16: fn_unpack2_bf16(bits, &low, &high); return low;
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: break;
    }
    return __uint_as_float(bits);
}

FN_DEVICE void store_element(char *at, float value, fn_dtype dtype) {
    uint32_t bits = __float_as_uint(value);
    switch (dtype) {
    case FN_FLOAT16: bits = fn_pack2_f16(value, 0); break;
    case FN_BFLOAT16: bits = fn_pack2_bf16(value, 0); break;
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: break;
    }
    store_bits(at, bits, bytes_of(dtype));
}

/* A tensor core's sum that vanished below the least number may be -0, and a further step of zeros makes it +0. So that the number
 * of such steps, which kernels are free in, decides no bit, a total of 0 is +0. */
FN_DEVICE float without_minus_zero(float sum) { return fn_add(sum, 0.0f); }

#endif
