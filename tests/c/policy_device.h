/* policy_device.h: a stand-in for csrc/cuda/runtime.c, that knows what fits on an H200 (or less), for programs that ask which kernel
 * a product takes. They have fn_cuda_run and the tensor maps themselves.
 */
#ifndef FUSEDNORM_TESTS_POLICY_DEVICE_H
#define FUSEDNORM_TESTS_POLICY_DEVICE_H

#include "check.h"
#include "cuda/cuda.h"

#include <stdarg.h>

static fn_cuda_properties device;
static int largest_cluster;
static const fn_cuda_properties h200 = {132, true, true, 232448};

#define DTYPE_ROW(symbol, name, bytes, letter, epsilon) [symbol] = {name, bytes, letter, epsilon},
const fn_dtype_info fn_dtypes[FN_DTYPE_COUNT] = {FN_FOR_EACH_DTYPE(DTYPE_ROW)};

fn_status fn_fail(fn_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    return status;
}

fn_status fn_cuda_properties_of(int32_t number, fn_cuda_properties *properties) {
    (void)number;
    *properties = device;
    return FN_OK;
}

fn_status fn_cuda_allow_shared(fn_cuda_devices *done, int32_t number, const void *kernel, int bytes) {
    (void)done, (void)number, (void)kernel, (void)bytes;
    return FN_OK;
}

/* As cudaOccupancyMaxActiveClusters says of an H200. */
fn_status fn_cuda_clusters_at_once(fn_cuda_counts *asked, const fn_cuda_launch *launch, int *clusters) {
    static const int alone[] = {0, 132, 66, 39, 30, 22, 17, 15, 15}, in_pairs[] = {0, 264, 132, 79, 62, 47, 39, 32, 30};
    (void)asked;
    *clusters = (launch->shared_bytes < 113 << 10 ? in_pairs : alone)[launch->cluster];
    if (launch->cluster > largest_cluster) *clusters = 0;
    return FN_OK;
}

fn_status fn_cuda_enter(int32_t number, int *previous) {
    *previous = number;
    return FN_OK;
}

void fn_cuda_leave(int32_t number, int previous) { (void)number, (void)previous; }

fn_status fn_cuda_load(const void *kernel) {
    (void)kernel;
    return FN_OK;
}

#endif
