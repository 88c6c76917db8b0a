/* array.c: any object -> fn_array. A type is looked at once; from then on its door is one pointer comparison away. */
#include "binding.h"

int fn_raise(fn_status status) {
    PyObject *const exceptions[FN_STATUS_COUNT] = {
        [FN_OK] = PyExc_SystemError,
        [FN_ERROR_TYPE] = PyExc_TypeError,
        [FN_ERROR_VALUE] = PyExc_ValueError,
        [FN_ERROR_BUFFER] = PyExc_BufferError,
        [FN_ERROR_RUNTIME] = PyExc_RuntimeError,
        [FN_ERROR_MEMORY] = PyExc_MemoryError,
    };
    /* An environment variable in a text may be in any encoding. */
    const char *text = fn_error_text();
    PyObject *message = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "backslashreplace");
    if (message) PyErr_SetObject(exceptions[status], message);
    Py_XDECREF(message);
    return -1;
}

const char *fn_type_name(PyObject *object) { return object == Py_None ? "None" : Py_TYPE(object)->tp_name; }

/* ---- doors ---------------------------------------------------------------------------------------------------------- */

static bool is_jax_type(PyTypeObject *type) {
    PyObject *module = PyObject_GetAttrString((PyObject *)type, "__module__");
    const char *text = module && PyUnicode_Check(module) ? PyUnicode_AsUTF8(module) : NULL;
    const bool jax = text && (strncmp(text, "jax.", 4) == 0 || strncmp(text, "jaxlib.", 7) == 0);
    Py_XDECREF(module);
    PyErr_Clear();
    return jax;
}

/* PyObject_HasAttr, but an exception other than AttributeError counts as an error. 1, 0 or -1. */
static int has_attribute(PyTypeObject *type, PyObject *name) {
    PyObject *attribute = PyObject_GetAttr((PyObject *)type, name);
    if (attribute) {
        Py_DECREF(attribute);
        return 1;
    }
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return 0;
}

static int refuse(PyObject *exception, const char *function, const fn_array *array, const char *reason) {
    PyErr_Format(exception, "%s: %s is %s%s%s", function, array->view.name, fn_article(array->object),
                 fn_type_name(array->object), reason);
    return -1;
}

static int find_door(fn_state *state, const char *function, const fn_array *array, fn_door_info *info) {
    PyObject *object = array->object; /* borrowed */
    PyTypeObject *type = Py_TYPE(object);
    *info = (fn_door_info){.door = FN_DOOR_DLPACK};
    if (type == state->memmap) {
        info->door = FN_DOOR_NDARRAY;
        return 0;
    }
    if (fn_is_ndarray(object))
        return refuse(
            PyExc_TypeError, function, array,
            ", a subclass of numpy.ndarray whose meaning would be lost: pass numpy.asarray of it, or its data");
    if (fn_torch_ready(state) < 0) return -1;
    if (state->torch.ready) {
        if (type == state->torch.tensor || type == state->torch.parameter) {
            *info = (fn_door_info){.door = FN_DOOR_TORCH, .api = state->torch.api};
            return 0;
        }
        if (PyType_IsSubtype(type, state->torch.tensor))
            return refuse(PyExc_TypeError, function, array,
                          ", a subclass of torch.Tensor: only torch.Tensor and torch.nn.Parameter are taken "
                          "(x.as_subclass(torch.Tensor) where the memory is an ordinary tensor's)");
    }
    if (fn_cupy_ready(state) < 0) return -1;
    if (state->cupy.ready && PyType_IsSubtype(type, state->cupy.ndarray)) {
        if (type != state->cupy.ndarray)
            return refuse(PyExc_TypeError, function, array,
                          ", a subclass of cupy.ndarray whose meaning would be lost: pass its cupy.ndarray "
                          "(x.view(cupy.ndarray))");
        info->door = FN_DOOR_CUPY;
        return 0;
    }
    info->api = fn_exchange_api_of(state, type);
    if (info->api) {
        info->door = FN_DOOR_EXCHANGE;
        return 0;
    }
    if (PyErr_Occurred()) return -1;
    int found = has_attribute(type, state->text_dlpack);
    if (found < 0) return -1;
    if (found) {
        if (is_jax_type(type)) info->door = FN_DOOR_JAX;
        info->old_torch = state->torch.old_tensor && PyType_IsSubtype(type, state->torch.old_tensor);
        return 0;
    }
    found = has_attribute(type, state->text_cuda_interface);
    if (found == 0) { /* some set it on the object: looked up without running code of a type that has it not */
        PyObject *own = PyObject_GenericGetAttr(object, state->text_cuda_interface);
        found = own != NULL;
        Py_XDECREF(own);
        PyErr_Clear();
    }
    if (found < 0) return -1;
    if (found) {
        info->door = FN_DOOR_CUDA_INTERFACE;
        return 0;
    }
    return refuse(PyExc_TypeError, function, array,
                  ": it must be an array (numpy.ndarray, torch.Tensor, cupy.ndarray, jax.Array or anything with "
                  "__dlpack__ or __cuda_array_interface__)");
}

int fn_array_open(fn_state *state, const char *function, const char *name, PyObject *object, fn_array *array) {
    array->view.name = name;
    array->object = object;
    array->versioned = NULL;
    array->legacy = NULL;
    array->copied = false;
    array->any_device = false;
    array->has_stream = false;
    array->stream = NULL;
    array->many = NULL;
    if (fn_is_exact_ndarray(object)) {
        array->through = (fn_door_info){.door = FN_DOOR_NDARRAY};
        return 0;
    }
    PyTypeObject *type = Py_TYPE(object);
    const size_t slot = ((uintptr_t)type >> 4 ^ (uintptr_t)type >> 10) % FN_DOOR_CACHE;
    if (state->doors[slot].type == type) {
        array->through = state->doors[slot].info;
        return 0;
    }
    if (find_door(state, function, array, &array->through) < 0) return -1;
    Py_XSETREF(state->doors[slot].type, (PyTypeObject *)Py_NewRef((PyObject *)type));
    state->doors[slot].info = array->through;
    return 0;
}

int fn_array_reach(fn_state *state, const char *function, fn_array *array) {
    switch (array->through.door) {
    case FN_DOOR_DLPACK:
    case FN_DOOR_JAX: return fn_capsule_device(state, function, array);
    case FN_DOOR_CUPY: return fn_import_cupy(state, function, array);
    case FN_DOOR_CUDA_INTERFACE: return fn_import_cuda_interface(state, function, array);
    case FN_DOOR_NDARRAY:
    case FN_DOOR_TORCH:
    case FN_DOOR_EXCHANGE: break;
    }
    return 0;
}

int fn_array_import_native(fn_state *state, const char *function, fn_array *array, bool own) {
    if (fn_runs_python(array->through.door)) return 0;
    if (array->versioned || array->many) fn_array_close(array);
    if (array->through.door == FN_DOOR_NDARRAY) return fn_import_ndarray(state, function, array);
    return fn_import_exchange(state, function, array, own);
}

int fn_array_reserve(fn_array *array, int32_t ndim) {
    int64_t *room = array->few;
    if (ndim > FN_FEW_DIMENSIONS) {
        room = PyMem_Malloc(sizeof(int64_t) * 2 * (size_t)ndim);
        if (!room) {
            PyErr_NoMemory();
            return -1;
        }
        PyMem_Free(array->many);
        array->many = room;
    }
    array->shape = room;
    array->stride_bytes = room + (ndim > FN_FEW_DIMENSIONS ? ndim : FN_FEW_DIMENSIONS);
    array->view.shape = array->shape;
    array->view.stride_bytes = array->stride_bytes;
    array->view.ndim = ndim;
    return 0;
}

void fn_array_close(fn_array *array) {
    dl_managed_tensor_versioned *versioned = array->versioned;
    dl_managed_tensor *legacy = array->legacy;
    PyMem_Free(array->many);
    array->many = NULL;
    if (!versioned && !legacy) return;
    array->versioned = NULL;
    array->legacy = NULL;
    PyObject *type, *value, *traceback; /* a deleter may run Python code, which an exception on its way must survive */
    PyErr_Fetch(&type, &value, &traceback);
    if (versioned && versioned->deleter) versioned->deleter(versioned);
    if (legacy && legacy->deleter) legacy->deleter(legacy);
    if (PyErr_Occurred()) PyErr_WriteUnraisable(array->object);
    PyErr_Restore(type, value, traceback);
}

/* ---- results -------------------------------------------------------------------------------------------------------- */

PyObject *fn_result_shape(const fn_result *result) {
    PyObject *shape = PyTuple_New(result->ndim);
    for (int32_t i = 0; shape && i < result->ndim; i++) {
        PyObject *size = PyLong_FromLongLong(result->shape[i]);
        if (!size) Py_CLEAR(shape);
        else PyTuple_SET_ITEM(shape, i, size);
    }
    return shape;
}

PyObject *fn_array_allocate(fn_state *state, const char *function, const fn_array *like, const fn_result *result,
                            const fn_work *work) {
    switch (like->through.door) {
    case FN_DOOR_NDARRAY: return fn_ndarray_allocate(state, function, result);
    case FN_DOOR_TORCH: return fn_torch_allocate(state, like, result, work);
    case FN_DOOR_EXCHANGE: return fn_exchange_allocate(function, like, result);
    case FN_DOOR_CUPY: return fn_cupy_allocate(state, function, like, result, work);
    case FN_DOOR_DLPACK:
    case FN_DOOR_JAX:
    case FN_DOOR_CUDA_INTERFACE: break;
    }
    if (like->through.door == FN_DOOR_CUDA_INTERFACE || !PyObject_HasAttr(like->object, state->text_array_namespace)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: %s is a %s, which has no __array_namespace__ to make a result with: give the outputs "
                     "(out=, and residual_out= where there is one)",
                     function, like->view.name, fn_type_name(like->object));
        return NULL;
    }
    if (like->view.device_type == FN_CPU) return fn_buffer_new(state, result);
    PyObject *shape = fn_result_shape(result);
    const char *dtype = fn_dtypes[result->dtype].name;
    return shape ? fn_streams_call(state, "array_api_empty", "(ONs)", like->object, shape, dtype) : NULL;
}

PyObject *fn_array_deliver(fn_state *state, const fn_array *like, PyObject *allocated) {
    if (!Py_IS_TYPE(allocated, state->buffer_type)) return allocated;
    PyObject *namespace = PyObject_CallMethodNoArgs(like->object, state->text_array_namespace);
    PyObject *result = namespace ? PyObject_CallMethodOneArg(namespace, state->text_from_dlpack, allocated) : NULL;
    Py_XDECREF(namespace);
    Py_DECREF(allocated);
    return result;
}
