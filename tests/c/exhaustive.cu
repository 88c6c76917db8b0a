/* exhaustive.cu: 1/sqrt and the conversions of the CUDA kernels give the CPU's results for every encoding.
 *
 * Each function is the one that the kernels call. A conversion of two neighbours is run with the input on either side, and
 * the one-element conversions of numerics.h, compiled for the device, are compared with it. Sums of blocks of results
 * are compared with the host's; in a block that differs, the first such input is searched for and printed.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cuda/vector.cuh"
#include "exhaustive.h"

#define THREADS 256

#define CUDA(call)                                                                                                     \
    do {                                                                                                               \
        const cudaError_t error = (call);                                                                              \
        if (error != cudaSuccess) {                                                                                    \
            fprintf(stderr, "FAILED: %s: %s\n", #call, cudaGetErrorName(error));                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static const char *const names[FUNCTIONS] = {"1/sqrt", "fp32 to bf16", "fp32 to fp16", "bf16 to fp32", "fp16 to fp32"};

/* The results of one input in all ways there are; 0xdeadbeef where two of them differ. */
static __device__ uint32_t on_device(int function, uint32_t input) {
    const float f = fn_bits_f32(input), other = fn_bits_f32(input * 2654435761u + 12345u);
    uint32_t first, second, third;
    if (function == RSQRT) return exhaustive_one_nan(function, fn_f32_bits(fn_rsqrt(f)));
    if (function == TO_BF16) {
        first = fn_pack2_bf16(f, other) & 0xffffu, second = fn_pack2_bf16(other, f) >> 16, third = fn_f32_to_bf16(f);
    } else if (function == TO_F16) {
        first = fn_pack2_f16(f, other) & 0xffffu, second = fn_pack2_f16(other, f) >> 16, third = fn_f32_to_f16(f);
    } else {
        const uint32_t neighbour = input * 40503u & 0xffffu;
        float low, high, unused;
        if (function == FROM_BF16) {
            fn_unpack2_bf16(input | neighbour << 16, &low, &unused);
            fn_unpack2_bf16(neighbour | input << 16, &unused, &high);
            third = fn_f32_bits(fn_bf16_to_f32((uint16_t)input));
        } else {
            fn_unpack2_f16(input | neighbour << 16, &low, &unused);
            fn_unpack2_f16(neighbour | input << 16, &unused, &high);
            third = fn_f32_bits(fn_f16_to_f32((uint16_t)input));
        }
        first = fn_f32_bits(low), second = fn_f32_bits(high);
    }
    first = exhaustive_one_nan(function, first), second = exhaustive_one_nan(function, second);
    third = exhaustive_one_nan(function, third);
    return first == second && first == third ? first : 0xdeadbeefu;
}

/* sums[block] += all inputs of the block blockIdx.x. */
static __global__ void sum_block(int function, uint32_t inputs, unsigned long long *sums) {
    unsigned long long sum = 0;
    for (uint32_t i = threadIdx.x; i < inputs; i += THREADS) {
        const uint32_t input = blockIdx.x << BLOCK_BITS | i;
        sum += exhaustive_mix(input, on_device(function, input));
    }
    atomicAdd(sums + blockIdx.x, sum);
}

static __global__ void list_block(int function, uint32_t block, uint32_t inputs, uint32_t *results) {
    const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
    if (i < inputs) results[i] = on_device(function, block << BLOCK_BITS | i);
}

static void show_first_difference(int function, uint32_t block, uint32_t inputs) {
    uint32_t *results, *const copy = (uint32_t *)malloc(inputs * sizeof *results);
    CUDA(cudaMalloc(&results, inputs * sizeof *results));
    list_block<<<(inputs + THREADS - 1) / THREADS, THREADS>>>(function, block, inputs, results);
    CUDA(cudaMemcpy(copy, results, inputs * sizeof *results, cudaMemcpyDeviceToHost));
    for (uint32_t i = 0; i < inputs; i++) {
        const uint32_t input = block << BLOCK_BITS | i, expected = exhaustive_on_host(function, input);
        if (copy[i] == expected) continue;
        fprintf(stderr, "FAILED: %s of 0x%08x gave 0x%08x on the device, not 0x%08x%s\n", names[function], input,
                copy[i], expected, copy[i] == 0xdeadbeefu ? " (its ways of computing it differ)" : "");
        exit(1);
    }
    fprintf(stderr, "FAILED: %s: the sums of block %u differ, but no result does\n", names[function], block);
    exit(1);
}

int main(void) {
    static uint64_t expected[MOST_BLOCKS], actual[MOST_BLOCKS];
    unsigned long long *sums;
    CUDA(cudaMalloc(&sums, sizeof actual));
    for (int function = 0; function < FUNCTIONS; function++) {
        const uint64_t count = exhaustive_count(function);
        const uint32_t inputs = count < BLOCK_INPUTS ? (uint32_t)count : BLOCK_INPUTS;
        const int blocks = (int)(count / inputs);
        const time_t start = time(NULL);
        CUDA(cudaMemset(sums, 0, sizeof actual));
        sum_block<<<blocks, THREADS>>>(function, inputs, sums); /* while the host does its own */
        CUDA(cudaGetLastError());
        exhaustive_sums_on_host(function, blocks, expected);
        CUDA(cudaMemcpy(actual, sums, sizeof actual, cudaMemcpyDeviceToHost));
        for (int block = 0; block < blocks; block++)
            if (actual[block] != expected[block]) show_first_difference(function, (uint32_t)block, inputs);
        printf("exhaustive: %s: %llu encodings, all as on the CPU, %.0f s\n", names[function],
               (unsigned long long)count, difftime(time(NULL), start));
        fflush(stdout);
    }
    return 0;
}
