/* fake_cuda.c: the CUDA functions of fusednorm.h without a GPU, in the place of csrc/no_cuda.c or csrc/cuda: "device"
 * memory is the host's, norms and products run at once on the CPU, and everything that was asked for is written into a
 * log. Events are done unless fake_set("busy", 1), and NULL while fake_set("capturing", 1). For tests/fake_cuda.py. */
#include "mm_plan.h"
#include "norm_plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT const char *fake_log(void);
EXPORT void fake_set(const char *name, int value);

static char text[1 << 16];
static size_t used;
static int devices = 2, current_device, busy, capturing, fails, reason, outstanding;

#define LOG(...)                                                                                                       \
    do {                                                                                                               \
        if (used < sizeof text - 256) used += (size_t)snprintf(text + used, 256, __VA_ARGS__);                         \
    } while (0)

/* What was logged since the last time. */
const char *fake_log(void) {
    static char copy[sizeof text];
    memcpy(copy, text, used);
    copy[used] = 0;
    used = 0;
    return copy;
}

void fake_set(const char *name, int value) {
    const struct {
        const char *name;
        int *target;
    } settings[] = {{"devices", &devices}, {"current_device", &current_device},
                    {"busy", &busy},       {"capturing", &capturing},
                    {"fails", &fails},     {"reason", &reason}};
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
        if (strcmp(settings[i].name, name) == 0) *settings[i].target = value;
}

void fn_cuda_describe(fn_cuda_info *info) {
    *info = (fn_cuda_info){.built = true,
                           .devices = reason ? 0 : devices,
                           .runtime_version = 13000,
                           .driver_version = reason ? 0 : 12080,
                           .architectures = "90 90-ptx"};
    if (reason) snprintf(info->reason, sizeof info->reason, "the fake has no driver");
    LOG("describe\n");
}

fn_status fn_cuda_describe_device(int32_t device, fn_cuda_device *description) {
    *description = (fn_cuda_device){.major = 9, .minor = 0, .multiprocessors = 132};
    snprintf(description->name, sizeof description->name, "Fake %d", (int)device);
    return FN_OK;
}

fn_status fn_cuda_current_device(int32_t *device) {
    *device = current_device;
    return FN_OK;
}

fn_status fn_cuda_device_of(const void *address, int32_t *device) {
    LOG("device_of\n");
    FN_REQUIRE((uintptr_t)address != 8, FN_ERROR_VALUE, "no device can reach address 8");
    *device = current_device;
    return FN_OK;
}

fn_status fn_cuda_warmup(int32_t device) {
    FN_REQUIRE(device < devices, FN_ERROR_VALUE, "warmup: no device %d", (int)device);
    LOG("warmup %d\n", (int)device);
    return FN_OK;
}

fn_status fn_cuda_order_streams(int32_t device, void *earlier, void *later) {
    LOG("order %d: %llu before %llu\n", (int)device, (unsigned long long)(uintptr_t)earlier,
        (unsigned long long)(uintptr_t)later);
    return FN_OK;
}

fn_status fn_cuda_event_record(int32_t device, void *stream, void **event) {
    LOG("event %d: %llu\n", (int)device, (unsigned long long)(uintptr_t)stream);
    *event = capturing ? NULL : malloc(1);
    outstanding += *event != NULL;
    return FN_OK;
}

bool fn_cuda_event_is_done(void *event) { return event == NULL || !busy; }

void fn_cuda_event_finish(void *event) {
    if (event == NULL) return;
    free(event);
    LOG("finish, %d left\n", --outstanding);
}

fn_status fn_cuda_force_schedule(const char *name) {
    FN_REQUIRE(name == NULL || strcmp(name, "packed") == 0, FN_ERROR_RUNTIME, "no schedule \"%s\": there is packed",
               name);
    return FN_OK;
}

fn_status fn_cuda_force_product(const char *name) {
    FN_REQUIRE(name == NULL || strcmp(name, "64x16_by8") == 0, FN_ERROR_RUNTIME, "no kernel \"%s\": there is 64x16_by8",
               name);
    return FN_OK;
}

fn_status fn_norm_run_cuda(const fn_norm_plan *plan) {
    FN_REQUIRE(!fails, FN_ERROR_RUNTIME, "norm: the fake fails: cudaErrorFake");
    LOG("norm %d: %llu%s\n", (int)plan->device_id, (unsigned long long)(uintptr_t)plan->stream,
        plan->weights_are_constant ? ", constant" : "");
    return fn_norm_run_cpu(plan);
}

fn_status fn_mm_run_cuda(const fn_mm_plan *plan) {
    FN_REQUIRE(!fails, FN_ERROR_RUNTIME, "mm: the fake fails: cudaErrorFake");
    LOG("mm %d: %llu%s\n", (int)plan->device_id, (unsigned long long)(uintptr_t)plan->stream,
        plan->weights_are_constant ? ", constant" : "");
    return fn_mm_run_cpu(plan);
}
