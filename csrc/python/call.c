/* call.c: one call of any operation: from objects to arrays, which the operation's `compute` gets, and back.
 *
 * The order matters, because converting a number or calling a foreign __dlpack__ may run any Python code: first all that
 * may run such code, then (nothing of Python in between) the loan of native memory, the checks and the work.
 */
#include "binding.h"

/* On the CPU, from here on other Python threads may run meanwhile: about 5 us of work. On CUDA work is only queued. */
#define EFFORT_WITHOUT_GIL 32768.0

typedef struct {
    fn_array storage[FN_MOST_OPERANDS];
    fn_array *array[FN_MOST_OPERANDS];    /* NULL: absent. An output that is its own input is that input's array */
    fn_array *distinct[FN_MOST_OPERANDS]; /* each of them once */
    int count;
    unsigned doors;                        /* the set of their doors, a bit each */
    PyObject *allocated[FN_MOST_OPERANDS]; /* owned */
} call_arrays;

static bool has_door(const call_arrays *arrays, fn_door door) { return arrays->doors >> door & 1; }

/* ---- arrays ----------------------------------------------------------------------------------------------------------- */

static int open_array(const fn_call *call, call_arrays *arrays, int operand, PyObject *object) {
    fn_array *array = &arrays->storage[operand];
    if (fn_array_open(call->state, call->function, call->names[operand], object, array) < 0) return -1;
    arrays->array[operand] = array;
    arrays->distinct[arrays->count++] = array;
    arrays->doors |= 1u << array->through.door;
    return 0;
}

/* The call's stream: that of stream=, else of the first array that has one, else the legacy default stream. `imported`:
 * native memory has been reached already. */
static int choose_stream(fn_call *call, call_arrays *arrays, bool imported) {
    for (int i = 0; i < arrays->count; i++) {
        fn_array *array = arrays->distinct[i];
        if (call->work.known && !imported) break;
        if (!imported && fn_array_import_native(call->state, call->function, array, false) < 0) return -1;
        if (fn_array_stream(array) < 0) return -1;
        if (call->work.known || !array->has_stream) continue;
        call->work.handle = array->stream;
        call->work.known = true;
    }
    call->work.known = true;
    return 0;
}

/* The arrays from number `first` on that are reached by running Python code. */
static int import_foreign(fn_call *call, call_arrays *arrays, int first) {
    const char *function = call->function;
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

/* An output is either exactly its own input or an array by itself. */
static int open_given(fn_call *call, call_arrays *arrays) {
    const fn_call_kind *operation = call->operation;
    for (int operand = 0; operand < operation->operands; operand++) {
        arrays->array[operand] = NULL;
        arrays->allocated[operand] = NULL;
    }
    for (int operand = 0; operand < operation->operands; operand++) {
        PyObject *object = call->given[operand]; /* borrowed */
        if (!object) continue;
        const bool is_output = operand >= operation->inputs;
        const int own_input = is_output && operation->in_place ? operand - operation->inputs : operand;
        if (own_input != operand && object == call->given[own_input]) arrays->array[operand] = arrays->array[own_input];
        else if (open_array(call, arrays, operand, object) < 0) return -1;
        const fn_array *array = arrays->array[operand];
        if (is_output && array->through.door == FN_DOOR_JAX) {
            PyErr_Format(PyExc_BufferError, "%s: %s is a jax array, which is immutable: an output must be writable%s",
                         call->function, array->view.name,
                         array != &arrays->storage[operand] ? " (inplace=False makes new arrays)" : "");
            return -1;
        }
    }
    return arrays->doors & FN_DOORS_OF_PYTHON ? import_foreign(call, arrays, 0) : 0;
}

static int check_size(const fn_call *call, const fn_result *result) {
    int64_t elements = 1;
    bool overflow = false;
    for (int32_t i = 0; i < result->ndim; i++)
        overflow |= __builtin_mul_overflow(elements, result->shape[i], &elements);
    for (int32_t i = 0; i < result->ndim; i++)
        if (result->shape[i] == 0) return 0;
    if (!overflow && elements <= INT64_MAX / 8) return 0;
    PyErr_Format(PyExc_ValueError, "%s: the result would have more elements than memory could hold", call->function);
    return -1;
}

static int allocate_result(fn_call *call, call_arrays *arrays, int output, fn_dtype dtype) {
    const fn_call_kind *operation = call->operation;
    const int operand = operation->inputs + output;
    fn_array *like = arrays->array[output];
    fn_result result = {like->view.ndim, like->view.shape, dtype};
    int64_t room[FN_MAX_NDIM];
    if (operation->reshape && operation->reshape(call, arrays->array, &result, room) < 0) return -1;
    if (operation->reshape && check_size(call, &result) < 0) return -1;
    if (call->work.given && fn_array_stream(like) < 0) return -1;
    PyObject *object = fn_array_allocate(call->state, call->function, like, &result, &call->work);
    if (!object) return -1;
    arrays->allocated[operand] = object;
    if (open_array(call, arrays, operand, object) < 0) return -1;
    return fn_runs_python(arrays->array[operand]->through.door) ? import_foreign(call, arrays, arrays->count - 1) : 0;
}

static int allocate_results(fn_call *call, call_arrays *arrays) {
    const fn_call_kind *operation = call->operation;
    const int first = operation->inputs, outputs = operation->operands - first;
    bool wanted = call->out_dtype != NULL;
    for (int output = 0; output < outputs; output++) wanted |= call->allocate[first + output];
    fn_dtype dtype = FN_FLOAT32;
    if (call->out_dtype && fn_parse_dtype(call->state, call->function, "out_dtype", call->out_dtype, &dtype) < 0)
        return -1;
    if (!wanted) return 0;

    for (int operand = 0; operand < 2; operand++) /* the inputs that results take after */
        if (arrays->array[operand] &&
            fn_array_import_native(call->state, call->function, arrays->array[operand], false) < 0)
            return -1;
    for (int output = 0; output < outputs; output++) {
        if (!call->allocate[first + output]) continue;
        const bool by_name = output == 0 && call->out_dtype;
        if (allocate_result(call, arrays, output, by_name ? dtype : arrays->array[output]->view.dtype) < 0) return -1;
    }
    if (call->allocate[first] || !call->out_dtype) return 0;

    fn_array *out = arrays->array[first];
    const bool own = out == arrays->array[0];
    if (!own && fn_array_import_native(call->state, call->function, out, false) < 0) return -1;
    if (out->view.dtype == dtype) return 0;
    PyErr_Format(PyExc_ValueError, "%s: out_dtype is %s, but %s has dtype %s: they must agree%s", call->function,
                 fn_dtypes[dtype].name, own ? "out is x itself, which" : "out", fn_dtypes[out->view.dtype].name,
                 own ? " (inplace=False makes a new array)" : "");
    return -1;
}

static int import_native(const fn_call *call, call_arrays *arrays, bool own) {
    for (int i = 0; i < arrays->count; i++)
        if (fn_array_import_native(call->state, call->function, arrays->distinct[i], own) < 0) return -1;
    for (int operand = call->operation->inputs; operand < call->operation->operands; operand++)
        if (arrays->array[operand] && arrays->array[operand]->copied) {
            PyErr_Format(PyExc_BufferError, "%s: %s lends a copy of its memory: an output must lend its own",
                         call->function, arrays->array[operand]->view.name);
            return -1;
        }
    return 0;
}

double fn_elements_of(const fn_tensor *view) {
    double elements = 1;
    for (int32_t i = 0; i < view->ndim; i++) elements *= (double)view->shape[i];
    return elements;
}

/* ---- the work --------------------------------------------------------------------------------------------------------- */

static int compute(const fn_call *call, const call_arrays *arrays) {
    const fn_status status = call->operation->compute(call, arrays->array);
    return status == FN_OK ? 0 : fn_raise(status);
}

static int compute_without_gil(const fn_call *call, const call_arrays *arrays) {
    fn_status status;
    for (int i = 0; i < arrays->count; i++) Py_INCREF(arrays->distinct[i]->object);
    Py_BEGIN_ALLOW_THREADS status = call->operation->compute(call, arrays->array);
    Py_END_ALLOW_THREADS if (status != FN_OK) fn_raise(status);
    for (int i = 0; i < arrays->count; i++) Py_DECREF(arrays->distinct[i]->object);
    return status == FN_OK ? 0 : -1;
}

static int run_on_cpu(fn_call *call, call_arrays *arrays) {
    const bool own = call->operation->effort(call, arrays->array) >= EFFORT_WITHOUT_GIL;
    if (own && import_native(call, arrays, true) < 0) return -1;
    if (call->stream) {
        PyErr_Format(PyExc_ValueError, "%s: stream is %R, but %s is on the CPU: streams are for CUDA arrays",
                     call->function, call->stream, call->names[0]);
        return -1;
    }
    return own ? compute_without_gil(call, arrays) : compute(call, arrays);
}

/* ---- the work on CUDA --------------------------------------------------------------------------------------------------- */

/* Managed memory, and none at all, is on the device of the others. */
static void move_to_common_device(call_arrays *arrays) {
    const fn_array *anchor = arrays->array[0];
    for (int i = 0; i < arrays->count && anchor->any_device; i++)
        if (arrays->distinct[i]->view.device_type == FN_CUDA && !arrays->distinct[i]->any_device)
            anchor = arrays->distinct[i];
    for (int i = 0; i < arrays->count; i++)
        if (arrays->distinct[i]->any_device) arrays->distinct[i]->view.device_id = anchor->view.device_id;
}

/* Results that came by a capsule go back as one, behind the work that fills them. */
static int adopt_results(const fn_call *call, call_arrays *arrays) {
    for (int operand = call->operation->inputs; operand < call->operation->operands; operand++) {
        fn_array *array = arrays->array[operand];
        if (!arrays->allocated[operand] || !fn_exports_capsules(array->through.door)) continue;
        if (fn_elements_of(&array->view) == 0) continue;
        PyObject *buffer = fn_buffer_adopt(call->state, array, call->work.handle);
        if (!buffer) return -1;
        Py_SETREF(arrays->allocated[operand], buffer);
    }
    return 0;
}

/* Arrays of several frameworks, arrays without a stream of their own, or stream=. */
static int run_on_chosen_stream(fn_call *call, call_arrays *arrays) {
    fn_array *const *distinct = arrays->distinct;
    const int count = arrays->count;
    move_to_common_device(arrays);
    if (choose_stream(call, arrays, true) < 0) return -1;
    const int32_t device = arrays->array[0]->view.device_id;
    if (fn_order_before_work(&call->work, distinct, count, device) < 0 || compute(call, arrays) < 0) return -1;
    if (adopt_results(call, arrays) < 0) return -1;
    if (fn_order_after_work(&call->work, distinct, count, device) < 0) return -1;
    if (fn_pending_keep(&call->work, distinct, count, device) < 0) return -1;
    return call->work.given ? fn_record_torch(call->state, &call->work, distinct, count) : 0;
}

static int run_on_cuda(fn_call *call, call_arrays *arrays) {
    fn_array *first = arrays->array[0];
    call->weights_are_constant = fn_weights_promised(call->state);
    if (arrays->doors != 1u << FN_DOOR_TORCH || call->work.given) return run_on_chosen_stream(call, arrays);
    if (fn_array_stream(first) < 0) return -1;
    call->work.handle = first->stream;
    return compute(call, arrays);
}

/* ---- the call --------------------------------------------------------------------------------------------------------- */

static int run(fn_call *call, call_arrays *arrays) {
    fn_state *state = call->state;
    const fn_call_kind *operation = call->operation;
    if (fn_pending_count) fn_pending_drain();
    if (call->stream && fn_parse_stream(call->function, call->stream, &call->work) < 0) return -1;
    if (open_given(call, arrays) < 0 || allocate_results(call, arrays) < 0) return -1;
    if (has_door(arrays, FN_DOOR_TORCH) && fn_torch_check(state, call->function, arrays->distinct, arrays->count) < 0)
        return -1;
    if (operation->check && operation->check(call, arrays->array) < 0) return -1;
    if (import_native(call, arrays, false) < 0) return -1;
    const bool on_cuda = arrays->array[0]->view.device_type == FN_CUDA;
    if ((on_cuda ? run_on_cuda(call, arrays) : run_on_cpu(call, arrays)) < 0) return -1;

    if (!has_door(arrays, FN_DOOR_TORCH)) return 0;
    fn_array *written[2];
    int count = 0;
    for (int operand = operation->inputs; operand < operation->operands; operand++)
        if (call->given[operand]) written[count++] = arrays->array[operand];
    return fn_torch_mark_written(state, written, count);
}

int fn_run_call(fn_call *call, PyObject **results) {
    const int first = call->operation->inputs, outputs = call->operation->operands - first;
    call_arrays arrays;
    arrays.count = 0;
    arrays.doors = 0;
    int status = run(call, &arrays);
    for (int i = 0; i < arrays.count; i++) fn_array_close(arrays.distinct[i]);
    for (int output = 0; output < outputs; output++) {
        PyObject *allocated = arrays.count ? arrays.allocated[first + output] : NULL; /* owned */
        PyObject *given = call->given[first + output];                                /* borrowed */
        results[output] = NULL;
        if (!allocated) {
            results[output] = Py_XNewRef(given);
        } else if (status < 0) {
            Py_DECREF(allocated);
        } else {
            results[output] = fn_array_deliver(call->state, arrays.array[output], allocated);
            if (!results[output]) status = -1;
        }
    }
    if (status < 0)
        for (int output = 0; output < outputs; output++) Py_CLEAR(results[output]);
    return status;
}
