/* exhaustive.h: what exhaustive.cu computes on the device and exhaustive_host.c on the host: functions of one float, over
 * all encodings, in blocks. A block's sum changes, but for one chance in 2^64, when any of its results does. */
#ifndef EXHAUSTIVE_H
#define EXHAUSTIVE_H

#include <stdint.h>

typedef enum { RSQRT, TO_BF16, TO_F16, FROM_BF16, FROM_F16, FUNCTIONS } exhaustive_function;

#define BLOCK_BITS 20
#define BLOCK_INPUTS (1u << BLOCK_BITS)
#define MOST_BLOCKS 4096

#ifdef __CUDACC__
#define EITHER static __host__ __device__ __forceinline__
#else
#define EITHER static inline
#endif

/* Inputs are 0 .. count - 1: fp32 encodings, all or those without a sign, or 16-bit ones. */
EITHER uint64_t exhaustive_count(int function) {
    return function == RSQRT ? UINT64_C(1) << 31 : function <= TO_F16 ? UINT64_C(1) << 32 : UINT64_C(1) << 16;
}

/* Every NaN counts as one: the contract says that a NaN stays a NaN, not which. */
EITHER uint32_t exhaustive_one_nan(int function, uint32_t result) {
    const uint32_t infinity = function == TO_BF16 ? 0x7f80 : function == TO_F16 ? 0x7c00 : 0x7f800000;
    const uint32_t magnitude = function == TO_BF16 || function == TO_F16 ? 0x7fff : 0x7fffffff;
    return (result & magnitude) > infinity ? magnitude : result;
}

/* The finaliser of splitmix64 over the input and its result. */
EITHER uint64_t exhaustive_mix(uint32_t input, uint32_t result) {
    uint64_t x = ((uint64_t)input << 32 | result) + UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

#ifdef __cplusplus
extern "C" {
#endif
uint32_t exhaustive_on_host(int function, uint32_t input); /* the encoding of the result */
void exhaustive_sums_on_host(int function, int blocks, uint64_t *sums);
#ifdef __cplusplus
}
#endif

#endif
