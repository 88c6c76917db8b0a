/* exhaustive_host.c: the host's half of exhaustive.cu, with numerics.h as the CPU paths compile it. */
#include "exhaustive.h"

#include "check.h"
#include "numerics.h"

uint32_t exhaustive_on_host(int function, uint32_t input) {
    switch ((exhaustive_function)function) {
    case RSQRT: return exhaustive_one_nan(function, fn_f32_bits(fn_rsqrt(fn_bits_f32(input))));
    case TO_BF16: return exhaustive_one_nan(function, fn_f32_to_bf16(fn_bits_f32(input)));
    case TO_F16: return exhaustive_one_nan(function, fn_f32_to_f16(fn_bits_f32(input)));
    case FROM_BF16: return exhaustive_one_nan(function, fn_f32_bits(fn_bf16_to_f32((uint16_t)input)));
    case FROM_F16: return exhaustive_one_nan(function, fn_f32_bits(fn_f16_to_f32((uint16_t)input)));
    case FUNCTIONS: break;
    }
    CHECK_FAIL("no function %d", function);
}

void exhaustive_sums_on_host(int function, int blocks, uint64_t *sums) {
    const uint64_t count = exhaustive_count(function);
    const uint32_t inputs = count < BLOCK_INPUTS ? (uint32_t)count : BLOCK_INPUTS;
    OPENMP(omp parallel for schedule(dynamic, 4))
    for (int block = 0; block < blocks; block++) {
        uint64_t sum = 0;
        for (uint32_t i = 0; i < inputs; i++) {
            const uint32_t input = (uint32_t)block << BLOCK_BITS | i;
            sum += exhaustive_mix(input, exhaustive_on_host(function, input));
        }
        sums[block] = sum;
    }
}
