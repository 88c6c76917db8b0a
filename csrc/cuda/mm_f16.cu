/* mm_f16.cu: the products of float16 operands. */
#include "mm_few.cuh"
#include "mm_gate.cuh"
#include "mm_tile.cuh"

const fn_mm_tensor_kernels fn_mm_f16 = {{FN_MM_TILE(FN_FLOAT16)}, {FN_MM_GATE(FN_FLOAT16)}, {FN_MM_FEW(FN_FLOAT16)}};
