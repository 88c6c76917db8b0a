/* mm_bf16.cu: the products of bfloat16 operands. */
#include "mm_few.cuh"
#include "mm_gate.cuh"
#include "mm_tile.cuh"

const fn_mm_tensor_kernels fn_mm_bf16 = {
    {FN_MM_TILE(FN_BFLOAT16)}, {FN_MM_GATE(FN_BFLOAT16)}, {FN_MM_FEW(FN_BFLOAT16)}};
