/* mm_check.c: a product's arguments, checked once, become a plan. Nothing is written here, nothing is checked later. */
#include "mm_check.h"

#include "overlap.h"
#include "tensor_check.h"

enum { A, B, BIAS, OUT, OPERANDS };

static fn_status check_shapes(const char *function, const fn_tensor *const operand[OPERANDS]) {
    const fn_tensor *a = operand[A], *b = operand[B], *bias = operand[BIAS], *out = operand[OUT];
    for (int i = 0; i < OPERANDS; i++) {
        const int32_t wanted = i == BIAS ? 1 : 2;
        FN_REQUIRE(!operand[i] || operand[i]->ndim == wanted, FN_ERROR_VALUE,
                   "%s: %s has %d dimension%s: it must have exactly %d", function, operand[i]->name, operand[i]->ndim,
                   operand[i]->ndim == 1 ? "" : "s", wanted);
        for (int32_t d = 0; operand[i] && d < wanted; d++)
            FN_REQUIRE(operand[i]->shape[d] >= 0, FN_ERROR_VALUE, "%s: %s has shape %s: no dimension may be negative",
                       function, operand[i]->name, fn_shape_of(operand[i]).text);
    }
    const int64_t m = a->shape[0], k = a->shape[1], n = b->shape[1];
    FN_REQUIRE(b->shape[0] == k, FN_ERROR_VALUE,
               "%s: %s has shape %s, but %s has shape %s: its first dimension must be %lld", function, b->name,
               fn_shape_of(b).text, a->name, fn_shape_of(a).text, (long long)k);
    FN_REQUIRE(!bias || bias->shape[0] == n, FN_ERROR_VALUE,
               "%s: bias has shape %s, but %s has shape %s: bias must have shape (%lld,)", function,
               fn_shape_of(bias).text, b->name, fn_shape_of(b).text, (long long)n);
    FN_REQUIRE(out->shape[0] == m && out->shape[1] == n, FN_ERROR_VALUE,
               "%s: %s has shape %s, but %s has shape %s and %s has shape %s: it must have shape (%lld, %lld)",
               function, out->name, fn_shape_of(out).text, a->name, fn_shape_of(a).text, b->name, fn_shape_of(b).text,
               (long long)m, (long long)n);
    static const int with_two_dimensions[] = {A, B, OUT};
    for (int i = 0; i < 3; i++) {
        const fn_tensor *matrix = operand[with_two_dimensions[i]];
        int64_t elements;
        const bool overflow = __builtin_mul_overflow(matrix->shape[0], matrix->shape[1], &elements);
        FN_REQUIRE(!overflow && elements <= INT64_MAX / 8, FN_ERROR_VALUE,
                   "%s: %s has shape %s: more elements than memory could hold", function, matrix->name,
                   fn_shape_of(matrix).text);
    }
    return FN_OK;
}

static bool has_elements(const fn_tensor *a) {
    for (int32_t i = 0; i < a->ndim; i++)
        if (a->shape[i] == 0) return false;
    return true;
}

static fn_status check_memory(const char *function, const fn_tensor *const operand[OPERANDS]) {
    const fn_tensor *out = operand[OUT];
    for (int i = 0; i < OPERANDS; i++)
        FN_REQUIRE(!operand[i] || operand[i]->data || !has_elements(operand[i]), FN_ERROR_TYPE,
                   "%s: %s has shape %s but no memory behind it", function, operand[i]->name,
                   fn_shape_of(operand[i]).text);
    FN_REQUIRE(!fn_may_overlap_itself(out), FN_ERROR_VALUE,
               "%s: elements of %s overlap each other (a stride of 0, say): an output needs memory of its own for each",
               function, out->name);
    for (int i = 0; i < OUT; i++)
        FN_REQUIRE(!operand[i] || !has_elements(operand[i]) || !fn_may_overlap(out, operand[i]), FN_ERROR_VALUE,
                   "%s: %s overlaps %s: the output of a product must not overlap anything", function, out->name,
                   operand[i]->name);
    return FN_OK;
}

static fn_matrix matrix_of(const fn_tensor *a) {
    if (!a) return (fn_matrix){NULL, {0, 0}, FN_FLOAT32};
    const int64_t rows = a->ndim == 2 ? a->stride_bytes[0] : 0;
    return (fn_matrix){a->data, {rows, a->stride_bytes[a->ndim - 1]}, a->dtype};
}

fn_status fn_mm_check(const fn_mm_args *args, fn_mm_plan *plan) {
    const char *function = args->function ? args->function : "mm";
    const fn_tensor *const operand[OPERANDS] = {[A] = args->a, [B] = args->b, [BIAS] = args->bias, [OUT] = args->out};
    FN_REQUIRE(args->a && args->b && args->out, FN_ERROR_VALUE, "%s: a, b and out must be given", function);
    for (int i = 0; i < OPERANDS; i++) {
        if (!operand[i]) continue;
        FN_REQUIRE((unsigned)operand[i]->dtype < FN_DTYPE_COUNT, FN_ERROR_TYPE,
                   "%s: %s has dtype number %d: it must be one of fn_dtype", function, operand[i]->name,
                   (int)operand[i]->dtype);
        FN_TRY(fn_check_device(function, operand[i], args->a));
    }
    FN_TRY(check_shapes(function, operand));
    FN_TRY(fn_check_writable(function, args->out));
    *plan = (fn_mm_plan){
        .a = matrix_of(args->a),
        .b = matrix_of(args->b),
        .out = matrix_of(args->out),
        .bias = matrix_of(args->bias),
        .m = args->out->shape[0],
        .n = args->out->shape[1],
        .k = args->a->shape[1],
        .device_id = args->a->device_id,
        .stream = args->stream,
        .weights_are_constant = args->weights_are_constant,
    };
    return plan->m == 0 || plan->n == 0 ? FN_OK : check_memory(function, operand);
}
