/* tensor_check.h: what the argument checks of all operations share. */
#ifndef FUSEDNORM_TENSOR_CHECK_H
#define FUSEDNORM_TENSOR_CHECK_H

#include "fusednorm.h"

#include <stdio.h>

typedef struct {
    char text[160];
} fn_shape_text;

/* As Python writes it: "(2, 4)", "(5,)". */
static inline fn_shape_text fn_shape_of(const fn_tensor *a) {
    fn_shape_text s;
    size_t used = 0;
    s.text[used++] = '(';
    for (int32_t i = 0; i < a->ndim && used < sizeof s.text - 32; i++)
        used += (size_t)snprintf(s.text + used, sizeof s.text - used, "%s%lld", i ? ", " : "", (long long)a->shape[i]);
    snprintf(s.text + used, sizeof s.text - used, a->ndim == 1 ? ",)" : ")");
    return s;
}

/* Both, if a is given, are on one device. */
static inline fn_status fn_check_device(const char *function, const fn_tensor *a, const fn_tensor *first) {
    static const char *const names[] = {[FN_CPU] = "cpu", [FN_CUDA] = "cuda"};
    if (!a) return FN_OK;
    FN_REQUIRE(a->device_type == FN_CPU || a->device_type == FN_CUDA, FN_ERROR_VALUE,
               "%s: %s has device type number %d: it must be one of fn_device_type", function, a->name,
               (int)a->device_type);
    if (a->device_type == first->device_type && a->device_id == first->device_id) return FN_OK;
    return fn_fail(FN_ERROR_VALUE, "%s: %s is on %s:%d, but %s is on %s:%d: they must be on one device", function,
                   a->name, names[a->device_type], a->device_id, first->name, names[first->device_type],
                   first->device_id);
}

static inline fn_status fn_check_writable(const char *function, const fn_tensor *a) {
    FN_REQUIRE(!a || !a->readonly, FN_ERROR_BUFFER, "%s: %s is read-only: an output must be writable", function,
               a->name);
    return FN_OK;
}

#endif
