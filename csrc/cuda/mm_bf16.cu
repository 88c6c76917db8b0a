/* mm_bf16.cu: the products of bfloat16 operands. */
#include "mm_gate.cuh"
#include "mm_one.cuh"
#include "mm_tile.cuh"

/* By the tile's tokens, ascending, for each of (chunked, whole). */
const fn_mm_tensor_kernels fn_mm_bf16 = {
    {{FN_MM_TILE(FN_BFLOAT16, 32, 8, 2, 1, 8, false, true)},
     {FN_MM_TILE(FN_BFLOAT16, 32, 16, 2, 1, 8, false, true)},
     {FN_MM_TILE(FN_BFLOAT16, 32, 32, 2, 1, 8, false, true)},
     {FN_MM_TILE(FN_BFLOAT16, 64, 64, 2, 2, 6, false, true)},
     {FN_MM_TILE(FN_BFLOAT16, 128, 128, 4, 2, 3, false, true)},
     {FN_MM_TILE(FN_BFLOAT16, 16, 8, 1, 1, 8, true, true)},
     {FN_MM_TILE(FN_BFLOAT16, 16, 32, 1, 1, 6, true, true)},
     {FN_MM_TILE(FN_BFLOAT16, 64, 64, 2, 2, 4, true, true)},
     {FN_MM_TILE(FN_BFLOAT16, 64, 128, 2, 4, 4, true, true)},
     {FN_MM_TILE(FN_BFLOAT16, 32, 8, 2, 1, 4, false, false)},
     {FN_MM_TILE(FN_BFLOAT16, 64, 64, 2, 2, 3, false, false)},
     {FN_MM_TILE(FN_BFLOAT16, 16, 8, 1, 1, 4, true, false)},
     {FN_MM_TILE(FN_BFLOAT16, 64, 64, 2, 2, 3, true, false)}},
    {{FN_MM_GATE(FN_BFLOAT16, 16, 8)},
     {FN_MM_GATE(FN_BFLOAT16, 16, 16)},
     {FN_MM_GATE(FN_BFLOAT16, 16, 32)},
     {FN_MM_GATE(FN_BFLOAT16, 32, 32)}},
    {FN_MM_ONE(FN_BFLOAT16)},
};
