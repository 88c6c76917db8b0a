/* rms_norm_any.cu: the kernels of rms_norm.cuh for operands of several dtypes, known when they are called. */
#include "kernels.h"
#include "rms_norm.cuh"

static const fn_norm_kernel kernels[] = {FN_FOR_EACH_ANY_KERNEL(FN_KERNEL, FN_ANY, FN_ANY)};
extern const fn_norm_kernels fn_norm_kernels_any = {kernels, sizeof kernels / sizeof kernels[0]};
