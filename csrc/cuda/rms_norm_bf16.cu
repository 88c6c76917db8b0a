/* rms_norm_bf16.cu: the kernels of rms_norm.cuh for bfloat16 operands and weight. */
#include "kernels.h"
#include "rms_norm.cuh"

static const fn_norm_kernel kernels[] = {FN_FOR_EACH_KERNEL(FN_KERNEL, FN_BFLOAT16, FN_BFLOAT16)
                                             FN_FOR_EACH_FURTHER_KERNEL(FN_KERNEL, FN_BFLOAT16, FN_BFLOAT16)
                                                 FN_FOR_EACH_EARLY_KERNEL(FN_KERNEL, FN_BFLOAT16, FN_BFLOAT16)};
extern const fn_norm_kernels fn_norm_kernels_bf16 = {kernels, sizeof kernels / sizeof kernels[0]};
