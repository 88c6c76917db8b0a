/* norm_check.c: a norm's arguments, checked once, become a plan. Nothing is written here, nothing is checked later. */
#include "norm_check.h"

#include "overlap.h"
#include "tensor_check.h"

#include <math.h>

/* ---- shapes --------------------------------------------------------------------------------------------------------- */

static bool same_shape(const fn_tensor *a, const fn_tensor *b) {
    if (a->ndim != b->ndim) return false;
    for (int32_t i = 0; i < a->ndim; i++)
        if (a->shape[i] != b->shape[i]) return false;
    return true;
}

static fn_status check_shapes(const char *function, const fn_tensor *const operand[FN_OPERANDS], int64_t *rows) {
    const fn_tensor *x = operand[FN_X];
    FN_REQUIRE(x->ndim <= FN_MAX_NDIM, FN_ERROR_VALUE, "%s: %s has %d dimensions: at most %d are supported", function,
               x->name, x->ndim, FN_MAX_NDIM);
    FN_REQUIRE(x->ndim >= 1, FN_ERROR_VALUE,
               "%s: %s has no dimensions: it must have at least 1, its last is normalised", function, x->name);
    const int64_t columns = x->shape[x->ndim - 1];
    FN_REQUIRE(columns >= 1, FN_ERROR_VALUE, "%s: %s has shape %s: its last dimension must be at least 1", function,
               x->name, fn_shape_of(x).text);
    for (int i = FN_RESIDUAL; i < FN_ROW_OPERANDS; i++)
        FN_REQUIRE(!operand[i] || same_shape(operand[i], x), FN_ERROR_VALUE,
                   "%s: %s has shape %s, but %s has shape %s: they must be equal", function, operand[i]->name,
                   fn_shape_of(operand[i]).text, x->name, fn_shape_of(x).text);
    const fn_tensor *weight = operand[FN_WEIGHT];
    FN_REQUIRE(!weight || (weight->ndim == 1 && weight->shape[0] == columns), FN_ERROR_VALUE,
               "%s: weight has shape %s, but %s has rows of length %lld: weight must have shape (%lld,)", function,
               fn_shape_of(weight).text, x->name, (long long)columns, (long long)columns);

    int64_t count = 1, elements;
    for (int32_t i = 0; i < x->ndim - 1; i++)
        if (x->shape[i] == 0) count = 0;
    bool overflow = false;
    for (int32_t i = 0; count && i < x->ndim - 1; i++) overflow |= __builtin_mul_overflow(count, x->shape[i], &count);
    overflow |= __builtin_mul_overflow(count, columns, &elements) || elements > INT64_MAX / 8;
    FN_REQUIRE(!overflow, FN_ERROR_VALUE, "%s: %s has shape %s: more elements than memory could hold", function,
               x->name, fn_shape_of(x).text);
    *rows = count;
    return FN_OK;
}

/* ---- memory --------------------------------------------------------------------------------------------------------- */

static fn_status refuse_overlap(const char *function, const fn_tensor *out, const fn_tensor *other,
                                const fn_tensor *own) {
    return fn_fail(
        FN_ERROR_VALUE,
        "%s: %s overlaps %s: an output may be exactly %s (memory, shape, strides and dtype), and must not overlap "
        "anything else",
        function, out->name, other->name, own->name);
}

static const struct {
    fn_operand_index output, own_input;
} outputs_and_inputs[] = {{FN_OUT, FN_X}, {FN_RESIDUAL_OUT, FN_RESIDUAL}};

/* For operands of any strides, all with elements. */
static fn_status check_overlaps(const char *function, const fn_tensor *const operand[FN_OPERANDS]) {
    for (int k = 0; k < 2; k++) {
        const fn_operand_index index = outputs_and_inputs[k].output;
        const fn_tensor *out = operand[index], *own = operand[outputs_and_inputs[k].own_input];
        if (!out) continue;
        FN_REQUIRE(
            !fn_may_overlap_itself(out), FN_ERROR_VALUE,
            "%s: elements of %s overlap each other (a stride of 0, say): an output needs memory of its own for each",
            function, out->name);
        for (int i = 0; i < FN_OPERANDS; i++) {
            const fn_tensor *other = operand[i];
            if (!other || i == (int)index || (other == own && fn_same_view(out, own))) continue;
            if (fn_may_overlap(out, other)) return refuse_overlap(function, out, other, own);
        }
    }
    return FN_OK;
}

/* The same when every operand is compact: its bytes are one run of known length. */
static fn_status check_overlaps_of_runs(const char *function, const fn_tensor *const operand[FN_OPERANDS],
                                        const uint64_t run_bytes[FN_OPERANDS]) {
    for (int k = 0; k < 2; k++) {
        const fn_operand_index index = outputs_and_inputs[k].output;
        const fn_tensor *out = operand[index], *own = operand[outputs_and_inputs[k].own_input];
        if (!out) continue;
        const uint64_t begin = (uint64_t)(uintptr_t)out->data;
        for (int i = 0; i < FN_OPERANDS; i++) {
            const fn_tensor *other = operand[i];
            if (!other || i == (int)index || (other == own && own->data == out->data && own->dtype == out->dtype))
                continue;
            const uint64_t other_begin = (uint64_t)(uintptr_t)other->data;
            if (begin < other_begin + run_bytes[i] && other_begin < begin + run_bytes[index])
                return refuse_overlap(function, out, other, own);
        }
    }
    return FN_OK;
}

/* Row major without gaps. */
static bool is_compact(const fn_tensor *a) {
    int64_t stride = fn_dtypes[a->dtype].bytes;
    for (int32_t i = a->ndim - 1; i >= 0; i--) {
        if (a->stride_bytes[i] != stride && a->shape[i] != 1) return false;
        stride *= a->shape[i];
    }
    return true;
}

/* ---- the plan ------------------------------------------------------------------------------------------------------- */

static void merge_leading_dimensions(fn_norm_plan *plan, const fn_tensor *const operand[FN_OPERANDS]) {
    const fn_tensor *x = operand[FN_X];
    int32_t used = 0;
    for (int32_t i = 0; i < x->ndim - 1; i++) {
        if (x->shape[i] == 1) continue;
        bool merges = used > 0;
        for (int k = 0; merges && k < FN_ROW_OPERANDS; k++)
            if (operand[k] && plan->leading_stride[k][used - 1] != operand[k]->stride_bytes[i] * x->shape[i])
                merges = false;
        if (merges) used--;
        plan->leading_shape[used] = merges ? plan->leading_shape[used] * x->shape[i] : x->shape[i];
        for (int k = 0; k < FN_ROW_OPERANDS; k++)
            if (operand[k]) plan->leading_stride[k][used] = operand[k]->stride_bytes[i];
        used++;
    }
    plan->leading_ndim = used;
}

fn_status fn_norm_check(const fn_norm_args *args, fn_norm_plan *plan) {
    const char *function = args->function ? args->function : "norm";
    const fn_tensor *const operand[FN_OPERANDS] = {
        [FN_X] = args->x,           [FN_RESIDUAL] = args->residual, [FN_POST] = args->post_residual_addition,
        [FN_WEIGHT] = args->weight, [FN_OUT] = args->out,           [FN_RESIDUAL_OUT] = args->residual_out,
    };
    FN_REQUIRE(args->x && args->out && !args->residual == !args->residual_out &&
                   (args->residual || !args->post_residual_addition),
               FN_ERROR_VALUE, "%s: x and out must be given, residual and residual_out together", function);
    FN_REQUIRE((unsigned)args->round_sum <= FN_SUM_ROUNDED_AFTER_VARIANCE, FN_ERROR_VALUE,
               "%s: round_sum is number %d: it must be one of fn_round_sum", function, (int)args->round_sum);
    plan->eps = (float)args->eps;
    plan->weight_offset = (float)args->weight_offset;
    FN_REQUIRE(args->eps >= 0 && isfinite(plan->eps), FN_ERROR_VALUE,
               "%s: eps is %g: it must be at least 0 and finite in float32", function, args->eps);
    FN_REQUIRE(isfinite(plan->weight_offset), FN_ERROR_VALUE, "%s: weight_offset is %g: it must be finite in float32",
               function, args->weight_offset);
    FN_REQUIRE(args->weight || args->weight_offset == 0, FN_ERROR_VALUE,
               "%s: weight_offset is %g, but weight is None: without a weight it must be 0", function,
               args->weight_offset);
    for (int i = FN_X; i < FN_OPERANDS; i++) FN_TRY(fn_check_device(function, operand[i], args->x));
    FN_TRY(check_shapes(function, operand, &plan->rows));
    FN_TRY(fn_check_writable(function, args->out));
    FN_TRY(fn_check_writable(function, args->residual_out));
    if (plan->rows == 0) return FN_OK;

    plan->columns = args->x->shape[args->x->ndim - 1];
    plan->contiguous = true;
    plan->cast_x_before_out_mul = args->cast_x_before_out_mul;
    plan->round_sum = args->residual ? args->round_sum : FN_SUM_FP32;
    plan->weights_are_constant = args->weights_are_constant;
    plan->device_id = args->x->device_id;
    plan->stream = args->stream;
    bool compact = true;
    uint64_t run_bytes[FN_OPERANDS];
    for (int i = 0; i < FN_OPERANDS; i++) {
        const fn_tensor *a = operand[i];
        if (!a) {
            plan->operand[i] = (fn_operand){NULL, 0, FN_FLOAT32};
            continue;
        }
        FN_REQUIRE((unsigned)a->dtype < FN_DTYPE_COUNT, FN_ERROR_TYPE,
                   "%s: %s has dtype number %d: it must be one of fn_dtype", function, a->name, (int)a->dtype);
        FN_REQUIRE(a->data, FN_ERROR_TYPE, "%s: %s has shape %s but no memory behind it", function, a->name,
                   fn_shape_of(a).text);
        const int64_t bytes = fn_dtypes[a->dtype].bytes;
        plan->operand[i] = (fn_operand){a->data, a->stride_bytes[a->ndim - 1], a->dtype};
        if (plan->columns > 1 && plan->operand[i].column_stride != bytes) plan->contiguous = false;
        compact = compact && is_compact(a);
        run_bytes[i] = (uint64_t)((i == FN_WEIGHT ? 1 : plan->rows) * plan->columns * bytes);
        if (i == FN_WEIGHT) continue;
        plan->leading_stride[i][0] = plan->columns * bytes; /* if compact */
    }
    if (!compact) {
        FN_TRY(check_overlaps(function, operand));
        merge_leading_dimensions(plan, operand);
        return FN_OK;
    }
    plan->leading_ndim = plan->rows > 1;
    plan->leading_shape[0] = plan->rows;
    return check_overlaps_of_runs(function, operand, run_bytes);
}
