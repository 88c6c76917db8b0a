/* tensor_core.c: products as a Hopper tensor core adds them, in integers.
 *
 * One step is what mma.sync.m16n8k16, or one k step of wgmma, makes of 16 products and an fp32 accumulator. This is no
 * program: tests/test_tensor_core.py loads it and compares it with recorded outputs. They show, for fp16 and bf16:
 *   1. Products are exact. A product's exponent is the sum of its operands' exponents, whether its significand lies in
 *      [1, 2) or in [2, 4). An fp16 subnormal counts with its value.
 *   2. The 17 terms, the accumulator among them, are aligned to the largest exponent. Each keeps 23 + EXTRA_BITS bits
 *      behind the point; what lies below is cut off, towards zero.
 *   3. The sum of what is kept is exact, so the order of the terms is free.
 *   4. The sum is cut off to fp32's 24 bits, towards zero.
 *   5. A term that is zero has no say in the exponent; an exact zero is +0, whatever the signs of its terms. A subnormal
 *      operand has the exponent of the smallest normal number; a subnormal accumulator counts with its value, a subnormal
 *      result is cut off to 2^-149. No step aligns to an exponent below -133 (any limit from there to -160 has the same bits).
 *   6. A result too large for fp32 is infinite, where rounding towards zero in IEEE 754 would give the largest number;
 *      products of bf16 beyond fp32's range cancel exactly if the sum fits.
 *   7. 0 * infinity, infinities of both signs and NaNs make the NaN 0x7fffffff.
 */
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* A test builds the file with other values, to see that the recorded outputs tell them apart. */
#ifndef EXTRA_BITS
#define EXTRA_BITS 2
#endif
#ifndef STEP
#define STEP 16
#endif

#define FRACTION_BITS (23 + EXTRA_BITS)
#ifndef LOWEST_EXPONENT
#define LOWEST_EXPONENT (-133)
#endif
#define FP32_INFINITY UINT32_C(0x7f800000)
#define FP32_NAN UINT32_C(0x7fffffff)

typedef struct {
    int exponent_bits, fraction_bits;
} format;

/* The order of the numbers is that of FORMATS in tests/test_tensor_core.py. */
static const format formats[] = {{8, 7}, {5, 10}};
static const format fp32 = {8, 23};

typedef struct {
    bool negative, infinite, nan;
    int exponent;
    int64_t significand; /* the value is significand * 2^(exponent - fraction_bits of its format) */
} number;

static number decode(format type, uint32_t bits) {
    const int bias = (1 << (type.exponent_bits - 1)) - 1, special = (1 << type.exponent_bits) - 1;
    const int field = (int)(bits >> type.fraction_bits) & special;
    const uint32_t fraction = bits & ((UINT32_C(1) << type.fraction_bits) - 1);
    return (number){
        .negative = bits >> (type.exponent_bits + type.fraction_bits) & 1,
        .infinite = field == special && fraction == 0,
        .nan = field == special && fraction != 0,
        .exponent = (field > 0 ? field : 1) - bias,
        .significand = (int64_t)fraction | (int64_t)(field > 0) << type.fraction_bits,
    };
}

static number multiply(number a, number b) {
    const bool infinite = a.infinite || b.infinite;
    const bool zero = a.significand == 0 || b.significand == 0;
    return (number){
        .negative = a.negative != b.negative,
        .infinite = infinite && !zero,
        .nan = a.nan || b.nan || (infinite && zero),
        .exponent = a.exponent + b.exponent,
        .significand = a.significand * b.significand,
    };
}

/* The term in units of 2^(exponent - FRACTION_BITS), towards zero. */
static int64_t align(number term, int fraction_bits, int exponent) {
    const int left = FRACTION_BITS - fraction_bits + term.exponent - exponent;
    if (left < -62) return 0;
    const int64_t kept = left < 0 ? term.significand >> -left : term.significand << left;
    return term.negative ? -kept : kept;
}

/* The fp32 encoding of sum * 2^unit, towards zero. */
static uint32_t encode(int64_t sum, int unit) {
    uint64_t kept = (uint64_t)(sum < 0 ? -sum : sum);
    const uint32_t sign = (uint32_t)(sum < 0) << 31;
    if (kept == 0) return 0;
    for (; kept >> 24 != 0 || unit < -149; unit++) kept >>= 1;
    for (; kept >> 23 == 0 && unit > -149; unit--) kept <<= 1;
    /* The leading 1 of a normal number adds 1 to the exponent field; a subnormal number has neither. */
    const uint64_t magnitude = ((uint64_t)(unit + 149) << 23) + kept;
    return sign | (magnitude < FP32_INFINITY ? (uint32_t)magnitude : FP32_INFINITY);
}

static uint32_t step(format type, const uint16_t *a, const uint16_t *b, int64_t count, uint32_t accumulator) {
    number products[STEP];
    const number c = decode(fp32, accumulator);
    bool nan = c.nan, plus_infinity = c.infinite && !c.negative, minus_infinity = c.infinite && c.negative;
    int exponent = c.significand != 0 ? c.exponent : LOWEST_EXPONENT;
    for (int64_t k = 0; k < count; k++) {
        const number p = products[k] = multiply(decode(type, a[k]), decode(type, b[k]));
        nan |= p.nan;
        plus_infinity |= p.infinite && !p.negative;
        minus_infinity |= p.infinite && p.negative;
        if (p.significand != 0 && p.exponent > exponent) exponent = p.exponent;
    }
    if (nan || (plus_infinity && minus_infinity)) return FP32_NAN;
    if (plus_infinity || minus_infinity) return FP32_INFINITY | (uint32_t)minus_infinity << 31;

    int64_t sum = align(c, fp32.fraction_bits, exponent);
    for (int64_t k = 0; k < count; k++) sum += align(products[k], 2 * type.fraction_bits, exponent);
    return encode(sum, exponent - FRACTION_BITS);
}

static uint32_t chain(format type, const uint16_t *a, const uint16_t *b, int64_t k) {
    uint32_t accumulator = 0;
    for (int64_t at = 0; at < k; at += STEP) {
        accumulator = step(type, a + at, b + at, k - at < STEP ? k - at : STEP, accumulator);
    }
    return accumulator;
}

static uint32_t add(uint32_t total, uint32_t addend) {
    float t, v;
    memcpy(&t, &total, sizeof t);
    memcpy(&v, &addend, sizeof v);
    t += v;
    memcpy(&total, &t, sizeof total);
    return total;
}

static uint32_t part_sum(format type, const uint16_t *a, const uint16_t *b, int64_t begin, int64_t end, int64_t chunk) {
    uint32_t total = 0;
    for (int64_t at = begin; at < end; at += chunk) {
        const uint32_t sum = chain(type, a + at, b + at, end - at < chunk ? end - at : chunk);
        total = at == begin ? sum : add(total, sum);
    }
    return total;
}

static uint32_t half_sum(format type, const uint16_t *a, const uint16_t *b, int64_t begin, int64_t end, int64_t part,
                         int64_t chunk) {
    uint32_t total = 0;
    for (int64_t at = begin; at < end; at += part) {
        const uint32_t sum = part_sum(type, a, b, at, end - at < part ? end : at + part, chunk);
        total = at == begin ? sum : add(total, sum);
    }
    return total;
}

/* out[m][n] = a[m][k] times the transpose of b[n][k], all contiguous. K is cut into parts, and these into chunks, each a chain of
 * steps from +0. Sums are added in fp32: a part's chunks, the first 4 parts, the others, and these two. chunk >= k: one chain. */
void tensor_core_products(int dtype, int64_t m, int64_t n, int64_t k, int64_t part, int64_t chunk, const uint16_t *a,
                          const uint16_t *b, uint32_t *out) {
    const format type = formats[dtype];
    const int64_t middle = k / 4 < part ? k : 4 * part;
    for (int64_t i = 0; i < m * n; i++) {
        const uint16_t *const row = a + i / n * k, *const column = b + i % n * k;
        out[i] = half_sum(type, row, column, 0, middle, part, chunk);
        if (middle < k) out[i] = add(out[i], half_sum(type, row, column, middle, k, part, chunk));
    }
}
