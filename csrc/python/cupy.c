/* cupy.c: CuPy arrays by their attributes: cheaper than its __dlpack__, which asks the driver about the pointer, and
 * bfloat16 comes as a NumPy dtype. They live on one device, in the order of CuPy's current stream there. */
#include "binding.h"

int fn_cupy_ready(fn_state *state) {
    fn_cupy *cupy = &state->cupy;
    if (cupy->ready) return 0;
    PyObject *module = PyDict_GetItemString(PyImport_GetModuleDict(), "cupy"); /* borrowed */
    if (!module) return 0;
    PyObject *ndarray = PyObject_GetAttrString(module, "ndarray");
    PyObject *cuda = ndarray ? PyObject_GetAttrString(module, "cuda") : NULL;
    PyObject *runtime = cuda ? PyObject_GetAttrString(cuda, "runtime") : NULL;
    PyObject *is_hip = runtime ? PyObject_GetAttrString(runtime, "is_hip") : NULL;
    /* CuPy for ROCm is left to __dlpack__, which names the device; a half imported CuPy to a later call. */
    if (is_hip && is_hip == Py_False && PyType_Check(ndarray)) {
        Py_XSETREF(cupy->empty, PyObject_GetAttrString(module, "empty"));
        Py_XSETREF(cupy->get_current_stream, PyObject_GetAttrString(cuda, "get_current_stream"));
        Py_XSETREF(cupy->get_device, PyObject_GetAttrString(runtime, "getDevice"));
        if (cupy->empty && cupy->get_current_stream && cupy->get_device) {
            Py_XSETREF(cupy->ndarray, (PyTypeObject *)Py_NewRef(ndarray));
            cupy->ready = true;
        }
    }
    Py_XDECREF(is_hip);
    Py_XDECREF(runtime);
    Py_XDECREF(cuda);
    Py_XDECREF(ndarray);
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return -1;
    PyErr_Clear();
    return 0;
}

/* An attribute that is an integer; -1 with an exception. */
static long long number_of(PyObject *object, PyObject *name) {
    PyObject *value = object ? PyObject_GetAttr(object, name) : NULL;
    const long long number = value ? PyLong_AsLongLong(value) : -1;
    Py_XDECREF(value);
    return number;
}

static int current_stream(fn_state *state, fn_array *array) {
    PyObject *device = PyLong_FromLong(array->view.device_id);
    PyObject *stream = device ? PyObject_CallOneArg(state->cupy.get_current_stream, device) : NULL;
    const long long handle = number_of(stream, state->text_ptr);
    Py_XDECREF(device);
    Py_XDECREF(stream);
    if (PyErr_Occurred()) return -1;
    array->stream = fn_stream_handle((uintptr_t)handle);
    array->has_stream = true;
    return 0;
}

/* Sizes and strides in bytes from two tuples. */
static int take_layout(const char *function, fn_array *array, PyObject *shape, PyObject *strides) {
    if (!PyTuple_Check(shape) || !PyTuple_Check(strides) || PyTuple_GET_SIZE(shape) != PyTuple_GET_SIZE(strides) ||
        PyTuple_GET_SIZE(shape) > FN_MAX_NDIM) {
        PyErr_Format(PyExc_BufferError, "%s: %s has shape %R and strides %R", function, array->view.name, shape,
                     strides);
        return -1;
    }
    if (fn_array_reserve(array, (int32_t)PyTuple_GET_SIZE(shape)) < 0) return -1;
    for (int32_t i = 0; i < array->view.ndim; i++) {
        array->shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
        if (array->shape[i] < 0 && PyErr_Occurred()) return -1;
        array->stride_bytes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
        if (array->stride_bytes[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

static int take_dtype(fn_state *state, const char *function, fn_array *array, PyObject *dtype) {
    if (fn_dtype_from_descriptor(state, dtype, &array->view.dtype) == 1) return 0;
    PyErr_Format(PyExc_TypeError, "%s: %s has dtype %S: it must be " FN_DTYPES_ALLOWED, function, array->view.name,
                 dtype);
    return -1;
}

static int take_memory(fn_state *state, const char *function, fn_array *array, PyObject *data) {
    const long long address = number_of(data, state->text_ptr);
    if (PyErr_Occurred()) return -1;
    const long long device = number_of(data, state->text_device_id);
    if (PyErr_Occurred()) return -1;
    array->view.data = (void *)(uintptr_t)address;
    array->view.device_type = FN_CUDA;
    array->view.device_id = (int32_t)device;
    array->view.readonly = false;
    if (!address) array->any_device = true; /* empty: it lies nowhere */
    return fn_require_cuda(state, function, array, "on CUDA");
}

int fn_import_cupy(fn_state *state, const char *function, fn_array *array) {
    PyObject *object = array->object; /* borrowed */
    PyObject *dtype = PyObject_GetAttr(object, state->text_dtype);
    PyObject *shape = dtype ? PyObject_GetAttr(object, state->text_shape) : NULL;
    PyObject *strides = shape ? PyObject_GetAttr(object, state->text_strides) : NULL;
    PyObject *data = strides ? PyObject_GetAttr(object, state->text_data) : NULL;
    int status = -1;
    if (data && take_dtype(state, function, array, dtype) == 0 && take_layout(function, array, shape, strides) == 0 &&
        take_memory(state, function, array, data) == 0)
        status = current_stream(state, array);
    Py_XDECREF(dtype);
    Py_XDECREF(shape);
    Py_XDECREF(strides);
    Py_XDECREF(data);
    return status;
}

/* ---- results -------------------------------------------------------------------------------------------------------------- */

static bool is_current_device(const fn_cupy *cupy, int32_t device) {
    PyObject *current = PyObject_CallNoArgs(cupy->get_device);
    const long number = current ? PyLong_AsLong(current) : -1;
    Py_XDECREF(current);
    PyErr_Clear();
    return number == device;
}

PyObject *fn_cupy_allocate(fn_state *state, const char *function, const fn_array *like, const fn_result *result,
                           const fn_work *work) {
    const fn_cupy *cupy = &state->cupy;
    PyObject *shape = fn_result_shape(result);
    PyObject *descriptor = shape ? fn_new_descriptor(state, function, result->dtype) : NULL;
    PyObject *object = NULL;
    if (descriptor) {
        PyObject *arguments[] = {shape, descriptor};
        if ((!work->given || work->handle == like->stream) && is_current_device(cupy, like->view.device_id))
            object = PyObject_Vectorcall(cupy->empty, arguments, 2, NULL);
        else
            object = fn_streams_call(state, "cupy_empty", "(OOKi)", shape, descriptor,
                                     (unsigned long long)(uintptr_t)(work->given ? work->handle : like->stream),
                                     (int)like->view.device_id);
        if (!object && result->dtype == FN_BFLOAT16 && like->view.dtype != FN_BFLOAT16 &&
            (PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError)))
            PyErr_Format(PyExc_TypeError, "%s: out_dtype is bfloat16, which this CuPy does not have", function);
    }
    Py_XDECREF(shape);
    Py_XDECREF(descriptor);
    return object;
}
