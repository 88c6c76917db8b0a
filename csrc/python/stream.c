/* stream.c: CUDA streams as Python objects, and the order between the stream of a call and those of its arrays.
 *
 * Nothing here waits: the host queues "start after" on a stream and goes on. In a graph capture that becomes an edge.
 */
#include "binding.h"

#include <stdarg.h>

/* ---- stream= ------------------------------------------------------------------------------------------------------------ */

static int refuse_stream(PyObject *exception, const char *function, PyObject *object, const char *reason) {
    PyErr_Format(exception,
                 "%s: stream is %R%s: it must be None, an integer (a cudaStream_t), or an object with __cuda_stream__, "
                 "cuda_stream or ptr",
                 function, object, reason);
    return -1;
}

/* `number` may be an attribute of `object`, the argument. */
static int take_handle(const char *function, PyObject *object, PyObject *number, fn_work *work) {
    if (!PyLong_Check(number) || PyBool_Check(number)) return refuse_stream(PyExc_TypeError, function, object, "");
    const unsigned long long handle = PyLong_AsUnsignedLongLong(number);
    if (handle == (unsigned long long)-1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) return -1;
        fn_raise_out_of_range(function, "stream", object, "a cudaStream_t is not negative and has 64 bits");
        return -1;
    }
    *work = (fn_work){.given = true, .known = true, .handle = fn_stream_handle((uintptr_t)handle)};
    return 0;
}

/* 1 and a new reference, 0 if there is no such attribute, -1. */
static int attribute_of(PyObject *object, const char *name, PyObject **value) {
    *value = PyObject_GetAttrString(object, name);
    if (*value) return 1;
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return 0;
}

static int take_protocol(const char *function, PyObject *object, PyObject *protocol, fn_work *work) {
    PyObject *pair = PyCallable_Check(protocol) ? PyObject_CallNoArgs(protocol) : Py_NewRef(protocol);
    if (!pair) return -1;
    int status = -1;
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2)
        refuse_stream(PyExc_TypeError, function, object, ", whose __cuda_stream__ is no pair (version, handle)");
    else if (!PyLong_Check(PyTuple_GET_ITEM(pair, 0)) || PyLong_AsLong(PyTuple_GET_ITEM(pair, 0)) != 0)
        refuse_stream(PyExc_TypeError, function, object, ", whose __cuda_stream__ is not of version 0");
    else status = take_handle(function, object, PyTuple_GET_ITEM(pair, 1), work);
    Py_DECREF(pair);
    return status;
}

int fn_parse_stream(const char *function, PyObject *object, fn_work *work) {
    if (PyLong_Check(object)) return take_handle(function, object, object, work);
    PyObject *value;
    int found = PyType_Check(object) ? 0 : attribute_of(object, "__cuda_stream__", &value);
    if (found > 0) {
        const int status = take_protocol(function, object, value, work);
        Py_DECREF(value);
        return status;
    }
    if (found == 0) found = attribute_of(object, "cuda_stream", &value);
    if (found == 0) { /* CuPy before 14; much else has a ptr, such as its memory */
        PyObject *synchronize;
        found = attribute_of(object, "synchronize", &synchronize);
        if (found > 0) {
            Py_DECREF(synchronize);
            found = attribute_of(object, "ptr", &value);
        }
    }
    if (found < 0) return -1;
    if (found == 0) return refuse_stream(PyExc_TypeError, function, object, "");
    const int status = take_handle(function, object, value, work);
    Py_DECREF(value);
    return status;
}

/* ---- the arrays' own streams ---------------------------------------------------------------------------------------------- */

int fn_array_stream(fn_array *array) {
    const fn_door_info *through = &array->through;
    if (!through->api || array->view.device_type != FN_CUDA || !through->api->current_work_stream) return 0;
    void *stream = NULL;
    if (through->api->current_work_stream(DL_CUDA, array->view.device_id, &stream) != 0) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_RuntimeError, "%s is a %s that did not say what its current CUDA stream is",
                         array->view.name, fn_type_name(array->object));
        return -1;
    }
    array->stream = fn_stream_handle((uintptr_t)stream);
    array->has_stream = true;
    return 0;
}

/* An array whose own stream is not the call's. With stream= the caller has taken charge of the frameworks' streams, but
 * not of one that an interface names, nor of memory that a framework allocated for us on its own stream. */
static bool needs_order(const fn_work *work, const fn_array *array, int32_t device) {
    if (!array->has_stream || array->stream == work->handle) return false;
    if (array->view.device_type != FN_CUDA || array->view.device_id != device) return false;
    const fn_door door = array->through.door;
    return !work->given || door == FN_DOOR_EXCHANGE || door == FN_DOOR_DLPACK || door == FN_DOOR_CUDA_INTERFACE;
}

/* The streams of these arrays that need order, each once. */
static int foreign_streams(const fn_work *work, fn_array *const *arrays, int count, int32_t device, void **streams) {
    int found = 0;
    for (int i = 0; i < count; i++) {
        if (!needs_order(work, arrays[i], device)) continue;
        int k = 0;
        while (k < found && streams[k] != arrays[i]->stream) k++;
        if (k == found) streams[found++] = arrays[i]->stream;
    }
    return found;
}

static int order(const fn_work *work, fn_array *const *arrays, int count, int32_t device, bool before) {
    void *streams[FN_MOST_OPERANDS];
    const int found = foreign_streams(work, arrays, count, device, streams);
    for (int i = 0; i < found; i++) {
        const fn_status status = before ? fn_cuda_order_streams(device, streams[i], work->handle)
                                        : fn_cuda_order_streams(device, work->handle, streams[i]);
        if (status != FN_OK) return fn_raise(status);
    }
    return 0;
}

int fn_order_before_work(const fn_work *work, fn_array *const *arrays, int count, int32_t device) {
    return order(work, arrays, count, device, true);
}

int fn_order_after_work(const fn_work *work, fn_array *const *arrays, int count, int32_t device) {
    return order(work, arrays, count, device, false);
}

/* ---- Python ------------------------------------------------------------------------------------------------------------- */

PyObject *fn_streams_call(fn_state *state, const char *name, const char *format, ...) {
    if (!state->streams && !(state->streams = PyImport_ImportModule("fusednorm._streams"))) return NULL;
    va_list values;
    va_start(values, format);
    PyObject *arguments = Py_VaBuildValue(format, values);
    va_end(values);
    PyObject *function = arguments ? PyObject_GetAttrString(state->streams, name) : NULL;
    PyObject *result = function ? PyObject_CallObject(function, arguments) : NULL;
    Py_XDECREF(function);
    Py_XDECREF(arguments);
    return result;
}

int fn_record_torch(fn_state *state, const fn_work *work, fn_array *const *arrays, int count) {
    PyObject *tensors = NULL;
    int32_t device = 0;
    for (int i = 0; i < count; i++) {
        const fn_array *array = arrays[i];
        if (array->through.door != FN_DOOR_TORCH || !array->has_stream || array->stream == work->handle) continue;
        if (!tensors && !(tensors = PyList_New(0))) return -1;
        if (PyList_Append(tensors, array->object) < 0) {
            Py_DECREF(tensors);
            return -1;
        }
        device = array->view.device_id;
    }
    if (!tensors) return 0;
    PyObject *done = fn_streams_call(state, "torch_record", "(NKi)", tensors,
                                     (unsigned long long)(uintptr_t)work->handle, (int)device);
    Py_XDECREF(done);
    return done ? 0 : -1;
}
