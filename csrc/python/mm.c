/* mm.c: mm_dtype(), and the product behind router_logits(): their arguments become a fn_call, which call.c runs. */
#include "binding.h"

enum { A, B, BIAS, OUT, OPERANDS, INPUTS = OUT };

/* A norm's element costs as much as this many multiply-adds. */
#define MULTIPLY_ADDS_PER_ELEMENT 4.0

static double effort(const fn_call *call, fn_array *const *array) {
    (void)call;
    const fn_tensor *a = &array[A]->view;
    const double length = a->ndim ? (double)a->shape[a->ndim - 1] : 0;
    return fn_elements_of(&array[OUT]->view) * (1 + length / MULTIPLY_ADDS_PER_ELEMENT);
}

/* ---- mm_dtype: a (M, K) times b (K, N) ------------------------------------------------------------------------------ */

/* Operands that do not fit get a result without elements: fn_mm says what is wrong with them, before it looks at that. */
static int mm_result(const fn_call *call, fn_array *const *array, fn_result *result, int64_t *room) {
    (void)call;
    const fn_tensor *a = &array[A]->view, *b = &array[B]->view;
    const bool fit = a->ndim == 2 && b->ndim == 2 && a->shape[1] == b->shape[0];
    room[0] = fit ? a->shape[0] : 0;
    room[1] = fit ? b->shape[1] : 0;
    result->ndim = 2;
    result->shape = room;
    return 0;
}

static fn_status mm_compute(const fn_call *call, fn_array *const *array) {
    const fn_mm_args args = {.function = call->function,
                             .a = fn_view_of(array[A]),
                             .b = fn_view_of(array[B]),
                             .bias = fn_view_of(array[BIAS]),
                             .out = fn_view_of(array[OUT]),
                             .stream = call->work.handle,
                             .weights_are_constant = call->weights_are_constant};
    return fn_mm(&args);
}

static const fn_call_kind mm_operation = {
    .inputs = INPUTS, .operands = OPERANDS, .reshape = mm_result, .effort = effort, .compute = mm_compute};

enum { M_A, M_B, M_OUT_DTYPE, M_BIAS, M_OUT, M_STREAM, M_COUNT };
static const char *const mm_names[] = {"a", "b", "out_dtype", "bias", "out", "stream"};
static const char *const mm_operand_names[OPERANDS] = {"a", "b", "bias", "out"};
const fn_signature fn_mm_dtype_signature = {"mm_dtype", mm_names, M_COUNT, 3, 2, FN_SIGNATURE_MM_DTYPE};

PyObject *fn_py_mm_dtype(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords) {
    PyObject *value[M_COUNT], *result; /* borrowed; owned */
    fn_state *state = fn_state_of(module);
    if (fn_parse(state, &fn_mm_dtype_signature, args, nargs, keywords, value) < 0) return NULL;
    fn_call call = {.state = state,
                    .operation = &mm_operation,
                    .function = fn_mm_dtype_signature.function,
                    .names = mm_operand_names,
                    .given = {[A] = value[M_A],
                              [B] = value[M_B],
                              [BIAS] = fn_unless_none(value[M_BIAS]),
                              [OUT] = fn_unless_none(value[M_OUT])},
                    .out_dtype = fn_unless_none(value[M_OUT_DTYPE]),
                    .stream = fn_unless_none(value[M_STREAM])};
    call.allocate[OUT] = !call.given[OUT];
    return fn_run_call(&call, &result) < 0 ? NULL : result;
}

/* ---- _linear: x (..., K) times gate_weight (N, K) transposed ------------------------------------------------------------ */

enum { X = A, WEIGHT = B };

static int refuse_shape(const char *function, const fn_tensor *view, const char *other, int64_t length,
                        const char *allowed) {
    const fn_result seen = {view->ndim, view->shape, view->dtype};
    PyObject *shape = fn_result_shape(&seen);
    if (shape)
        PyErr_Format(PyExc_ValueError, "%s: %s has shape %R, but %s of length %lld: %s must have shape (%s%lld%s",
                     function, view->name, shape, other, (long long)length, view->name, allowed, (long long)length,
                     *allowed ? ")" : ",)");
    Py_XDECREF(shape);
    return -1;
}

static int linear_result(const fn_call *call, fn_array *const *array, fn_result *result, int64_t *room) {
    const fn_tensor *x = &array[X]->view, *weight = &array[WEIGHT]->view;
    if (x->ndim < 1) {
        PyErr_Format(PyExc_ValueError, "%s: %s has no dimensions: it must have at least 1, its last is multiplied",
                     call->function, x->name);
        return -1;
    }
    const int64_t length = x->shape[x->ndim - 1];
    if (weight->ndim != 2 || weight->shape[1] != length)
        return refuse_shape(call->function, weight, "x has rows", length, "N, ");
    memcpy(room, x->shape, sizeof room[0] * (size_t)x->ndim);
    room[x->ndim - 1] = weight->shape[0];
    result->shape = room;
    return 0;
}

static int linear_check(fn_call *call, fn_array *const *array) {
    fn_array *bias = array[BIAS];
    if (!bias) return 0;
    if (fn_array_import_native(call->state, call->function, bias, false) < 0 ||
        fn_array_import_native(call->state, call->function, array[WEIGHT], false) < 0)
        return -1;
    const int64_t columns = array[WEIGHT]->view.shape[0];
    if (bias->view.ndim == 1 && bias->view.shape[0] == columns) return 0;
    return refuse_shape(call->function, &bias->view, "gate_weight gives rows", columns, "");
}

/* x and out as matrices of rows that lie evenly, and the dimensions that are left to count through. */
typedef struct {
    int64_t shape[FN_MAX_NDIM], x_stride[FN_MAX_NDIM], out_stride[FN_MAX_NDIM];
    int32_t ndim;
} slabs;

static void merge_dimensions(slabs *s, const fn_tensor *x, const fn_tensor *out) {
    s->ndim = 0;
    for (int32_t i = 0; i < x->ndim - 1; i++) {
        const int64_t size = x->shape[i];
        if (size == 1) continue;
        const int32_t last = s->ndim - 1;
        const bool merges = s->ndim > 0 && s->x_stride[last] == x->stride_bytes[i] * size &&
                            s->out_stride[last] == out->stride_bytes[i] * size;
        if (!merges) s->ndim++;
        s->shape[s->ndim - 1] = merges ? s->shape[last] * size : size;
        s->x_stride[s->ndim - 1] = x->stride_bytes[i];
        s->out_stride[s->ndim - 1] = out->stride_bytes[i];
    }
}

/* Advances to the next index; false after the last. */
static bool next_slab(const slabs *s, int32_t ndim, int64_t *index, int64_t *x_offset, int64_t *out_offset) {
    for (int32_t i = ndim - 1; i >= 0; i--) {
        index[i]++;
        *x_offset += s->x_stride[i];
        *out_offset += s->out_stride[i];
        if (index[i] < s->shape[i]) return true;
        index[i] = 0;
        *x_offset -= s->x_stride[i] * s->shape[i];
        *out_offset -= s->out_stride[i] * s->shape[i];
    }
    return false;
}

/* The shapes were checked when the result was made; Python code that ran since may have changed those of an ndarray. */
static bool still_fit(const fn_tensor *x, const fn_tensor *weight, const fn_tensor *out) {
    if (x->ndim < 1 || x->ndim != out->ndim || weight->ndim != 2) return false;
    const int32_t last = x->ndim - 1;
    for (int32_t i = 0; i < last; i++)
        if (x->shape[i] != out->shape[i]) return false;
    return x->shape[last] == weight->shape[1] && out->shape[last] == weight->shape[0];
}

/* One product for all rows where their leading dimensions lie evenly, which costs no copy; else one for each slab that does:
 * a row's bits do not depend on the others. The first product checks what all have in common, before anything is written. */
static fn_status linear_compute(const fn_call *call, fn_array *const *array) {
    const fn_tensor *x = &array[X]->view, *weight = &array[WEIGHT]->view, *out = &array[OUT]->view;
    if (!still_fit(x, weight, out))
        return fn_fail(FN_ERROR_VALUE, "%s: the shape of x or gate_weight was changed during the call", call->function);
    slabs s;
    merge_dimensions(&s, x, out);
    const int32_t rows = s.ndim - 1; /* the dimension of a slab's rows; -1: there is one row */
    const bool empty = fn_elements_of(out) == 0;
    const int64_t m = empty ? 0 : rows < 0 ? 1 : s.shape[rows];
    const int64_t k = x->shape[x->ndim - 1], n = weight->shape[0];
    const int64_t x_shape[] = {m, k}, weight_shape[] = {k, n}, out_shape[] = {m, n};
    const int64_t x_stride[] = {rows < 0 ? 0 : s.x_stride[rows], x->stride_bytes[x->ndim - 1]};
    const int64_t weight_stride[] = {weight->stride_bytes[1], weight->stride_bytes[0]};
    const int64_t out_stride[] = {rows < 0 ? 0 : s.out_stride[rows], out->stride_bytes[out->ndim - 1]};
    fn_tensor a = *x, b = *weight, c = *out;
    a.ndim = b.ndim = c.ndim = 2;
    a.shape = x_shape, a.stride_bytes = x_stride;
    b.shape = weight_shape, b.stride_bytes = weight_stride;
    c.shape = out_shape, c.stride_bytes = out_stride;
    const fn_mm_args args = {.function = call->function,
                             .a = &a,
                             .b = &b,
                             .bias = fn_view_of(array[BIAS]),
                             .out = &c,
                             .stream = call->work.handle,
                             .weights_are_constant = call->weights_are_constant};
    int64_t index[FN_MAX_NDIM] = {0}, x_offset = 0, out_offset = 0;
    fn_status status;
    do {
        a.data = x->data ? (char *)x->data + x_offset : NULL;
        c.data = out->data ? (char *)out->data + out_offset : NULL;
        status = fn_mm(&args);
    } while (status == FN_OK && !empty && next_slab(&s, rows, index, &x_offset, &out_offset));
    return status;
}

static const fn_call_kind linear_operation = {.inputs = INPUTS,
                                              .operands = OPERANDS,
                                              .check = linear_check,
                                              .reshape = linear_result,
                                              .effort = effort,
                                              .compute = linear_compute};

enum { L_X, L_WEIGHT, L_OUT_DTYPE, L_BIAS, L_COUNT };
static const char *const linear_names[] = {"x", "gate_weight", "out_dtype", "bias"};
static const char *const linear_operand_names[OPERANDS] = {"x", "gate_weight", "bias", "out"};
const fn_signature fn_linear_signature = {"router_logits", linear_names, L_COUNT, L_COUNT, 2, FN_SIGNATURE_LINEAR};

PyObject *fn_py_linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords) {
    PyObject *value[L_COUNT], *result; /* borrowed; owned */
    fn_state *state = fn_state_of(module);
    if (fn_parse(state, &fn_linear_signature, args, nargs, keywords, value) < 0) return NULL;
    fn_call call = {.state = state,
                    .operation = &linear_operation,
                    .function = fn_linear_signature.function,
                    .names = linear_operand_names,
                    .given = {[X] = value[L_X], [WEIGHT] = value[L_WEIGHT], [BIAS] = fn_unless_none(value[L_BIAS])},
                    .allocate = {[OUT] = true},
                    .out_dtype = fn_unless_none(value[L_OUT_DTYPE])};
    return fn_run_call(&call, &result) < 0 ? NULL : result;
}
