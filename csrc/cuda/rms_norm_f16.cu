/* rms_norm_f16.cu: the kernels of rms_norm.cuh for float16 operands and weight. */
#include "kernels.h"
#include "rms_norm.cuh"

static const fn_norm_kernel kernels[] = {FN_FOR_EACH_KERNEL(FN_KERNEL, FN_FLOAT16, FN_FLOAT16)};
extern const fn_norm_kernels fn_norm_kernels_f16 = {kernels, sizeof kernels / sizeof kernels[0]};
