/* norms.c: the three norm functions: their arguments become a norm_call, which call.c runs. */
#include "binding.h"

enum { X, RESIDUAL, POST, WEIGHT, OUT, RESIDUAL_OUT, OPERANDS, INPUTS = OUT };

typedef struct {
    fn_call call;               /* the first member: a fn_call of this file is one of these */
    fn_norm_args args;          /* its function, numbers and flags; the arrays are filled in by compute */
    PyObject *normalized_shape; /* borrowed; NULL: rms_norm has none */
    bool eps_of_dtype;          /* eps = finfo(input.dtype).eps */
} norm_call;

static const char *const operand_names[OPERANDS] = {"x",      "residual", "post_residual_addition",
                                                    "weight", "out",      "residual_out"};

static int check_normalized_shape(const char *function, PyObject *shape, const fn_tensor *x) {
    PyObject *item = NULL; /* borrowed */
    int overflow = 0;
    if (PyTuple_Check(shape)) item = PyTuple_GET_SIZE(shape) == 1 ? PyTuple_GET_ITEM(shape, 0) : NULL;
    else if (PyList_Check(shape)) item = PyList_GET_SIZE(shape) == 1 ? PyList_GET_ITEM(shape, 0) : NULL;
    else item = shape;
    if (item && (PyBool_Check(item) || !PyIndex_Check(item))) {
        PyErr_Format(PyExc_TypeError, "%s: normalized_shape is %R: it must be an integer, or a list or tuple of one",
                     function, shape);
        return -1;
    }
    Py_XINCREF(item); /* __index__ may empty the list */
    PyObject *number = item ? PyNumber_Index(item) : NULL;
    Py_XDECREF(item);
    if (item && !number) return -1;
    const long long size = number ? PyLong_AsLongLongAndOverflow(number, &overflow) : -1;
    Py_XDECREF(number);
    if (x->ndim < 1 || (number && !overflow && size == x->shape[x->ndim - 1])) return 0;
    PyErr_Format(
        PyExc_ValueError,
        "%s: normalized_shape is %R, but input's last dimension is %lld: only the last dimension, alone, can be "
        "normalised",
        function, shape, (long long)x->shape[x->ndim - 1]);
    return -1;
}

static int check(fn_call *call, fn_array *const *array) {
    PyObject *shape = ((norm_call *)call)->normalized_shape; /* borrowed */
    if (!shape) return 0;
    if (fn_array_import_native(call->state, call->function, array[X], false) < 0) return -1;
    return check_normalized_shape(call->function, shape, &array[X]->view);
}

static double effort(const fn_call *call, fn_array *const *array) {
    (void)call;
    return fn_elements_of(&array[X]->view);
}

static fn_status compute(const fn_call *call, fn_array *const *array) {
    const norm_call *norm = (const norm_call *)call;
    fn_norm_args args = norm->args;
    args.function = call->function;
    args.x = fn_view_of(array[X]);
    args.residual = fn_view_of(array[RESIDUAL]);
    args.post_residual_addition = fn_view_of(array[POST]);
    args.weight = fn_view_of(array[WEIGHT]);
    args.out = fn_view_of(array[OUT]);
    args.residual_out = fn_view_of(array[RESIDUAL_OUT]);
    if (norm->eps_of_dtype) args.eps = fn_dtypes[args.x->dtype].eps;
    args.stream = call->work.handle;
    args.weights_are_constant = args.weight && call->weights_are_constant;
    return fn_norm(&args);
}

static const fn_call_kind operation = {
    .inputs = INPUTS, .operands = OPERANDS, .in_place = true, .check = check, .effort = effort, .compute = compute};

/* ---- rms_norm --------------------------------------------------------------------------------------------------------- */

enum { N_X, N_WEIGHT, N_EPS, N_OFFSET, N_CAST, N_OUT, N_OUT_DTYPE, N_STREAM, N_COUNT };
static const char *const rms_norm_names[] = {"x",   "weight",    "eps",   "weight_offset", "cast_x_before_out_mul",
                                             "out", "out_dtype", "stream"};
const fn_signature fn_rms_norm_signature = {"rms_norm", rms_norm_names, N_COUNT, 3, 1, FN_SIGNATURE_RMS_NORM};

PyObject *fn_py_rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords) {
    PyObject *value[N_COUNT], *results[OPERANDS - INPUTS]; /* borrowed; owned */
    fn_state *state = fn_state_of(module);
    const fn_signature *signature = &fn_rms_norm_signature;
    if (fn_parse(state, signature, args, nargs, keywords, value) < 0) return NULL;
    norm_call norm = {
        .call =
            {.state = state,
             .operation = &operation,
             .function = signature->function,
             .names = operand_names,
             .given =
                 {[X] = value[N_X], [WEIGHT] = fn_unless_none(value[N_WEIGHT]), [OUT] = fn_unless_none(value[N_OUT])},
             .out_dtype = fn_unless_none(value[N_OUT_DTYPE]),
             .stream = fn_unless_none(value[N_STREAM])},
        .args = {.eps = 1e-6}};
    fn_call *call = &norm.call;
    call->allocate[OUT] = !call->given[OUT];
    if (fn_parse_double(state, signature->function, "eps", value[N_EPS], &norm.args.eps) < 0 ||
        fn_parse_double(state, signature->function, "weight_offset", value[N_OFFSET], &norm.args.weight_offset) < 0 ||
        fn_parse_flag(signature->function, "cast_x_before_out_mul", value[N_CAST], &norm.args.cast_x_before_out_mul) <
            0 ||
        fn_run_call(call, results) < 0)
        return NULL;
    return results[0];
}

/* ---- fused_add_rmsnorm ------------------------------------------------------------------------------------------------ */

enum {
    A_X,
    A_RESIDUAL,
    A_WEIGHT,
    A_EPS,
    A_POST,
    A_OFFSET,
    A_CAST,
    A_ROUND,
    A_OUT,
    A_RESIDUAL_OUT,
    A_OUT_DTYPE,
    A_INPLACE,
    A_STREAM,
    A_COUNT
};
static const char *const fused_add_names[] = {"x",
                                              "residual",
                                              "weight",
                                              "eps",
                                              "post_residual_addition",
                                              "weight_offset",
                                              "cast_x_before_out_mul",
                                              "round_sum",
                                              "out",
                                              "residual_out",
                                              "out_dtype",
                                              "inplace",
                                              "stream"};
const fn_signature fn_fused_add_rmsnorm_signature = {"fused_add_rmsnorm",           fused_add_names, A_COUNT, 4, 2,
                                                     FN_SIGNATURE_FUSED_ADD_RMSNORM};

static int parse_round_sum(const char *function, PyObject *object, fn_round_sum *round_sum) {
    *round_sum = FN_SUM_FP32;
    if (!object || object == Py_False) return 0;
    if (object == Py_True) {
        *round_sum = FN_SUM_ROUNDED;
        return 0;
    }
    if (PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, "after_variance") == 0) {
        *round_sum = FN_SUM_ROUNDED_AFTER_VARIANCE;
        return 0;
    }
    PyErr_Format(PyUnicode_Check(object) ? PyExc_ValueError : PyExc_TypeError,
                 "%s: round_sum is %R: it must be False, True or \"after_variance\"", function, object);
    return -1;
}

PyObject *fn_py_fused_add_rmsnorm(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords) {
    PyObject *value[A_COUNT], *results[OPERANDS - INPUTS]; /* borrowed; owned */
    fn_state *state = fn_state_of(module);
    const fn_signature *signature = &fn_fused_add_rmsnorm_signature;
    if (fn_parse(state, signature, args, nargs, keywords, value) < 0) return NULL;
    norm_call norm = {.call = {.state = state,
                               .operation = &operation,
                               .function = signature->function,
                               .names = operand_names,
                               .given = {[X] = value[A_X],
                                         [RESIDUAL] = value[A_RESIDUAL],
                                         [POST] = fn_unless_none(value[A_POST]),
                                         [WEIGHT] = fn_unless_none(value[A_WEIGHT]),
                                         [OUT] = fn_unless_none(value[A_OUT]),
                                         [RESIDUAL_OUT] = fn_unless_none(value[A_RESIDUAL_OUT])},
                               .out_dtype = fn_unless_none(value[A_OUT_DTYPE]),
                               .stream = fn_unless_none(value[A_STREAM])},
                      .args = {.eps = 1e-6}};
    fn_call *call = &norm.call;
    bool inplace = true;
    if (fn_parse_double(state, signature->function, "eps", value[A_EPS], &norm.args.eps) < 0 ||
        fn_parse_double(state, signature->function, "weight_offset", value[A_OFFSET], &norm.args.weight_offset) < 0 ||
        fn_parse_flag(signature->function, "cast_x_before_out_mul", value[A_CAST], &norm.args.cast_x_before_out_mul) <
            0 ||
        parse_round_sum(signature->function, value[A_ROUND], &norm.args.round_sum) < 0 ||
        fn_parse_flag(signature->function, "inplace", value[A_INPLACE], &inplace) < 0)
        return NULL;
    if (inplace) {
        if (!call->given[OUT]) call->given[OUT] = call->given[X];
        if (!call->given[RESIDUAL_OUT]) call->given[RESIDUAL_OUT] = call->given[RESIDUAL];
    }
    call->allocate[OUT] = !call->given[OUT];
    call->allocate[RESIDUAL_OUT] = !call->given[RESIDUAL_OUT];
    if (fn_run_call(call, results) < 0) return NULL;
    PyObject *pair = PyTuple_New(2);
    if (!pair) {
        Py_DECREF(results[0]);
        Py_DECREF(results[1]);
        return NULL;
    }
    PyTuple_SET_ITEM(pair, 0, results[0]);
    PyTuple_SET_ITEM(pair, 1, results[1]);
    return pair;
}

/* ---- rms_norm_batch_invariant ------------------------------------------------------------------------------------------- */

enum { B_INPUT, B_SHAPE, B_WEIGHT, B_EPS, B_OUT, B_STREAM, B_COUNT };
static const char *const batch_invariant_operand_names[OPERANDS] = {[X] = "input", [WEIGHT] = "weight", [OUT] = "out"};
static const char *const batch_invariant_names[] = {"input", "normalized_shape", "weight", "eps", "out", "stream"};
const fn_signature fn_rms_norm_batch_invariant_signature = {
    "rms_norm_batch_invariant", batch_invariant_names, B_COUNT, 4, 2, FN_SIGNATURE_RMS_NORM_BATCH_INVARIANT};

PyObject *fn_py_rms_norm_batch_invariant(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                         PyObject *keywords) {
    PyObject *value[B_COUNT], *results[OPERANDS - INPUTS]; /* borrowed; owned */
    fn_state *state = fn_state_of(module);
    const fn_signature *signature = &fn_rms_norm_batch_invariant_signature;
    if (fn_parse(state, signature, args, nargs, keywords, value) < 0) return NULL;
    PyObject *eps = fn_unless_none(value[B_EPS]); /* borrowed */
    norm_call norm = {.call = {.state = state,
                               .operation = &operation,
                               .function = signature->function,
                               .names = batch_invariant_operand_names,
                               .given = {[X] = value[B_INPUT],
                                         [WEIGHT] = fn_unless_none(value[B_WEIGHT]),
                                         [OUT] = fn_unless_none(value[B_OUT])},
                               .stream = fn_unless_none(value[B_STREAM])},
                      .normalized_shape = value[B_SHAPE],
                      .eps_of_dtype = !eps};
    fn_call *call = &norm.call;
    call->allocate[OUT] = !call->given[OUT];
    if (fn_parse_double(state, signature->function, "eps", eps, &norm.args.eps) < 0 || fn_run_call(call, results) < 0)
        return NULL;
    return results[0];
}
