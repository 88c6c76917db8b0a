/* mm_case.h: a random product, in memory whose every byte is known, and what the contract makes of it. */
#ifndef MM_CASE_H
#define MM_CASE_H

#if !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* mmap's MAP_ANONYMOUS */
#endif
#include "check.h"
#include "exact_dtypes.h"
#include "fusednorm.h"

#include <sys/mman.h>
#include <unistd.h>

enum { A, B, BIAS, OUT, ROLES };
static const char *const role_names[ROLES] = {"a", "b", "bias", "out"};
#define GUARD 64
#define PICK(list, random) (list)[random_below(random, (int64_t)(sizeof(list) / sizeof *(list)))]

typedef struct {
    unsigned char *memory, *expected; /* expected: of out */
    int64_t bytes, shape[2], stride[2];
    unsigned char *pages; /* or NULL: memory is malloc's */
    int64_t page_bytes;
    fn_tensor tensor;
} matrix;

enum layouts { ROWS, COLUMNS, GAPS, REVERSED, REPEATED, LAYOUTS };
enum values { ORDINARY, TINY, ANY_ENCODING, MINUS_ZEROS, NEAR_SUBNORMAL, VALUES };

typedef struct {
    int64_t m, n, k;
    bool has_bias;
    int layout[ROLES]; /* enum layouts */
    int values;        /* enum values */
    matrix arrays[ROLES];
    fn_mm_args args;
} product_case;

static float load_number(const matrix *x, int64_t i, int64_t j) {
    const unsigned char *at = (const unsigned char *)x->tensor.data + i * x->stride[0] + j * x->stride[1];
    uint16_t half;
    float single;
    if (x->tensor.dtype == FN_FLOAT32) {
        memcpy(&single, at, 4);
        return single;
    }
    memcpy(&half, at, 2);
    return (x->tensor.dtype == FN_FLOAT16 ? &exact_fp16 : &exact_bf16)->number[half];
}

/* a * b + c, rounded once: the product is exact in double, and the sum is rounded to odd, so that rounding it once more to
 * float sees on which side of a midpoint it lies. */
static float exact_fma(float a, float b, float c) {
    const double product = (double)a * (double)b, sum = product + (double)c, part = sum - product;
    const double error = (product - (sum - part)) + ((double)c - part); /* product + c == sum + error */
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if (!isfinite(sum) || error == 0 || bits & 1) return (float)sum;
    return (float)nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

static float expected_number(const product_case *c, int64_t i, int64_t j) {
    float total = 0;
    for (int64_t chunk = 0; chunk * 1024 < c->k; chunk++) {
        const int64_t length = c->k - chunk * 1024 < 1024 ? c->k - chunk * 1024 : 1024;
        float sum[16];
        for (int64_t lane = 0; lane < 16; lane++) {
            sum[lane] = 0;
            for (int64_t place = lane; place < (length + 15) / 16 * 16; place += 16)
                sum[lane] = place < length ? exact_fma(load_number(&c->arrays[A], i, chunk * 1024 + place),
                                                       load_number(&c->arrays[B], chunk * 1024 + place, j), sum[lane])
                                           : sum[lane] + 0.0f;
        }
        float eight[8], four[4];
        for (int l = 0; l < 8; l++) eight[l] = sum[l] + sum[l + 8];
        for (int l = 0; l < 4; l++) four[l] = eight[l] + eight[l + 4];
        const float of_chunk = (four[0] + four[2]) + (four[1] + four[3]);
        total = chunk ? total + of_chunk : of_chunk;
    }
    return c->has_bias ? total + load_number(&c->arrays[BIAS], 0, j) : total;
}

UNUSED_IN_SOME_PROGRAMS static void expect(product_case *c) {
    matrix *out = &c->arrays[OUT];
    const int64_t to_expected = out->expected - out->memory;
    OPENMP(omp parallel for schedule(static))
    for (int64_t i = 0; i < c->m; i++)
        for (int64_t j = 0; j < c->n; j++) {
            const float number = expected_number(c, i, j);
            unsigned char *at =
                (unsigned char *)out->tensor.data + to_expected + i * out->stride[0] + j * out->stride[1];
            if (out->tensor.dtype == FN_FLOAT32) {
                memcpy(at, &number, 4);
                continue;
            }
            const uint16_t half =
                exact_narrow(out->tensor.dtype == FN_FLOAT16 ? &exact_fp16 : &exact_bf16, bits_of(number));
            memcpy(at, &half, 2);
        }
}

static uint32_t random_bits(fn_dtype dtype, int values, uint64_t *random) {
    const uint64_t r = random64(random);
    const double unit = (double)(int64_t)(r >> 11) * 0x1p-52 - 1;
    if (values == ORDINARY) {
        const uint32_t bits = bits_of((float)unit);
        if (dtype == FN_FLOAT32) return bits;
        return exact_narrow(dtype == FN_FLOAT16 ? &exact_fp16 : &exact_bf16, bits);
    }
    const float tiny = (float)ldexp(unit, -(int)(r & 63) - 60); /* products that underflow, many to -0 */
    if (values == TINY)
        return dtype == FN_FLOAT32 ? bits_of(tiny)
                                   : exact_narrow(dtype == FN_FLOAT16 ? &exact_fp16 : &exact_bf16, bits_of(tiny));
    if (values == ANY_ENCODING) return dtype == FN_FLOAT32 ? (uint32_t)r : (uint32_t)r & 0xffff;
    /* 2^-77 (float16: its least number): a > 0 > b, so that products of others underflow to -0, see fill() */
    return dtype == FN_FLOAT32 ? UINT32_C(0x19000000) : dtype == FN_BFLOAT16 ? UINT32_C(0x1900) : 1;
}

/* Where bfloat16 pairs may or may not be multiplied by an instruction that flushes subnormals: groups of a's rows and of
 * b's columns have exponents, another in each chunk of k, whose sums lie around the 142 of csrc/cpu/mm_dtype.h, and numbers
 * whose products cancel to their last bits; few zeros, and very few subnormals, infinities and NaNs. */
static uint32_t near_subnormal_bits(fn_dtype dtype, int64_t row, int64_t k, uint64_t key, uint64_t *random) {
    const uint64_t r = random64(random);
    const uint32_t exponent = 71 - 1 + (uint32_t)(hash64(key + (uint64_t)(row / 4 + k / 1024 * 65536)) % 3);
    uint32_t bits = (uint32_t)(r & 0x8000) | exponent << 7 | (uint32_t)(r >> 16 & 1);
    if ((r >> 20) % 16 == 0) bits &= 0x8000;
    if ((r >> 32) % 4096 == 0) bits = (uint32_t)(r >> 48) & (r >> 24 & 1 ? 0x807f : 0xffff);
    return dtype == FN_FLOAT32 ? bits << 16 : bits;
}

static void fill(matrix *x, int role, int values, uint64_t *random) {
    const fn_dtype dtype = x->tensor.dtype;
    const size_t item = (size_t)fn_dtypes[dtype].bytes;
    for (int64_t i = 0; i < x->bytes; i++) x->memory[i] = (unsigned char)random64(random);
    if (role == OUT) return;
    const uint64_t key = random64(random);
    for (int64_t i = 0; i < x->shape[0]; i++)
        for (int64_t j = 0; j < x->shape[1]; j++) {
            uint32_t bits = values == NEAR_SUBNORMAL
                                ? near_subnormal_bits(dtype, role == A ? i : j, role == A ? j : i, key, random)
                                : random_bits(dtype, values, random);
            if (values == MINUS_ZEROS && role != A) bits |= dtype == FN_FLOAT32 ? UINT32_C(0x80000000) : 0x8000;
            const uint16_t half = (uint16_t)bits;
            unsigned char *at = (unsigned char *)x->tensor.data + i * x->stride[0] + j * x->stride[1];
            memcpy(at, item == 4 ? (const void *)&bits : (const void *)&half, item);
        }
}

/* `bytes` that end where a page begins that cannot be read. */
static unsigned char *before_a_wall(matrix *x) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    x->page_bytes = (x->bytes + page - 1) / page * page + page;
    x->pages = mmap(NULL, (size_t)x->page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (x->pages == MAP_FAILED || mprotect(x->pages + x->page_bytes - page, (size_t)page, PROT_NONE) != 0)
        CHECK_FAIL("no pages for an operand");
    return x->pages + x->page_bytes - page - x->bytes;
}

static void build_matrix(product_case *c, int role, fn_dtype dtype, int64_t rows, int64_t columns, uint64_t *random) {
    matrix *x = &c->arrays[role];
    const int64_t item = fn_dtypes[dtype].bytes;
    const int layout = c->layout[role];
    const bool transposed = layout == COLUMNS || (layout != ROWS && random_below(random, 2));
    const int64_t gap = layout == GAPS ? 1 + random_below(random, 3 * item) : 0; /* bytes, of any alignment */
    const int64_t step = layout == GAPS && random_below(random, 2) ? item + gap : item;
    const int64_t inner = transposed ? rows : columns, outer = transposed ? columns : rows;
    int64_t inner_stride = step, outer_stride = inner * step + gap;
    int64_t first = GUARD + (layout == GAPS ? random_below(random, 64) : 0);
    x->bytes = first + inner * outer * step + outer * gap + GUARD;
    if (layout == REVERSED) {
        first += (inner - 1) * inner_stride + (outer - 1) * outer_stride;
        inner_stride = -inner_stride;
        outer_stride = -outer_stride;
    }
    if (layout == REPEATED && role != OUT) *(random_below(random, 2) ? &inner_stride : &outer_stride) = 0;
    const bool wall = role != OUT && rows > 0 && columns > 0 && random_below(random, 2);
    if (wall) {
        const int64_t first_stride = transposed ? inner_stride : outer_stride;
        const int64_t second_stride = transposed ? outer_stride : inner_stride;
        x->bytes = first + item + (first_stride > 0 ? (rows - 1) * first_stride : 0) +
                   (second_stride > 0 ? (columns - 1) * second_stride : 0);
    }
    x->pages = NULL;
    x->memory = wall ? before_a_wall(x) : malloc((size_t)x->bytes);
    x->expected = role == OUT ? malloc((size_t)x->bytes) : NULL;
    if (!x->memory || (role == OUT && !x->expected)) CHECK_FAIL("no memory for %s", role_names[role]);
    x->shape[0] = rows;
    x->shape[1] = columns;
    x->stride[0] = transposed ? inner_stride : outer_stride;
    x->stride[1] = transposed ? outer_stride : inner_stride;
    const bool vector = role == BIAS;
    x->tensor = (fn_tensor){.name = role_names[role],
                            .data = x->memory + first,
                            .shape = x->shape + vector,
                            .stride_bytes = x->stride + vector,
                            .ndim = vector ? 1 : 2,
                            .dtype = dtype,
                            .device_type = FN_CPU};
    fill(x, role, c->values, random);
}

/* Half of the cases have ordinary numbers and more. */
static int choose_values(uint64_t *random) {
    const int values = (int)random_below(random, 2 * VALUES);
    return values < VALUES ? values : ORDINARY;
}

/* `dtypes`: one of 27 combinations for a, b and out; bias has any. */
static void build_case(product_case *c, int dtypes, uint64_t *random) {
    const fn_dtype dtype[ROLES] = {(fn_dtype)(dtypes % 3), (fn_dtype)(dtypes / 3 % 3),
                                   (fn_dtype)random_below(random, 3), (fn_dtype)(dtypes / 9 % 3)};
    build_matrix(c, A, dtype[A], c->m, c->k, random);
    build_matrix(c, B, dtype[B], c->k, c->n, random);
    build_matrix(c, BIAS, dtype[BIAS], 1, c->n, random);
    build_matrix(c, OUT, dtype[OUT], c->m, c->n, random);
    c->args = (fn_mm_args){.a = &c->arrays[A].tensor,
                           .b = &c->arrays[B].tensor,
                           .bias = c->has_bias ? &c->arrays[BIAS].tensor : NULL,
                           .out = &c->arrays[OUT].tensor};
}

static void free_case(product_case *c) {
    for (int role = 0; role < ROLES; role++) {
        if (c->arrays[role].pages) munmap(c->arrays[role].pages, (size_t)c->arrays[role].page_bytes);
        else free(c->arrays[role].memory);
        free(c->arrays[role].expected);
    }
}

UNUSED_IN_SOME_PROGRAMS static void describe(const product_case *c) {
    for (int role = 0; role < ROLES; role++) {
        const matrix *const x = &c->arrays[role];
        fprintf(stderr, "  %s: %s, shape %lld %lld, strides in bytes %lld %lld, address %% 64 = %d\n", role_names[role],
                fn_dtypes[x->tensor.dtype].name, (long long)x->shape[0], (long long)x->shape[1],
                (long long)x->stride[0], (long long)x->stride[1], (int)((uintptr_t)x->tensor.data % 64));
    }
    fprintf(stderr, "  bias %d, values %d, threads %d\n", c->has_bias, c->values, fn_get_num_threads());
}

#endif
