/* mm_bf16.cu: the products of bfloat16 operands. */
#include "mm_tensor.cuh"

const fn_mm_tensor_kernels fn_mm_bf16 = FN_MM_TENSOR(FN_BFLOAT16);
