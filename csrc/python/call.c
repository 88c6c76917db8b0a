/* call.c: one call. Its arrays become one fn_norm_args, fn_norm does the rest.
 *
 * The order matters, because converting a number or calling a foreign __dlpack__ may run any Python code: first all that
 * may run such code, then (nothing of Python in between) the loan of native memory, the checks and the work.
 */
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

/* On the CPU, from here on other Python threads may run meanwhile: about 5 us of work. On CUDA work is only queued. */
#define ELEMENTS_WITHOUT_GIL 32768.0

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

static int open_array(const fn_norm_call *call, norm_arrays *arrays, int operand, PyObject *object) {
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

/* The call's stream: that of stream=, else of the first array that has one, else the legacy default stream. `imported`:
 * native memory has been reached already. */
static int choose_stream(fn_norm_call *call, norm_arrays *arrays, bool imported) {
    for (int i = 0; i < arrays->count; i++) {
        fn_array *array = arrays->distinct[i];
        if (call->work.known && !imported) break;
        if (!imported && fn_array_import_native(call->state, call->args.function, array, false) < 0) return -1;
        if (fn_array_stream(array) < 0) return -1;
        if (call->work.known || !array->has_stream) continue;
        call->work.handle = array->stream;
        call->work.known = true;
    }
    call->work.known = true;
    return 0;
}

/* The arrays from number `first` on that are reached by running Python code. */
static int import_foreign(fn_norm_call *call, norm_arrays *arrays, int first) {
    const char *function = call->args.function;
    for (int i = first; i < arrays->count; i++)
        if (fn_array_reach(call->state, function, arrays->distinct[i]) < 0) return -1;
    for (int i = first; i < arrays->count; i++) {
        fn_array *array = arrays->distinct[i];
        if (!fn_exports_capsules(array->through.door)) continue;
        const bool on_cuda = array->view.device_type == FN_CUDA;
        if (on_cuda && choose_stream(call, arrays, false) < 0) return -1;
        if (fn_import_capsule(call->state, function, array, on_cuda ? &call->work : NULL) < 0) return -1;
    }
    return 0;
}

static int open_given(fn_norm_call *call, norm_arrays *arrays) {
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
    return arrays->doors & FN_DOORS_OF_PYTHON ? import_foreign(call, arrays, 0) : 0;
}

static int allocate_result(fn_norm_call *call, norm_arrays *arrays, int operand, int like, fn_dtype dtype) {
    fn_array *array = arrays->array[like];
    if (call->work.given && fn_array_stream(array) < 0) return -1;
    PyObject *object = fn_array_allocate(call->state, call->args.function, array, dtype, &call->work);
    if (!object) return -1;
    arrays->allocated[operand] = object;
    if (open_array(call, arrays, operand, object) < 0) return -1;
    return fn_runs_python(arrays->array[operand]->through.door) ? import_foreign(call, arrays, arrays->count - 1) : 0;
}

static int allocate_results(fn_norm_call *call, norm_arrays *arrays) {
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

static int import_native(const fn_norm_call *call, norm_arrays *arrays, bool own) {
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

static int check_normalized_shape(const fn_norm_call *call, const fn_tensor *x) {
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

/* ---- the work --------------------------------------------------------------------------------------------------------- */

static void fill_arguments(fn_norm_call *call, const norm_arrays *arrays) {
    const fn_tensor **const slots[OPERANDS] = {
        [X] = &call->args.x,           [RESIDUAL] = &call->args.residual, [POST] = &call->args.post_residual_addition,
        [WEIGHT] = &call->args.weight, [OUT] = &call->args.out,           [RESIDUAL_OUT] = &call->args.residual_out};
    for (int operand = X; operand < OPERANDS; operand++)
        *slots[operand] = arrays->array[operand] ? &arrays->array[operand]->view : NULL;
    if (call->eps_of_dtype) call->args.eps = fn_dtypes[call->args.x->dtype].eps;
}

static int compute(const fn_norm_call *call) {
    const fn_status status = fn_norm(&call->args);
    return status == FN_OK ? 0 : fn_raise(status);
}

static int compute_without_gil(const fn_norm_call *call, norm_arrays *arrays) {
    fn_status status;
    for (int i = 0; i < arrays->count; i++) Py_INCREF(arrays->distinct[i]->object);
    Py_BEGIN_ALLOW_THREADS status = fn_norm(&call->args);
    Py_END_ALLOW_THREADS if (status != FN_OK) fn_raise(status);
    for (int i = 0; i < arrays->count; i++) Py_DECREF(arrays->distinct[i]->object);
    return status == FN_OK ? 0 : -1;
}

static int run_on_cpu(fn_norm_call *call, norm_arrays *arrays) {
    const bool own = elements_of(&arrays->array[X]->view) >= ELEMENTS_WITHOUT_GIL;
    if (own && import_native(call, arrays, true) < 0) return -1;
    if (call->stream) {
        PyErr_Format(PyExc_ValueError, "%s: stream is %R, but %s is on the CPU: streams are for CUDA arrays",
                     call->args.function, call->stream, call->x_name);
        return -1;
    }
    fill_arguments(call, arrays);
    return own ? compute_without_gil(call, arrays) : compute(call);
}

/* ---- the work on CUDA --------------------------------------------------------------------------------------------------- */

/* Managed memory, and none at all, is on the device of the others. */
static void move_to_common_device(norm_arrays *arrays) {
    const fn_array *anchor = arrays->array[X];
    for (int i = 0; i < arrays->count && anchor->any_device; i++)
        if (arrays->distinct[i]->view.device_type == FN_CUDA && !arrays->distinct[i]->any_device)
            anchor = arrays->distinct[i];
    for (int i = 0; i < arrays->count; i++)
        if (arrays->distinct[i]->any_device) arrays->distinct[i]->view.device_id = anchor->view.device_id;
}

/* Results that came by a capsule go back as one, behind the work that fills them. */
static int adopt_results(const fn_norm_call *call, norm_arrays *arrays) {
    for (int operand = OUT; operand < OPERANDS; operand++) {
        fn_array *array = arrays->array[operand];
        if (!arrays->allocated[operand] || !fn_exports_capsules(array->through.door)) continue;
        if (elements_of(&array->view) == 0) continue;
        PyObject *buffer = fn_buffer_adopt(call->state, array, call->work.handle);
        if (!buffer) return -1;
        Py_SETREF(arrays->allocated[operand], buffer);
    }
    return 0;
}

/* Arrays of several frameworks, arrays without a stream of their own, or stream=. */
static int run_on_chosen_stream(fn_norm_call *call, norm_arrays *arrays) {
    fn_array *const *distinct = arrays->distinct;
    const int count = arrays->count;
    move_to_common_device(arrays);
    if (choose_stream(call, arrays, true) < 0) return -1;
    const int32_t device = arrays->array[X]->view.device_id;
    call->args.stream = call->work.handle;
    if (fn_order_before_work(&call->work, distinct, count, device) < 0 || compute(call) < 0) return -1;
    if (adopt_results(call, arrays) < 0) return -1;
    if (fn_order_after_work(&call->work, distinct, count, device) < 0) return -1;
    if (fn_pending_keep(&call->work, distinct, count, device) < 0) return -1;
    return call->work.given ? fn_record_torch(call->state, &call->work, distinct, count) : 0;
}

static int run_on_cuda(fn_norm_call *call, norm_arrays *arrays) {
    fn_array *x = arrays->array[X];
    fill_arguments(call, arrays);
    call->args.weights_are_constant = call->args.weight && fn_weights_promised(call->state);
    if (arrays->doors != 1u << FN_DOOR_TORCH || call->work.given) return run_on_chosen_stream(call, arrays);
    if (fn_array_stream(x) < 0) return -1;
    call->args.stream = x->stream;
    return compute(call);
}

/* ---- the call --------------------------------------------------------------------------------------------------------- */

static int run(fn_norm_call *call, norm_arrays *arrays) {
    fn_state *state = call->state;
    const char *function = call->args.function;
    if (fn_pending_count) fn_pending_drain();
    if (call->stream && fn_parse_stream(function, call->stream, &call->work) < 0) return -1;
    if (open_given(call, arrays) < 0 || allocate_results(call, arrays) < 0) return -1;
    if (has_door(arrays, FN_DOOR_TORCH) && fn_torch_check(state, function, arrays->distinct, arrays->count) < 0)
        return -1;
    if (call->normalized_shape) {
        if (fn_array_import_native(state, function, arrays->array[X], false) < 0) return -1;
        if (check_normalized_shape(call, &arrays->array[X]->view) < 0) return -1;
    }
    if (import_native(call, arrays, false) < 0) return -1;
    const bool on_cuda = arrays->array[X]->view.device_type == FN_CUDA;
    if ((on_cuda ? run_on_cuda(call, arrays) : run_on_cpu(call, arrays)) < 0) return -1;

    if (!has_door(arrays, FN_DOOR_TORCH)) return 0;
    fn_array *written[2];
    int count = 0;
    for (int operand = OUT; operand < OPERANDS; operand++)
        if (call->given[operand]) written[count++] = arrays->array[operand];
    return fn_torch_mark_written(state, written, count);
}

int fn_call(fn_norm_call *call, PyObject *results[OPERANDS]) {
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
