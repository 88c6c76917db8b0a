/* mm_hopper_bf16_sm90a.cu: the products of bfloat16 operands on compute capability 9.0. */
#include "mm_decode.cuh"
#include "mm_split.cuh"
#include "mm_wgmma.cuh"

const fn_mm_hopper_kernels fn_mm_hopper_bf16 = {
    {{FN_MM_DECODE(FN_BFLOAT16, 8, 1)},
     {FN_MM_DECODE(FN_BFLOAT16, 16, 1)},
     {FN_MM_DECODE(FN_BFLOAT16, 32, 1)},
     {FN_MM_DECODE(FN_BFLOAT16, 64, 1)},
     {FN_MM_DECODE(FN_BFLOAT16, 128, 2)}},
    {FN_MM_PREFILL(FN_BFLOAT16, fn_prefill_shape)},
    {FN_MM_PREFILL(FN_BFLOAT16, fn_parts_shape)},
    {{FN_MM_SPLIT(FN_BFLOAT16, fn_split_64x16)},
     {FN_MM_SPLIT(FN_BFLOAT16, fn_split_64x32)},
     {FN_MM_SPLIT(FN_BFLOAT16, fn_split_64x64)},
     {FN_MM_SPLIT(FN_BFLOAT16, fn_split_128x64)},
     {FN_MM_SPLIT(FN_BFLOAT16, fn_split_128x128)},
     {FN_MM_SPLIT(FN_BFLOAT16, fn_split_128x64_4)},
     {FN_MM_SPLIT(FN_BFLOAT16, fn_split_128x128_4)},
     {FN_MM_SPLIT(FN_BFLOAT16, fn_split_128x64_2)},
     {FN_MM_SPLIT(FN_BFLOAT16, fn_split_128x128_2)}},
};
