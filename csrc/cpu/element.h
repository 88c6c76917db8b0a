/* element.h: one element of any dtype at any address. */
#ifndef FUSEDNORM_ELEMENT_H
#define FUSEDNORM_ELEMENT_H

#include "../dtypes.h"
#include "../numerics.h"

static inline float fn_load_element(const char *at, fn_dtype dtype) {
    uint16_t half;
    float single;
    switch (dtype) {
    case FN_FLOAT16: memcpy(&half, at, sizeof half); return fn_f16_to_f32(half);
    case FN_BFLOAT16: memcpy(&half, at, sizeof half); return fn_bf16_to_f32(half);
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: break;
    }
    memcpy(&single, at, sizeof single);
    return single;
}

static inline void fn_store_element(char *at, float value, fn_dtype dtype) {
    uint16_t half;
    switch (dtype) {
    case FN_FLOAT16:
        half = fn_f32_to_f16(value);
        memcpy(at, &half, sizeof half);
        return;
    case FN_BFLOAT16:
        half = fn_f32_to_bf16(value);
        memcpy(at, &half, sizeof half);
        return;
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: break;
    }
    memcpy(at, &value, sizeof value);
}

#endif
