/* mm_dtype.c: which units of the device serve a product. The dtypes decide it alone, so that no bit depends on the shapes. */
#include "cuda.h"
#include "mm_fma.h"
#include "mm_hopper.h"
#include "mm_tensor.h"

/* Operands of one 16-bit dtype go through the tensor cores; all others through fp32 arithmetic, with the CPU's bits. */
fn_status fn_mm_run_cuda(const fn_mm_plan *plan) {
    if (plan->a.dtype == plan->b.dtype && plan->a.dtype != FN_FLOAT32) return fn_mm_run_tensor(plan);
    return fn_mm_run_fma(plan);
}

fn_status fn_mm_warmup(const fn_cuda_properties *device) {
    if (device->exactly_90) FN_TRY(fn_mm_hopper_warmup());
    FN_TRY(fn_mm_tensor_warmup());
    return fn_mm_fma_warmup(device);
}
