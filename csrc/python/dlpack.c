/* dlpack.c: DLPack in: capsules, and the C exchange API. The way out is buffer.c. */
#include "binding.h"

/* ---- one DLTensor, whoever lent it ------------------------------------------------------------------------------------ */

static int refuse_dtype(const char *function, const fn_array *array, dl_dtype dtype) {
    static const char *const kinds[] = {
        [0] = "int", [1] = "uint", [2] = "float", [3] = "handle", [4] = "bfloat", [5] = "complex", [6] = "bool"};
    const char *kind = dtype.code < sizeof kinds / sizeof kinds[0] ? kinds[dtype.code] : "type code ";
    if (dtype.code < sizeof kinds / sizeof kinds[0] && dtype.lanes == 1)
        PyErr_Format(PyExc_TypeError, "%s: %s has dtype %s%d: it must be " FN_DTYPES_ALLOWED, function,
                     array->view.name, kind, (int)dtype.bits);
    else
        PyErr_Format(PyExc_TypeError,
                     "%s: %s has DLPack dtype code %d, %d bits, %d lanes: it must be " FN_DTYPES_ALLOWED, function,
                     array->view.name, (int)dtype.code, (int)dtype.bits, (int)dtype.lanes);
    return -1;
}

static int refuse_tensor(const char *function, const fn_array *array, const char *reason) {
    PyErr_Format(PyExc_BufferError, "%s: %s exports a malformed DLPack tensor: %s", function, array->view.name, reason);
    return -1;
}

static int check_device(fn_state *state, const char *function, fn_array *array, dl_device device) {
    char where[32];
    switch (device.type) {
    case DL_CPU:
    case DL_CUDA_HOST: /* pinned, the CPU's own memory */
        array->view.device_type = FN_CPU;
        array->view.device_id = 0;
        array->any_device = false;
        return 0;
    case DL_CUDA:
    case DL_CUDA_MANAGED:
        array->view.device_type = FN_CUDA;
        array->view.device_id = device.id;
        array->any_device = device.type == DL_CUDA_MANAGED;
        if (state->cuda_is_there) return 0;
        PyOS_snprintf(where, sizeof where, "on cuda:%d", (int)device.id);
        return fn_require_cuda(state, function, array, where);
    default:
        PyErr_Format(PyExc_ValueError, "%s: %s is on DLPack device type %d: it must be in CPU memory or on CUDA",
                     function, array->view.name, (int)device.type);
        return -1;
    }
}

#define DTYPE_KEY(code, bits, lanes) ((uint32_t)(code) | (uint32_t)(bits) << 8 | (uint32_t)(lanes) << 16)
#define DTYPE_KEY_ROW(symbol, name, bytes, code, eps) [symbol] = DTYPE_KEY(code, 8 * (bytes), 1),
static const uint32_t dtype_keys[FN_DTYPE_COUNT] = {FN_FOR_EACH_DTYPE(DTYPE_KEY_ROW)};

/* Copies what a borrowed tensor says: its shape and strides may not outlive the next call into Python. */
static int take_tensor(fn_state *state, const char *function, fn_array *array, const dl_tensor *tensor, bool readonly) {
    fn_tensor *view = &array->view;
    const uint32_t wanted = DTYPE_KEY(tensor->dtype.code, tensor->dtype.bits, tensor->dtype.lanes);
    int dtype = 0;
    while (dtype < FN_DTYPE_COUNT && dtype_keys[dtype] != wanted) dtype++;
    if (dtype == FN_DTYPE_COUNT) return refuse_dtype(function, array, tensor->dtype);
    if (check_device(state, function, array, tensor->device) < 0) return -1;
    if (tensor->ndim < 0 || tensor->ndim > FN_MAX_NDIM)
        return refuse_tensor(function, array, "its number of dimensions is not in 0 to 64");
    if (tensor->ndim > 0 && !tensor->shape) return refuse_tensor(function, array, "its shape is NULL");
    if (fn_array_reserve(array, tensor->ndim) < 0) return -1;
    const int64_t bytes = fn_dtypes[dtype].bytes;
    int64_t compact = bytes;
    for (int32_t i = tensor->ndim - 1; i >= 0; i--) {
        const int64_t size = tensor->shape[i];
        if (size < 0) return refuse_tensor(function, array, "a dimension is negative");
        array->shape[i] = size;
        if (!tensor->strides) array->stride_bytes[i] = compact;
        else if (__builtin_mul_overflow(tensor->strides[i], bytes, &array->stride_bytes[i]))
            return refuse_tensor(function, array, "a stride does not fit 64 bits");
        if (size > 0 && __builtin_mul_overflow(compact, size, &compact) && !tensor->strides)
            return refuse_tensor(function, array, "its size does not fit 64 bits");
    }
    view->data = tensor->data ? (char *)tensor->data + tensor->byte_offset : NULL;
    view->dtype = (fn_dtype)dtype;
    view->readonly = readonly;
    if (!array->any_device) return 0;
    const fn_status status = fn_cuda_current_device(&view->device_id); /* DLPack names none for managed memory */
    return status == FN_OK ? 0 : fn_raise(status);
}

static int take_versioned(fn_state *state, const char *function, fn_array *array,
                          dl_managed_tensor_versioned *managed) {
    array->versioned = managed;
    if (managed->version.major != 1) {
        PyErr_Format(PyExc_BufferError, "%s: %s exports DLPack %u.%u: version 1 is understood", function,
                     array->view.name, managed->version.major, managed->version.minor);
        return -1;
    }
    array->copied = (managed->flags & DL_FLAG_IS_COPIED) != 0;
    return take_tensor(state, function, array, &managed->tensor, (managed->flags & DL_FLAG_READ_ONLY) != 0);
}

/* ---- the C exchange API ----------------------------------------------------------------------------------------------- */

const dl_exchange_api *fn_exchange_api_of(fn_state *state, PyTypeObject *type) {
    PyObject *capsule = PyObject_GetAttr((PyObject *)type, state->text_exchange_api);
    if (!capsule) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear();
        return NULL;
    }
    /* DLPack 1.2 drafts put an integer here; such a type has __dlpack__ as well. */
    const dl_exchange_api *api =
        PyCapsule_IsValid(capsule, "dlpack_exchange_api") ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
    Py_DECREF(capsule); /* the table is immortal */
    while (api && api->header.version.major != 1) api = (const dl_exchange_api *)api->header.previous;
    return api;
}

/* The first line of what an exception says, since torch appends its C++ stack; its type's name if it cannot be printed. New
 * reference, or NULL without an exception. */
static PyObject *first_line_of(PyObject *exception) {
    PyObject *text = PyObject_Str(exception);
    const Py_ssize_t length = text ? PyUnicode_GET_LENGTH(text) : 0;
    const Py_ssize_t end = text ? PyUnicode_FindChar(text, '\n', 0, length, 1) : -1;
    if (end >= 0) Py_SETREF(text, PyUnicode_Substring(text, 0, end));
    PyErr_Clear();
    if (!text) text = PyUnicode_FromString(fn_type_name(exception));
    PyErr_Clear();
    return text;
}

/* Exceptions that are about the program, not about the array, travel unchanged. */
static bool is_about_the_array(PyObject *type) {
    return PyErr_GivenExceptionMatches(type, PyExc_Exception) &&
           !PyErr_GivenExceptionMatches(type, PyExc_MemoryError) &&
           !PyErr_GivenExceptionMatches(type, PyExc_RecursionError);
}

/* torch lends no sparse, meta or quantised tensor: say which it was. */
static void set_lend_error(const char *function, const fn_array *array, PyObject *line) {
    PyObject *dtype = NULL, *layout = NULL;
    if (array->through.door == FN_DOOR_TORCH) {
        dtype = PyObject_GetAttrString(array->object, "dtype");
        layout = dtype ? PyObject_GetAttrString(array->object, "layout") : NULL;
        PyErr_Clear();
    }
    if (layout)
        PyErr_Format(PyExc_TypeError, "%s: %s is a %s (dtype %S, layout %S) that cannot lend its memory: %U", function,
                     array->view.name, fn_type_name(array->object), dtype, layout, line);
    else
        PyErr_Format(PyExc_TypeError, "%s: %s is a %s that cannot lend its memory: %U", function, array->view.name,
                     fn_type_name(array->object), line);
    Py_XDECREF(dtype);
    Py_XDECREF(layout);
}

/* A producer may fail without an exception, or with one that does not say which argument it is about. */
static int lend_failed(const char *function, const fn_array *array) {
    PyObject *type, *cause, *traceback, *error;
    PyErr_Fetch(&type, &cause, &traceback);
    if (!type) {
        PyErr_Format(PyExc_BufferError, "%s: %s is a %s that did not lend its memory and did not say why", function,
                     array->view.name, fn_type_name(array->object));
        return -1;
    }
    PyErr_NormalizeException(&type, &cause, &traceback);
    PyObject *line = is_about_the_array(type) && cause ? first_line_of(cause) : NULL;
    if (!line) {
        PyErr_Restore(type, cause, traceback);
        return -1;
    }
    set_lend_error(function, array, line);
    Py_DECREF(line);
    Py_DECREF(type);
    Py_XDECREF(traceback);
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (error) PyException_SetCause(error, cause); /* steals cause */
    else Py_DECREF(cause);
    PyErr_Restore(type, error, traceback);
    return -1;
}

int fn_import_exchange(fn_state *state, const char *function, fn_array *array, bool own) {
    const dl_exchange_api *api = array->through.api;
    if (!own && api->borrow_from_object) {
        dl_tensor tensor;
        if (api->borrow_from_object(array->object, &tensor) != 0) return lend_failed(function, array);
        return take_tensor(state, function, array, &tensor, false);
    }
    dl_managed_tensor_versioned *managed = NULL;
    if (api->managed_from_object(array->object, &managed) != 0 || !managed) return lend_failed(function, array);
    return take_versioned(state, function, array, managed);
}

typedef struct {
    char text[200];
} allocation_error;

static void set_allocation_error(void *context, const char *kind, const char *message) {
    PyOS_snprintf(((allocation_error *)context)->text, sizeof((allocation_error *)context)->text, "%s: %s",
                  kind ? kind : "error", message ? message : "");
}

PyObject *fn_exchange_allocate(const char *function, const fn_array *like, const fn_result *result) {
    const dl_exchange_api *api = like->through.api;
    int64_t shape[FN_MAX_NDIM];
    memcpy(shape, result->shape, sizeof shape[0] * (size_t)result->ndim);
    const fn_dtype_info *dtype = &fn_dtypes[result->dtype];
    dl_tensor prototype = {
        .device = {like->view.device_type == FN_CUDA ? DL_CUDA : DL_CPU, like->view.device_id},
        .ndim = result->ndim,
        .dtype = {(uint8_t)dtype->dlpack_code, (uint8_t)(8 * dtype->bytes), 1},
        .shape = shape,
    };
    allocation_error error = {"no reason given"};
    dl_managed_tensor_versioned *managed = NULL;
    void *object = NULL;
    if (!api->allocate || !api->managed_to_object ||
        api->allocate(&prototype, &managed, &error, set_allocation_error) != 0 || !managed) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_RuntimeError,
                         "%s: a result like %s, a %s, could not be allocated (%s): give the outputs", function,
                         like->view.name, fn_type_name(like->object), error.text);
        return NULL;
    }
    if (api->managed_to_object(managed, &object) == 0 && object) return object;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_RuntimeError, "%s: a result like %s, a %s, was allocated but not returned: give the outputs",
                     function, like->view.name, fn_type_name(like->object));
    return NULL;
}

/* ---- capsules ----------------------------------------------------------------------------------------------------------- */

/* DLPack's number for a stream: 0 is forbidden, since None means something else than NULL. */
static PyObject *stream_number(const fn_work *work) {
    return PyLong_FromUnsignedLongLong(work->handle ? (unsigned long long)(uintptr_t)work->handle : 1);
}

/* `work`: NULL in CPU memory, where there is no stream to pass. */
static PyObject *call_dlpack(fn_state *state, PyObject *object, const fn_work *work) {
    PyObject *stream = work ? stream_number(work) : NULL; /* owned */
    if (work && !stream) return NULL;
    PyObject *arguments[] = {object, stream ? stream : state->max_version, state->max_version};
    PyObject *capsule = PyObject_VectorcallMethod(state->text_dlpack, arguments, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                                  stream ? state->stream_keywords : state->max_version_keywords);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear(); /* a producer from before DLPack 1.0 takes no max_version */
        capsule = PyObject_VectorcallMethod(state->text_dlpack, arguments, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                            stream ? state->stream_keyword : NULL);
    }
    Py_XDECREF(stream);
    return capsule;
}

/* Of a jax array that was deleted, __dlpack_device__ says something about NoneType, and __dlpack__ that it was deleted. */
static int better_reason(fn_state *state, PyObject *object) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *capsule = call_dlpack(state, object, NULL);
    if (capsule) {
        Py_DECREF(capsule); /* unused, it releases its tensor */
        PyErr_Restore(type, value, traceback);
    } else {
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(traceback);
    }
    return -1;
}

/* torch before 2.10 has no table to ask. */
static int old_torch_stream(fn_state *state, fn_array *array) {
    PyObject *number = fn_streams_call(state, "torch_current", "(i)", (int)array->view.device_id);
    const unsigned long long handle = number ? PyLong_AsUnsignedLongLong(number) : 0;
    Py_XDECREF(number);
    if (PyErr_Occurred()) return -1;
    array->stream = fn_stream_handle((uintptr_t)handle);
    array->has_stream = true;
    return 0;
}

/* The device that the object names, before it is asked for its memory. */
int fn_capsule_device(fn_state *state, const char *function, fn_array *array) {
    array->view.device_type = FN_CPU;
    PyObject *pair = PyObject_CallMethodNoArgs(array->object, state->text_dlpack_device);
    if (!pair) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) return better_reason(state, array->object);
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear(); /* the capsule will say */
        return 0;
    }
    int type = 0, id = 0, overflow = 0;
    if (PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2) {
        type = (int)PyLong_AsLongAndOverflow(PyTuple_GET_ITEM(pair, 0), &overflow);
        if (!PyErr_Occurred()) id = (int)PyLong_AsLongAndOverflow(PyTuple_GET_ITEM(pair, 1), &overflow);
    } else {
        PyErr_Format(PyExc_TypeError, "%s: %s.__dlpack_device__() returned %R: it must be a pair of integers", function,
                     array->view.name, pair);
    }
    Py_DECREF(pair);
    if (PyErr_Occurred()) return -1;
    if (check_device(state, function, array, (dl_device){type, id}) < 0) return -1;
    return array->through.old_torch && array->view.device_type == FN_CUDA ? old_torch_stream(state, array) : 0;
}

int fn_import_capsule(fn_state *state, const char *function, fn_array *array, const fn_work *work) {
    PyObject *capsule = call_dlpack(state, array->object, work);
    if (!capsule) return -1;
    int result = -1;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dl_managed_tensor_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") == 0)
            result = take_versioned(state, function, array, managed);
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        dl_managed_tensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") == 0) {
            array->legacy = managed;
            result = take_tensor(state, function, array, &managed->tensor, false);
        }
    } else if (PyCapsule_CheckExact(capsule)) {
        const char *name = PyCapsule_GetName(capsule);
        PyErr_Clear();
        PyErr_Format(PyExc_BufferError,
                     "%s: %s.__dlpack__() returned a capsule named \"%s\": it must be \"dltensor_versioned\" or "
                     "\"dltensor\", and unused",
                     function, array->view.name, name ? name : "");
    } else {
        PyErr_Format(PyExc_TypeError, "%s: %s.__dlpack__() returned a %s: it must be a capsule", function,
                     array->view.name, fn_type_name(capsule));
    }
    Py_DECREF(capsule);
    if (result == 0 && !work && array->view.device_type == FN_CUDA) {
        array->stream = NULL; /* a producer that is told no stream makes its memory ready on the legacy default one */
        array->has_stream = true;
    }
    return result;
}
