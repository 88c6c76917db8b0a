/* mm_hopper_f16_sm90a.cu: the products of float16 operands on compute capability 9.0. */
#include "mm_decode.cuh"
#include "mm_split.cuh"
#include "mm_wgmma.cuh"

const fn_mm_hopper_kernels fn_mm_hopper_f16 = {
    {FN_MM_DECODE(FN_FLOAT16)}, {FN_MM_PREFILL(FN_FLOAT16)}, {FN_MM_SPLIT(FN_FLOAT16)}};
