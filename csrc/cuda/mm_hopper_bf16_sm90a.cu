/* mm_hopper_bf16_sm90a.cu: the products of bfloat16 operands on compute capability 9.0. */
#include "mm_decode.cuh"
#include "mm_split.cuh"
#include "mm_wgmma.cuh"

const fn_mm_hopper_kernels fn_mm_hopper_bf16 = {
    {FN_MM_DECODE(FN_BFLOAT16)}, {FN_MM_PREFILL(FN_BFLOAT16)}, {FN_MM_SPLIT(FN_BFLOAT16)}};
