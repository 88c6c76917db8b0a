/* norms.c: the three norm functions. Arguments become arrays, arrays become one fn_norm_args, fn_norm does the rest.
 *
 * The order matters, because converting a number or calling a foreign __dlpack__ may run any Python code: first all that
 * may run such code, then (nothing of Python in between) the loan of native memory, the checks and the work.
 */
#include "binding.h"

enum { X, RESIDUAL, POST, WEIGHT, OUT, RESIDUAL_OUT, OPERANDS };

/* From here on other Python threads may run meanwhile: about 5 us of work. */
#define ELEMENTS_WITHOUT_GIL 32768.0

typedef struct {
    fn_state *state;
    fn_norm_args args;          /* its function, numbers and flags; the arrays are filled in here */
    const char *x_name;         /* "x", or "input" */
    PyObject *given[OPERANDS];  /* borrowed; NULL: not given */
    bool allocate[OPERANDS];    /* OUT, RESIDUAL_OUT: make a result */
    PyObject *out_dtype;        /* borrowed; NULL: not given */
    PyObject *stream;           /* borrowed; NULL: not given */
    PyObject *normalized_shape; /* borrowed; NULL: rms_norm has none */
    bool eps_of_dtype;          /* eps = finfo(input.dtype).eps */
} norm_call;

typedef struct {
    fn_array storage[OPERANDS];
    fn_array *array[OPERANDS];    /* NULL: absent. An output that is its own input is that input's array */
    fn_array *distinct[OPERANDS]; /* each of them once */
    int count;
    unsigned doors;                /* the set of their doors, a bit each */
    PyObject *allocated[OPERANDS]; /* owned */
} norm_arrays;

static bool has_door(const norm_arrays *arrays, fn_door door) { return arrays->doors >> door & 1; }

/* ---- arrays ----------------------------------------------------------------------------------------------------------- */

static int open_array(const norm_call *call, norm_arrays *arrays, int operand, PyObject *object) {
    static const char *const names[OPERANDS] = {NULL,     "residual", "post_residual_addition",
                                                "weight", "out",      "residual_out"};
    fn_array *array = &arrays->storage[operand];
    const char *name = operand == X ? call->x_name : names[operand];
    if (fn_array_open(call->state, call->args.function, name, object, array) < 0) return -1;
    arrays->array[operand] = array;
    arrays->distinct[arrays->count++] = array;
    arrays->doors |= 1u << array->through.door;
    return 0;
}

static int open_given(const norm_call *call, norm_arrays *arrays) {
    for (int operand = X; operand < OPERANDS; operand++) {
        arrays->array[operand] = NULL;
        arrays->allocated[operand] = NULL;
    }
    for (int operand = X; operand < OPERANDS; operand++) {
        PyObject *object = call->given[operand]; /* borrowed */
        if (!object) continue;
        const int own_input = operand == OUT ? X : operand == RESIDUAL_OUT ? RESIDUAL : operand;
        if (own_input != operand && object == call->given[own_input]) arrays->array[operand] = arrays->array[own_input];
        else if (open_array(call, arrays, operand, object) < 0) return -1;
        const fn_array *array = arrays->array[operand];
        if (own_input != operand && array->through.door == FN_DOOR_JAX) {
            PyErr_Format(PyExc_BufferError, "%s: %s is a jax array, which is immutable: an output must be writable%s",
                         call->args.function, array->view.name,
                         array->view.name == arrays->storage[own_input].view.name ? " (inplace=False makes new arrays)"
                                                                                  : "");
            return -1;
        }
    }
    for (int i = 0; i < arrays->count && (has_door(arrays, FN_DOOR_DLPACK) || has_door(arrays, FN_DOOR_JAX)); i++)
        if (fn_array_import_foreign(call->state, call->args.function, arrays->distinct[i]) < 0) return -1;
    return 0;
}

static int allocate_result(const norm_call *call, norm_arrays *arrays, int operand, int like, fn_dtype dtype) {
    PyObject *object = fn_array_allocate(call->state, call->args.function, arrays->array[like], dtype);
    if (!object) return -1;
    arrays->allocated[operand] = object;
    if (open_array(call, arrays, operand, object) < 0) return -1;
    return fn_array_import_foreign(call->state, call->args.function, arrays->array[operand]);
}

static int allocate_results(const norm_call *call, norm_arrays *arrays) {
    const char *function = call->args.function;
    const fn_array *x = arrays->array[X];
    fn_dtype dtype = FN_FLOAT32;
    if (call->out_dtype && fn_parse_dtype(call->state, function, "out_dtype", call->out_dtype, &dtype) < 0) return -1;
    if (!call->allocate[OUT] && !call->allocate[RESIDUAL_OUT] && !call->out_dtype) return 0;

    for (int operand = X; operand <= RESIDUAL; operand++)
        if (arrays->array[operand] && fn_array_import_native(call->state, function, arrays->array[operand], false) < 0)
            return -1;
    if (!call->out_dtype) dtype = x->view.dtype;
    if (call->allocate[OUT] && allocate_result(call, arrays, OUT, X, dtype) < 0) return -1;
    if (call->allocate[RESIDUAL_OUT] &&
        allocate_result(call, arrays, RESIDUAL_OUT, RESIDUAL, arrays->array[RESIDUAL]->view.dtype) < 0)
        return -1;
    if (call->allocate[OUT] || !call->out_dtype) return 0;

    fn_array *out = arrays->array[OUT];
    if (out != x && fn_array_import_native(call->state, function, out, false) < 0) return -1;
    if (out->view.dtype == dtype) return 0;
    PyErr_Format(PyExc_ValueError, "%s: out_dtype is %s, but %s has dtype %s: they must agree%s", function,
                 fn_dtypes[dtype].name, out == x ? "out is x itself, which" : "out", fn_dtypes[out->view.dtype].name,
                 out == x ? " (inplace=False makes a new array)" : "");
    return -1;
}

static int import_native(const norm_call *call, norm_arrays *arrays, bool own) {
    for (int i = 0; i < arrays->count; i++)
        if (fn_array_import_native(call->state, call->args.function, arrays->distinct[i], own) < 0) return -1;
    for (int operand = OUT; operand < OPERANDS; operand++)
        if (arrays->array[operand] && arrays->array[operand]->copied) {
            PyErr_Format(PyExc_BufferError, "%s: %s lends a copy of its memory: an output must lend its own",
                         call->args.function, arrays->array[operand]->view.name);
            return -1;
        }
    return 0;
}

static double elements_of(const fn_tensor *view) {
    double elements = 1;
    for (int32_t i = 0; i < view->ndim; i++) elements *= (double)view->shape[i];
    return elements;
}

/* ---- rms_norm_batch_invariant's own arguments ----------------------------------------------------------------------- */

static int check_normalized_shape(const norm_call *call, const fn_tensor *x) {
    PyObject *shape = call->normalized_shape, *item = NULL; /* borrowed */
    int overflow = 0;
    if (PyTuple_Check(shape)) item = PyTuple_GET_SIZE(shape) == 1 ? PyTuple_GET_ITEM(shape, 0) : NULL;
    else if (PyList_Check(shape)) item = PyList_GET_SIZE(shape) == 1 ? PyList_GET_ITEM(shape, 0) : NULL;
    else item = shape;
    if (item && (PyBool_Check(item) || !PyIndex_Check(item))) {
        PyErr_Format(PyExc_TypeError, "%s: normalized_shape is %R: it must be an integer, or a list or tuple of one",
                     call->args.function, shape);
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
        call->args.function, shape, (long long)x->shape[x->ndim - 1]);
    return -1;
}

/* ---- the call --------------------------------------------------------------------------------------------------------- */

static int compute(norm_call *call, norm_arrays *arrays, bool own) {
    const fn_tensor **const slots[OPERANDS] = {
        [X] = &call->args.x,           [RESIDUAL] = &call->args.residual, [POST] = &call->args.post_residual_addition,
        [WEIGHT] = &call->args.weight, [OUT] = &call->args.out,           [RESIDUAL_OUT] = &call->args.residual_out};
    for (int operand = X; operand < OPERANDS; operand++)
        *slots[operand] = arrays->array[operand] ? &arrays->array[operand]->view : NULL;
    if (call->eps_of_dtype) call->args.eps = fn_dtypes[call->args.x->dtype].eps;

    fn_status status;
    if (own) {
        for (int i = 0; i < arrays->count; i++) Py_INCREF(arrays->distinct[i]->object);
        Py_BEGIN_ALLOW_THREADS status = fn_norm(&call->args);
        Py_END_ALLOW_THREADS if (status != FN_OK) fn_raise(status);
        for (int i = 0; i < arrays->count; i++) Py_DECREF(arrays->distinct[i]->object);
    } else {
        status = fn_norm(&call->args);
        if (status != FN_OK) fn_raise(status);
    }
    return status == FN_OK ? 0 : -1;
}

static int run(norm_call *call, norm_arrays *arrays) {
    fn_state *state = call->state;
    const char *function = call->args.function;
    if (open_given(call, arrays) < 0 || allocate_results(call, arrays) < 0) return -1;
    if (has_door(arrays, FN_DOOR_TORCH) && fn_torch_check(state, function, arrays->distinct, arrays->count) < 0)
        return -1;
    if (call->normalized_shape) {
        if (fn_array_import_native(state, function, arrays->array[X], false) < 0) return -1;
        if (check_normalized_shape(call, &arrays->array[X]->view) < 0) return -1;
    }
    if (import_native(call, arrays, false) < 0) return -1;
    const bool own = elements_of(&arrays->array[X]->view) >= ELEMENTS_WITHOUT_GIL;
    if (own && import_native(call, arrays, true) < 0) return -1;
    if (call->stream) {
        PyErr_Format(PyExc_ValueError, "%s: stream is %R, but %s is on the CPU: streams are for CUDA arrays", function,
                     call->stream, call->x_name);
        return -1;
    }
    if (compute(call, arrays, own) < 0) return -1;

    if (!has_door(arrays, FN_DOOR_TORCH)) return 0;
    fn_array *written[2];
    int count = 0;
    for (int operand = OUT; operand < OPERANDS; operand++)
        if (call->given[operand]) written[count++] = arrays->array[operand];
    return fn_torch_mark_written(state, written, count);
}

/* The results in `results`, new references. */
static int norm(norm_call *call, PyObject *results[OPERANDS]) {
    norm_arrays arrays;
    arrays.count = 0;
    arrays.doors = 0;
    int status = run(call, &arrays);
    for (int i = 0; i < arrays.count; i++) fn_array_close(arrays.distinct[i]);
    for (int operand = OUT; operand < OPERANDS; operand++) {
        PyObject *allocated = arrays.count ? arrays.allocated[operand] : NULL; /* owned */
        results[operand] = NULL;
        if (!allocated) {
            if (call->given[operand]) results[operand] = Py_NewRef(call->given[operand]);
        } else if (status < 0) {
            Py_DECREF(allocated);
        } else {
            results[operand] = fn_array_deliver(call->state, arrays.array[operand == OUT ? X : RESIDUAL], allocated);
            if (!results[operand]) status = -1;
        }
    }
    if (status < 0)
        for (int operand = OUT; operand < OPERANDS; operand++) Py_CLEAR(results[operand]);
    return status;
}

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
    norm_call call = {
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
        norm(&call, results) < 0)
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
    norm_call call = {.state = state,
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
    if (norm(&call, results) < 0) return NULL;
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
    norm_call call = {
        .state = state,
        .args = {.function = signature->function},
        .x_name = "input",
        .given = {[X] = value[B_INPUT], [WEIGHT] = unless_none(value[B_WEIGHT]), [OUT] = unless_none(value[B_OUT])},
        .stream = unless_none(value[B_STREAM]),
        .normalized_shape = value[B_SHAPE],
        .eps_of_dtype = !eps};
    call.allocate[OUT] = !call.given[OUT];
    if (fn_parse_double(state, signature->function, "eps", eps, &call.args.eps) < 0 || norm(&call, results) < 0)
        return NULL;
    return results[OUT];
}

const fn_signature *const fn_signatures[] = {
    [FN_SIGNATURE_RMS_NORM] = &rms_norm_signature,
    [FN_SIGNATURE_FUSED_ADD_RMSNORM] = &fused_add_rmsnorm_signature,
    [FN_SIGNATURE_RMS_NORM_BATCH_INVARIANT] = &rms_norm_batch_invariant_signature,
};
_Static_assert(sizeof fn_signatures / sizeof fn_signatures[0] == FN_SIGNATURES, "every function has a row");
