/* rms_norm_f32.cu: the kernels of rms_norm.cuh for float32 operands and weight. */
#include "kernels.h"
#include "rms_norm.cuh"

static const fn_norm_kernel kernels[] = {FN_FOR_EACH_KERNEL(FN_KERNEL, FN_FLOAT32, FN_FLOAT32)};
extern const fn_norm_kernels fn_norm_kernels_f32 = {kernels, sizeof kernels / sizeof kernels[0]};
