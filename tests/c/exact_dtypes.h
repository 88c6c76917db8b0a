/* exact_dtypes.h: what the three element types mean, stated without csrc/numerics.h and without any rounding.
 *
 * A 16-bit encoding is built into its number by ldexp, which is exact. Rounding to nearest even is stated as intervals:
 * `lowest[h]` is the smallest non-negative fp32 encoding that rounds to the 16-bit encoding h. It is the midpoint of the
 * numbers h - 1 and h where h is even, since a tie goes to the even one, and the encoding after the midpoint where h is
 * odd. Every midpoint is an fp32 number; infinity stands at 2^(largest exponent + 1) when the midpoint before it is taken.
 */
#ifndef EXACT_DTYPES_H
#define EXACT_DTYPES_H

#include <math.h>

#include "check.h"
#include "dtypes.h"

#define FP32_INFINITY UINT32_C(0x7f800000)
#define FP32_MAGNITUDE UINT32_C(0x7fffffff)

typedef struct {
    fn_dtype dtype;
    int fraction_bits;
    int bias;
    uint32_t infinity; /* its encoding; also the number of finite non-negative encodings */
    uint32_t lowest[0x8000];
    float number[0x10000]; /* of every encoding; NaN for every NaN */
} exact_format;

static exact_format exact_fp16 = {.dtype = FN_FLOAT16, .fraction_bits = 10, .bias = 15, .infinity = 0x7c00};
static exact_format exact_bf16 = {.dtype = FN_BFLOAT16, .fraction_bits = 7, .bias = 127, .infinity = 0x7f80};

/* The number of a non-negative encoding up to infinity's, which is read as the power of two that would come next. */
static double exact_value(const exact_format *format, uint32_t encoding) {
    const int exponent = (int)(encoding >> format->fraction_bits);
    const uint32_t one = UINT32_C(1) << format->fraction_bits;
    const uint32_t fraction = encoding & (one - 1);
    return exponent == 0 ? ldexp((double)fraction, 1 - format->bias - format->fraction_bits)
                         : ldexp((double)(one + fraction), exponent - format->bias - format->fraction_bits);
}

static void exact_prepare_format(exact_format *format) {
    format->lowest[0] = 0;
    for (uint32_t h = 1; h <= format->infinity; h++) {
        const double midpoint = 0.5 * (exact_value(format, h - 1) + exact_value(format, h));
        const float as_float = (float)midpoint;
        if ((double)as_float != midpoint) CHECK_FAIL("the test is wrong: the midpoint below %#x is no fp32 number", h);
        format->lowest[h] = bits_of(as_float) + (h % 2);
    }
    for (uint32_t h = 0; h < 0x8000; h++) {
        const float number = h > format->infinity    ? (float)NAN
                             : h == format->infinity ? (float)INFINITY
                                                     : (float)exact_value(format, h);
        format->number[h] = number;
        format->number[h | 0x8000] = -number;
    }
}

/* Must be called once before everything else in this header. */
static inline void exact_prepare(void) {
    exact_prepare_format(&exact_fp16);
    exact_prepare_format(&exact_bf16);
}

static inline bool exact_is_nan16(const exact_format *format, uint32_t encoding) {
    return (encoding & 0x7fff) > format->infinity;
}

/* The 16-bit encoding whose interval holds the fp32 encoding; NaNs become one NaN of the format. */
static inline uint16_t exact_narrow(const exact_format *format, uint32_t bits) {
    const uint32_t magnitude = bits & FP32_MAGNITUDE;
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude > FP32_INFINITY) return 0x7fff;
    uint32_t low = 0, high = format->infinity;
    while (low < high) {
        const uint32_t middle = (low + high + 1) / 2;
        if (format->lowest[middle] <= magnitude) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return (uint16_t)(sign | low);
}

#endif
