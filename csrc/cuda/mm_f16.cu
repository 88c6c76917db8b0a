/* mm_f16.cu: the products of float16 operands. */
#include "mm_tensor.cuh"

const fn_mm_tensor_kernels fn_mm_f16 = FN_MM_TENSOR(FN_FLOAT16);
