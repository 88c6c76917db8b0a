/* norms.c: the three norm functions: their arguments become a fn_norm_call, which call.c runs. */
#include "binding.h"

enum {
    X = FN_ARG_X,
    RESIDUAL = FN_ARG_RESIDUAL,
    POST = FN_ARG_POST,
    WEIGHT = FN_ARG_WEIGHT,
    OUT = FN_ARG_OUT,
    RESIDUAL_OUT = FN_ARG_RESIDUAL_OUT,
    OPERANDS = FN_ARGS
};

static PyObject *unless_none(PyObject *object) { return object == Py_None ? NULL : object; }

/* ---- rms_norm --------------------------------------------------------------------------------------------------------- */

enum { N_X, N_WEIGHT, N_EPS, N_OFFSET, N_CAST, N_OUT, N_OUT_DTYPE, N_STREAM, N_COUNT };
static const char *const rms_norm_names[] = {"x",   "weight",    "eps",   "weight_offset", "cast_x_before_out_mul",
                                             "out", "out_dtype", "stream"};
static const fn_signature rms_norm_signature = {"rms_norm", rms_norm_names, N_COUNT, 3, 1, FN_SIGNATURE_RMS_NORM};

PyObject *fn_py_rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords) {
    PyObject *value[N_COUNT], *results[OPERANDS]; /* borrowed; owned */
    fn_state *state = fn_state_of(module);
    const fn_signature *signature = &rms_norm_signature;
    if (fn_parse(state, signature, args, nargs, keywords, value) < 0) return NULL;
    fn_norm_call call = {
        .state = state,
        .args = {.function = signature->function, .eps = 1e-6},
        .x_name = "x",
        .given = {[X] = value[N_X], [WEIGHT] = unless_none(value[N_WEIGHT]), [OUT] = unless_none(value[N_OUT])},
        .out_dtype = unless_none(value[N_OUT_DTYPE]),
        .stream = unless_none(value[N_STREAM])};
    call.allocate[OUT] = !call.given[OUT];
    if (fn_parse_double(state, signature->function, "eps", value[N_EPS], &call.args.eps) < 0 ||
        fn_parse_double(state, signature->function, "weight_offset", value[N_OFFSET], &call.args.weight_offset) < 0 ||
        fn_parse_flag(signature->function, "cast_x_before_out_mul", value[N_CAST], &call.args.cast_x_before_out_mul) <
            0 ||
        fn_call(&call, results) < 0)
        return NULL;
    return results[OUT];
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
static const fn_signature fused_add_rmsnorm_signature = {"fused_add_rmsnorm",           fused_add_names, A_COUNT, 4, 2,
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
    PyObject *value[A_COUNT], *results[OPERANDS]; /* borrowed; owned */
    fn_state *state = fn_state_of(module);
    const fn_signature *signature = &fused_add_rmsnorm_signature;
    if (fn_parse(state, signature, args, nargs, keywords, value) < 0) return NULL;
    fn_norm_call call = {.state = state,
                         .args = {.function = signature->function, .eps = 1e-6},
                         .x_name = "x",
                         .given = {[X] = value[A_X],
                                   [RESIDUAL] = value[A_RESIDUAL],
                                   [POST] = unless_none(value[A_POST]),
                                   [WEIGHT] = unless_none(value[A_WEIGHT]),
                                   [OUT] = unless_none(value[A_OUT]),
                                   [RESIDUAL_OUT] = unless_none(value[A_RESIDUAL_OUT])},
                         .out_dtype = unless_none(value[A_OUT_DTYPE]),
                         .stream = unless_none(value[A_STREAM])};
    bool inplace = true;
    if (fn_parse_double(state, signature->function, "eps", value[A_EPS], &call.args.eps) < 0 ||
        fn_parse_double(state, signature->function, "weight_offset", value[A_OFFSET], &call.args.weight_offset) < 0 ||
        fn_parse_flag(signature->function, "cast_x_before_out_mul", value[A_CAST], &call.args.cast_x_before_out_mul) <
            0 ||
        parse_round_sum(signature->function, value[A_ROUND], &call.args.round_sum) < 0 ||
        fn_parse_flag(signature->function, "inplace", value[A_INPLACE], &inplace) < 0)
        return NULL;
    if (inplace) {
        if (!call.given[OUT]) call.given[OUT] = call.given[X];
        if (!call.given[RESIDUAL_OUT]) call.given[RESIDUAL_OUT] = call.given[RESIDUAL];
    }
    call.allocate[OUT] = !call.given[OUT];
    call.allocate[RESIDUAL_OUT] = !call.given[RESIDUAL_OUT];
    if (fn_call(&call, results) < 0) return NULL;
    PyObject *pair = PyTuple_New(2);
    if (!pair) {
        Py_DECREF(results[OUT]);
        Py_DECREF(results[RESIDUAL_OUT]);
        return NULL;
    }
    PyTuple_SET_ITEM(pair, 0, results[OUT]);
    PyTuple_SET_ITEM(pair, 1, results[RESIDUAL_OUT]);
    return pair;
}

/* ---- rms_norm_batch_invariant ------------------------------------------------------------------------------------------- */

enum { B_INPUT, B_SHAPE, B_WEIGHT, B_EPS, B_OUT, B_STREAM, B_COUNT };
static const char *const batch_invariant_names[] = {"input", "normalized_shape", "weight", "eps", "out", "stream"};
static const fn_signature rms_norm_batch_invariant_signature = {
    "rms_norm_batch_invariant", batch_invariant_names, B_COUNT, 4, 2, FN_SIGNATURE_RMS_NORM_BATCH_INVARIANT};

PyObject *fn_py_rms_norm_batch_invariant(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                         PyObject *keywords) {
    PyObject *value[B_COUNT], *results[OPERANDS]; /* borrowed; owned */
    fn_state *state = fn_state_of(module);
    const fn_signature *signature = &rms_norm_batch_invariant_signature;
    if (fn_parse(state, signature, args, nargs, keywords, value) < 0) return NULL;
    PyObject *eps = unless_none(value[B_EPS]); /* borrowed */
    fn_norm_call call = {
        .state = state,
        .args = {.function = signature->function},
        .x_name = "input",
        .given = {[X] = value[B_INPUT], [WEIGHT] = unless_none(value[B_WEIGHT]), [OUT] = unless_none(value[B_OUT])},
        .stream = unless_none(value[B_STREAM]),
        .normalized_shape = value[B_SHAPE],
        .eps_of_dtype = !eps};
    call.allocate[OUT] = !call.given[OUT];
    if (fn_parse_double(state, signature->function, "eps", eps, &call.args.eps) < 0 || fn_call(&call, results) < 0)
        return NULL;
    return results[OUT];
}

const fn_signature *const fn_signatures[] = {
    [FN_SIGNATURE_RMS_NORM] = &rms_norm_signature,
    [FN_SIGNATURE_FUSED_ADD_RMSNORM] = &fused_add_rmsnorm_signature,
    [FN_SIGNATURE_RMS_NORM_BATCH_INVARIANT] = &rms_norm_batch_invariant_signature,
    [FN_SIGNATURE_WARMUP] = &fn_warmup_signature,
};
_Static_assert(sizeof fn_signatures / sizeof fn_signatures[0] == FN_SIGNATURES, "every function has a row");
