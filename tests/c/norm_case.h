/* norm_case.h: one random call of fn_norm: arrays of any layout between guard pages, their values and the options.
 *
 * Each array lies in memory of its own with an unreadable page before and after it, close to one of the two, so that a
 * kernel that reads or writes past a row's end stops the program. Random numbers are drawn one statement at a time:
 * the cases of a seed are then the same with every compiler.
 */
#ifndef NORM_CASE_H
#define NORM_CASE_H

#include <sys/mman.h>

#include "exact_dtypes.h"
#include "fusednorm.h"

enum { X, RESIDUAL, POST, WEIGHT, OUT, RESIDUAL_OUT, ROLES };
static const char *const role_names[ROLES] = {"x",      "residual", "post_residual_addition",
                                              "weight", "out",      "residual_out"};

#define ARENA_BYTES (INT64_C(64) << 20)
#define GUARD_BYTES 65536 /* at least a page on every system */

typedef struct {
    fn_tensor tensor;
    int64_t shape[3], stride_bytes[3];
    unsigned char *memory; /* the bytes from the lowest to the highest element */
    unsigned char *before; /* what the memory holds when the call begins */
    unsigned char *after;  /* what it must hold when the call has returned */
    int64_t bytes;
    int home; /* the role whose memory this is: another one's for an output that is its own input */
} norm_array;

typedef struct {
    fn_dtype dtype[ROLES];
    bool used[ROLES];
    int64_t leading[2]; /* 1 where there are fewer than 3 dimensions */
    int64_t columns;
    int ndim;
    bool plain; /* contiguous arrays of ordinary numbers */
    bool out_in_place, residual_in_place;
    double eps, weight_offset;
    bool cast_x_before_out_mul;
    fn_round_sum round_sum;
    norm_array arrays[ROLES];
    fn_norm_args args;
    float *totals; /* the sum of squares of each row, as it must be: a 16-bit result hides most differences in it */
} norm_case;

static unsigned char *arenas[ROLES];

static inline void prepare_arenas(void) {
    for (int role = 0; role < ROLES; role++) {
        unsigned char *const memory = mmap(NULL, (size_t)(ARENA_BYTES + 2 * GUARD_BYTES), PROT_NONE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory + GUARD_BYTES, ARENA_BYTES, PROT_READ | PROT_WRITE) != 0)
            CHECK_FAIL("no memory for the test's arrays");
        arenas[role] = memory + GUARD_BYTES;
    }
}

static inline int64_t row_count(const norm_case *c) { return c->leading[0] * c->leading[1]; }

static inline int64_t row_offset(const norm_case *c, const norm_array *array, int64_t row) {
    const unsigned char *origin = array->tensor.data;
    int64_t offset = origin - array->memory;
    if (array->tensor.ndim == 3) offset += row / c->leading[1] * array->stride_bytes[0];
    if (array->tensor.ndim >= 2) offset += row % c->leading[1] * array->stride_bytes[array->tensor.ndim - 2];
    return offset;
}

/* ---- encodings and numbers ------------------------------------------------------------------------------------------ */

static inline float load_element(const unsigned char *at, fn_dtype dtype) {
    float number;
    uint16_t half;
    if (dtype == FN_FLOAT32) {
        memcpy(&number, at, sizeof number);
        return number;
    }
    memcpy(&half, at, sizeof half);
    return (dtype == FN_FLOAT16 ? &exact_fp16 : &exact_bf16)->number[half];
}

static inline void store_element(unsigned char *at, fn_dtype dtype, float number) {
    if (dtype == FN_FLOAT32) {
        memcpy(at, &number, sizeof number);
        return;
    }
    const uint16_t half = exact_narrow(dtype == FN_FLOAT16 ? &exact_fp16 : &exact_bf16, bits_of(number));
    memcpy(at, &half, sizeof half);
}

static inline float round_to_dtype(float number, fn_dtype dtype) {
    unsigned char element[4];
    store_element(element, dtype, number);
    return load_element(element, dtype);
}

/* ---- layout --------------------------------------------------------------------------------------------------------- */

/* Strides for an array, then a place for it. Inputs may repeat elements by a stride of 0; outputs never overlap. */
static void lay_out(norm_case *c, int role, uint64_t *random) {
    norm_array *const array = &c->arrays[role];
    const int64_t item = fn_dtypes[c->dtype[role]].bytes;
    const bool may_repeat =
        role < OUT && !(role == X && c->out_in_place) && !(role == RESIDUAL && c->residual_in_place);
    const int ndim = role == WEIGHT ? 1 : c->ndim;
    const int last = ndim - 1;
    const int64_t column_strides[] = {item, item,  item,     item,     item,          item,
                                      item, -item, 2 * item, item + 1, -3 * item - 1, may_repeat ? 0 : 5 * item};
    const int64_t pads[] = {0, 0, 0, item, 1, 37, 64};

    array->shape[last] = c->columns;
    array->stride_bytes[last] = c->plain ? item : column_strides[random_below(random, 12)];
    for (int d = 0; d < last; d++) array->shape[d] = c->leading[d + 3 - ndim];
    int64_t step = (c->columns - 1) * llabs(array->stride_bytes[last]) + item;
    const int swap = c->plain || ndim < 3 ? 0 : (int)random_below(random, 2);
    for (int k = last - 1; k >= 0; k--) {
        const int d = swap ? last - 1 - k : k;
        if (!c->plain) step += pads[random_below(random, 7)];
        const int64_t kind = c->plain ? 0 : random_below(random, 8);
        array->stride_bytes[d] = kind == 7 && may_repeat ? 0 : kind == 6 ? -step : step;
        if (array->shape[d] == 1 && kind == 5) array->stride_bytes[d] = -123456789; /* never to be used */
        if (array->stride_bytes[d] != 0) step *= array->shape[d];
    }

    int64_t lowest = 0, highest = item;
    for (int d = 0; d < ndim; d++) {
        const int64_t reach = (array->shape[d] - 1) * array->stride_bytes[d];
        *(reach < 0 ? &lowest : &highest) += reach;
    }
    array->bytes = highest - lowest;
    const int64_t slack = random_below(random, 2) ? 0 : random_below(random, 64);
    if (array->bytes + slack > ARENA_BYTES)
        CHECK_FAIL("the test is wrong: an array of %lld bytes", (long long)array->bytes);
    const bool at_end = random_below(random, 4) != 0;
    array->memory = arenas[role] + (at_end ? ARENA_BYTES - slack - array->bytes : slack);
    array->home = role;
    array->tensor = (fn_tensor){.name = role_names[role],
                                .data = array->memory - lowest,
                                .shape = array->shape,
                                .stride_bytes = array->stride_bytes,
                                .ndim = ndim,
                                .dtype = c->dtype[role],
                                .device_type = FN_CPU,
                                .readonly = may_repeat};
}

/* ---- values --------------------------------------------------------------------------------------------------------- */

static float random_number(uint64_t *random, int kind, int scale) {
    const uint64_t word = random64(random);
    const float uniform = (float)(int32_t)(word >> 32) * 0x1p-31f;
    const float bell = uniform + (float)(int32_t)(uint32_t)word * 0x1p-31f;
    switch (kind) {
    case 0: return ldexpf(bell, scale);
    case 1: return (float)(int)(word % 33 - 16) * 0.25f; /* ties are frequent */
    case 2: return word % 3 == 0 ? 0.0f : word % 3 == 1 ? -0.0f : 0x1p-140f * uniform;
    case 3: return word % 64 == 0 ? ldexpf(bell, 100) : bell;
    default: return word & 1 ? 0.0f : -0.0f;
    }
}

static void fill(norm_case *c, int role, uint64_t *random) {
    norm_array *const array = &c->arrays[role];
    const int64_t item = fn_dtypes[c->dtype[role]].bytes;
    const int64_t rows = role == WEIGHT ? 1 : row_count(c);
    const int kind = c->plain ? 0 : (int)random_below(random, 12);
    const int scale = c->plain ? 0 : kind < 6 ? 0 : (int)random_below(random, 161) - 80;
    for (int64_t at = 0; at < array->bytes; at++) array->memory[at] = 0xa5;
    for (int64_t row = 0; row < rows; row++) {
        unsigned char *const first = array->memory + row_offset(c, array, row);
        for (int64_t column = 0; column < c->columns; column++) {
            unsigned char *const at = first + column * array->stride_bytes[array->tensor.ndim - 1];
            if (kind == 11) { /* any encoding */
                const uint64_t word = random64(random);
                const uint32_t bits = (uint32_t)word;
                const uint16_t half = (uint16_t)word;
                memcpy(at, item == 4 ? (const void *)&bits : (const void *)&half, (size_t)item);
            } else {
                store_element(at, c->dtype[role], random_number(random, kind < 7 ? 0 : kind - 6, scale));
            }
        }
    }
}

/* Lays the arrays out and fills them. Before it, everything above `arrays` is set. */
static inline void build_case(norm_case *c, uint64_t *random) {
    if (c->out_in_place) c->dtype[OUT] = c->dtype[X];
    if (c->residual_in_place) c->dtype[RESIDUAL_OUT] = c->dtype[RESIDUAL];
    c->totals = malloc((size_t)row_count(c) * sizeof *c->totals);
    if (!c->totals) CHECK_FAIL("out of memory");
    const fn_tensor *tensors[ROLES] = {NULL};
    for (int role = 0; role < ROLES; role++) {
        if (!c->used[role]) continue;
        norm_array *const array = &c->arrays[role];
        const int twin = role == OUT && c->out_in_place                 ? X
                         : role == RESIDUAL_OUT && c->residual_in_place ? RESIDUAL
                                                                        : role;
        if (twin != role) {
            *array = c->arrays[twin];
            array->tensor.name = role_names[role];
        } else {
            lay_out(c, role, random);
            fill(c, role, random);
            array->before = malloc((size_t)array->bytes);
            array->after = malloc((size_t)array->bytes);
            if (!array->before || !array->after) CHECK_FAIL("out of memory");
            memcpy(array->before, array->memory, (size_t)array->bytes);
            memcpy(array->after, array->memory, (size_t)array->bytes);
        }
        array->tensor.shape = array->shape;
        array->tensor.stride_bytes = array->stride_bytes;
        tensors[role] = &array->tensor;
    }
    c->args = (fn_norm_args){.x = tensors[X],
                             .residual = tensors[RESIDUAL],
                             .post_residual_addition = tensors[POST],
                             .weight = tensors[WEIGHT],
                             .out = tensors[OUT],
                             .residual_out = tensors[RESIDUAL_OUT],
                             .eps = c->eps,
                             .weight_offset = c->weight_offset,
                             .cast_x_before_out_mul = c->cast_x_before_out_mul,
                             .round_sum = c->round_sum};
}

static inline void free_case(norm_case *c) {
    free(c->totals);
    for (int role = 0; role < ROLES; role++) {
        if (!c->used[role] || c->arrays[role].home != role) continue;
        free(c->arrays[role].before);
        free(c->arrays[role].after);
    }
}

static inline void reset_memory(norm_case *c) {
    for (int role = 0; role < ROLES; role++)
        if (c->used[role] && c->arrays[role].home == role)
            memcpy(c->arrays[role].memory, c->arrays[role].before, (size_t)c->arrays[role].bytes);
}

/* ---- choices -------------------------------------------------------------------------------------------------------- */

/* The n-th combination of what is used and of its dtypes: 36 without a residual, then 1296 with one. */
#define DTYPE_COMBINATIONS (36 + 1296)

static inline void choose_dtypes(norm_case *c, int64_t n) {
    static const int plain_roles[] = {X, OUT}, fused_roles[] = {X, RESIDUAL, OUT, RESIDUAL_OUT};
    const bool fused = n >= 36;
    const int *const roles = fused ? fused_roles : plain_roles;
    if (fused) n -= 36;
    for (int i = 0; i < (fused ? 4 : 2); i++, n /= 3) {
        c->used[roles[i]] = true;
        c->dtype[roles[i]] = (fn_dtype)(n % 3);
    }
    c->used[WEIGHT] = n % 4 != 3;
    c->dtype[WEIGHT] = (fn_dtype)(n % 4 % 3);
    n /= 4;
    c->used[POST] = fused && n % 4 != 3;
    c->dtype[POST] = (fn_dtype)(n % 4 % 3);
}

/* Every array of one dtype: the common call, for which a path may have code of its own. */
static inline void choose_one_dtype(norm_case *c, fn_dtype dtype) {
    for (int role = 0; role < ROLES; role++) c->dtype[role] = dtype;
}

static inline void choose_options(norm_case *c, uint64_t *random) {
    static const double epsilons[] = {1e-6, 1e-6, 1e-5, 0.0, 1.0, 1e-40, 0.1};
    static const double offsets[] = {0.0, 0.0, 1.0, -0.0, 0.1, 1e-60};
    c->eps = epsilons[random_below(random, 7)];
    const int64_t offset = random_below(random, 6);
    c->weight_offset = c->used[WEIGHT] ? offsets[offset] : 0.0;
    c->cast_x_before_out_mul = random_below(random, 2) != 0;
    const int64_t round_sum = random_below(random, 3);
    c->round_sum = c->used[RESIDUAL] ? (fn_round_sum)round_sum : FN_SUM_FP32;
    c->out_in_place = random_below(random, 3) == 0;
    const int64_t residual_in_place = random_below(random, 3);
    c->residual_in_place = c->used[RESIDUAL] && residual_in_place == 0;
    c->ndim = 1 + (int)random_below(random, 3);
    c->leading[0] = 1 + random_below(random, 4);
    c->leading[1] = 1 + random_below(random, 5);
    if (c->ndim < 3) c->leading[0] = 1;
    if (c->ndim < 2) c->leading[1] = 1;
}

#endif
