/* no_cuda.c: the CUDA functions of fusednorm.h in a build without CUDA, where csrc/cuda is left out: each says so. */
#include "mm_plan.h"
#include "norm_plan.h"

#include <stdio.h>

#define REASON "this fusednorm was built without CUDA"

static fn_status absent(const char *what) {
    return fn_fail(FN_ERROR_RUNTIME, "%s: " REASON " (a CUDA toolkit must be found when it is built)", what);
}

void fn_cuda_describe(fn_cuda_info *info) {
    *info = (fn_cuda_info){.architectures = ""};
    snprintf(info->reason, sizeof info->reason, REASON);
}

fn_status fn_cuda_describe_device(int32_t device, fn_cuda_device *description) {
    (void)device;
    (void)description;
    return absent("CUDA device");
}

fn_status fn_cuda_current_device(int32_t *device) {
    (void)device;
    return absent("CUDA device");
}

fn_status fn_cuda_device_of(const void *address, int32_t *device) {
    (void)address;
    (void)device;
    return absent("CUDA memory");
}

fn_status fn_cuda_warmup(int32_t device) {
    (void)device;
    return absent("warmup");
}

fn_status fn_cuda_order_streams(int32_t device, void *earlier, void *later) {
    (void)device;
    (void)earlier;
    (void)later;
    return absent("CUDA stream");
}

fn_status fn_cuda_event_record(int32_t device, void *stream, void **event) {
    (void)device;
    (void)stream;
    *event = NULL;
    return absent("CUDA stream");
}

bool fn_cuda_event_is_done(void *event) { return event == NULL; }
void fn_cuda_event_finish(void *event) { (void)event; }

fn_status fn_cuda_force_schedule(const char *name) {
    (void)name;
    return absent("CUDA schedule");
}

fn_status fn_cuda_force_product(const char *name) {
    (void)name;
    return absent("CUDA product kernel");
}

fn_status fn_norm_run_cuda(const fn_norm_plan *plan) {
    (void)plan;
    return absent("CUDA array");
}

fn_status fn_mm_run_cuda(const fn_mm_plan *plan) {
    (void)plan;
    return absent("CUDA array");
}
