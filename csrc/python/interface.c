/* interface.c: arrays that have __cuda_array_interface__ (versions 2 and 3) and nothing better. */
#include "binding.h"

static int refuse_interface(const char *function, const fn_array *array, const char *key, PyObject *value) {
    PyErr_Format(PyExc_BufferError, "%s: %s has a malformed __cuda_array_interface__: %s is %R", function,
                 array->view.name, key, value ? value : Py_None);
    return -1;
}

/* The interface has no name for bfloat16: it comes as two bytes of anything, and the object's own dtype must tell. */
static int is_bfloat16(fn_state *state, const fn_array *array) {
    PyObject *dtype = PyObject_GetAttr(array->object, state->text_dtype);
    fn_dtype found = FN_FLOAT32;
    const int status = dtype ? fn_parse_dtype(state, "", "dtype", dtype, &found) : -1;
    Py_XDECREF(dtype);
    if (status < 0 && !PyErr_ExceptionMatches(PyExc_Exception)) return -1;
    PyErr_Clear();
    return status == 0 && found == FN_BFLOAT16;
}

static int take_typestr(fn_state *state, const char *function, fn_array *array, PyObject *typestr) {
    const char *text = typestr && PyUnicode_Check(typestr) ? PyUnicode_AsUTF8(typestr) : NULL;
    if (!text) {
        PyErr_Clear();
        return refuse_interface(function, array, "typestr", typestr);
    }
    int bfloat16 = 0;
    if (strcmp(text, "<f4") == 0) array->view.dtype = FN_FLOAT32;
    else if (strcmp(text, "<f2") == 0) array->view.dtype = FN_FLOAT16;
    else if ((strcmp(text, "<V2") == 0 || strcmp(text, "|V2") == 0) && (bfloat16 = is_bfloat16(state, array)) == 1)
        array->view.dtype = FN_BFLOAT16;
    else {
        if (bfloat16 == 0)
            PyErr_Format(PyExc_TypeError,
                         "%s: %s has typestr '%s': it must be " FN_DTYPES_ALLOWED
                         " ('<f4', '<f2', or '<V2' of an array whose dtype is bfloat16)",
                         function, array->view.name, text);
        return -1;
    }
    return 0;
}

/* *empty: there are no elements. */
static int take_layout(const char *function, fn_array *array, PyObject *shape, PyObject *strides, bool *empty) {
    if (!shape || !PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) > FN_MAX_NDIM)
        return refuse_interface(function, array, "shape", shape);
    if (strides == Py_None) strides = NULL;
    if (strides && (!PyTuple_Check(strides) || PyTuple_GET_SIZE(strides) != PyTuple_GET_SIZE(shape)))
        return refuse_interface(function, array, "strides", strides);
    if (fn_array_reserve(array, (int32_t)PyTuple_GET_SIZE(shape)) < 0) return -1;
    int64_t compact = fn_dtypes[array->view.dtype].bytes;
    *empty = false;
    for (int32_t i = array->view.ndim - 1; i >= 0; i--) {
        const int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
        if (size < 0) {
            PyErr_Clear();
            return refuse_interface(function, array, "shape", shape);
        }
        array->shape[i] = size;
        array->stride_bytes[i] = strides ? PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i)) : compact;
        if (PyErr_Occurred()) {
            PyErr_Clear();
            return refuse_interface(function, array, "strides", strides);
        }
        if (size == 0) *empty = true;
        else if (__builtin_mul_overflow(compact, size, &compact))
            return refuse_interface(function, array, "shape", shape);
    }
    return 0;
}

static int take_data(fn_state *state, const char *function, fn_array *array, PyObject *data, bool empty) {
    PyObject *number = data && PyTuple_Check(data) && PyTuple_GET_SIZE(data) == 2 ? PyTuple_GET_ITEM(data, 0) : NULL;
    const unsigned long long address = number && PyLong_Check(number) ? PyLong_AsUnsignedLongLong(number) : 0;
    const int readonly = number ? PyObject_IsTrue(PyTuple_GET_ITEM(data, 1)) : -1;
    if (PyErr_Occurred() || readonly < 0) {
        PyErr_Clear();
        return refuse_interface(function, array, "data", data);
    }
    array->view.data = empty ? NULL : (void *)(uintptr_t)address;
    array->view.readonly = readonly == 1;
    array->view.device_type = FN_CUDA;
    array->view.device_id = 0;
    array->any_device = empty;
    if (fn_require_cuda(state, function, array, "on CUDA") < 0) return -1;
    if (empty || !address) return 0; /* no memory where there should be some is fn_norm's to say */
    const fn_status status = fn_cuda_device_of(array->view.data, &array->view.device_id);
    if (status == FN_OK) return 0;
    fn_raise(status);
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_Format(type, "%s: %s: %S", function, array->view.name, value);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return -1;
}

static int take_stream(const char *function, fn_array *array, PyObject *stream) {
    if (!stream || stream == Py_None) return 0; /* nothing is queued that we would have to wait for */
    const unsigned long long handle = PyLong_Check(stream) ? PyLong_AsUnsignedLongLong(stream) : (unsigned long long)-1;
    if (handle == (unsigned long long)-1) {
        PyErr_Clear();
        return refuse_interface(function, array, "stream", stream);
    }
    array->stream = fn_stream_handle((uintptr_t)handle);
    array->has_stream = true;
    return 0;
}

int fn_import_cuda_interface(fn_state *state, const char *function, fn_array *array) {
    PyObject *given = PyObject_GetAttr(array->object, state->text_cuda_interface);
    if (!given) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear(); /* another object of its type had one */
        PyErr_Format(PyExc_TypeError, "%s: %s is a %s without __cuda_array_interface__: it must be an array", function,
                     array->view.name, fn_type_name(array->object));
        return -1;
    }
    if (!PyDict_Check(given)) {
        PyErr_Format(PyExc_TypeError, "%s: %s.__cuda_array_interface__ is a %s: it must be a dict", function,
                     array->view.name, fn_type_name(given));
        Py_DECREF(given);
        return -1;
    }
    PyObject *interface =
        PyDict_Copy(given); /* what it holds stays alive, whatever an __index__ does to the original */
    Py_DECREF(given);
    int status = -1;
    if (interface) {
        PyObject *mask = PyDict_GetItemString(interface, "mask"); /* borrowed, as are the others */
        bool empty = false;
        if (mask && mask != Py_None)
            PyErr_Format(PyExc_TypeError, "%s: %s has a mask, whose meaning would be lost", function, array->view.name);
        else if (take_typestr(state, function, array, PyDict_GetItemString(interface, "typestr")) == 0 &&
                 take_layout(function, array, PyDict_GetItemString(interface, "shape"),
                             PyDict_GetItemString(interface, "strides"), &empty) == 0 &&
                 take_data(state, function, array, PyDict_GetItemString(interface, "data"), empty) == 0)
            status = take_stream(function, array, PyDict_GetItemString(interface, "stream"));
    }
    Py_XDECREF(interface);
    return status;
}
