/* torch.c: what a DLPack tensor does not say of a torch tensor, asked of torch itself, without importing or linking it.
 *
 * The exchange API lends any tensor's memory: one that requires grad, one whose negative bit is set (its values are the
 * negatives of what lies in memory). And nothing tells autograd that memory which it saved for a backward pass was
 * overwritten, unless its version counter is raised.
 */
#include "binding.h"

/* ---- names from torch --------------------------------------------------------------------------------------------------- */

static PyObject *attribute_path(PyObject *root, const char *path) {
    PyObject *object = Py_NewRef(root);
    char part[64];
    while (object && *path) {
        const char *dot = strchr(path, '.');
        const size_t length = dot ? (size_t)(dot - path) : strlen(path);
        memcpy(part, path, length);
        part[length] = 0;
        path += length + (dot != NULL);
        PyObject *next = PyObject_GetAttrString(object, part);
        Py_DECREF(object);
        object = next;
    }
    return object;
}

int fn_torch_ready(fn_state *state) {
    fn_torch *torch = &state->torch;
    if (torch->ready) return 0;
    PyObject *module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch"); /* borrowed */
    if (!module) return 0;
    PyObject *tensor = PyObject_GetAttrString(module, "Tensor");
    if (!tensor || !PyType_Check(tensor)) { /* torch is half imported, or something else of that name */
        Py_XDECREF(tensor);
        PyErr_Clear();
        return 0;
    }
    const dl_exchange_api *api = fn_exchange_api_of(state, (PyTypeObject *)tensor);
    if (!api) { /* before torch 2.10: its tensors come by __dlpack__, which checks what we would */
        Py_XSETREF(torch->old_tensor, (PyTypeObject *)tensor);
        PyErr_Clear();
        return 0;
    }
    const struct {
        const char *path;
        PyObject **target;
    } wanted[] = {
        {"nn.Parameter", (PyObject **)&torch->parameter},
        {"empty_like", &torch->empty_like},
        {"Tensor.new_empty", &torch->new_empty},
        {"contiguous_format", &torch->contiguous_format},
        {"is_grad_enabled", &torch->is_grad_enabled},
        {"_C._increment_version", &torch->increment_version},
        {"_C.TensorBase.requires_grad", &torch->requires_grad},
        {"_C.TensorBase.is_neg", &torch->is_neg},
        {"autograd.forward_ad.__dict__", &torch->forward_ad_globals},
        {"autograd.forward_ad.unpack_dual", &torch->unpack_dual},
        {"float32", &torch->dtypes[FN_FLOAT32]},
        {"float16", &torch->dtypes[FN_FLOAT16]},
        {"bfloat16", &torch->dtypes[FN_BFLOAT16]},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        Py_XSETREF(*wanted[i].target, attribute_path(module, wanted[i].path));
        if (!*wanted[i].target) {
            Py_DECREF(tensor);
            return -1;
        }
    }
    torch->empty_like_keywords = Py_BuildValue("(ss)", "dtype", "memory_format");
    torch->new_empty_keywords = Py_BuildValue("(s)", "dtype");
    if (!torch->empty_like_keywords || !torch->new_empty_keywords) {
        Py_DECREF(tensor);
        return -1;
    }
    torch->api = api;
    torch->tensor = (PyTypeObject *)tensor;
    torch->ready = true;
    return 0;
}

/* ---- questions ---------------------------------------------------------------------------------------------------------- */

/* The C function behind a bound name, called without the machinery around it where its kind is known. New reference. */
static PyObject *ask(PyObject *descriptor, PyObject *object) {
    if (Py_IS_TYPE(descriptor, &PyGetSetDescr_Type)) {
        const PyGetSetDef *getset = ((PyGetSetDescrObject *)descriptor)->d_getset;
        return getset->get(object, getset->closure);
    }
    if (Py_IS_TYPE(descriptor, &PyMethodDescr_Type)) {
        const PyMethodDef *method = ((PyMethodDescrObject *)descriptor)->d_method;
        if (method->ml_flags == METH_NOARGS) return method->ml_meth(object, NULL);
    }
    return PyObject_CallOneArg(descriptor, object);
}

static int is_true(PyObject *answer /* stolen */) {
    if (!answer) return -1;
    const int truth = answer == Py_True ? 1 : answer == Py_False ? 0 : PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return truth;
}

static int grad_mode(const fn_torch *torch) {
    PyObject *function = torch->is_grad_enabled; /* borrowed */
    if (PyCFunction_CheckExact(function) && PyCFunction_GET_FLAGS(function) == METH_NOARGS)
        return is_true(PyCFunction_GET_FUNCTION(function)(PyCFunction_GET_SELF(function), NULL));
    return is_true(PyObject_CallNoArgs(function));
}

static int refuse_gradient(const char *function, const fn_array *array, const char *what) {
    PyErr_Format(PyExc_RuntimeError,
                 "%s: %s %s, and fusednorm has no autograd: its gradient would be lost. Call under torch.no_grad() or "
                 "torch.inference_mode(), or pass %s.detach()",
                 function, array->view.name, what, array->view.name);
    return -1;
}

/* Forward mode: a tensor may carry a tangent while a dual level is open. */
static int has_tangent(fn_state *state, PyObject *tensor) {
    PyObject *dual = PyObject_CallOneArg(state->torch.unpack_dual, tensor);
    PyObject *tangent = dual ? PyObject_GetAttr(dual, state->text_tangent) : NULL;
    const int found = tangent ? tangent != Py_None : -1;
    Py_XDECREF(dual);
    Py_XDECREF(tangent);
    return found;
}

static int check_gradient(fn_state *state, const char *function, const fn_array *array, bool grad, bool forward) {
    int found = grad ? is_true(ask(state->torch.requires_grad, array->object)) : 0;
    if (found == 1) return refuse_gradient(function, array, "requires grad while grad mode is on");
    if (found == 0 && forward) found = has_tangent(state, array->object);
    if (found == 1) return refuse_gradient(function, array, "carries a forward-mode tangent");
    return found;
}

static int check_negative_bit(fn_state *state, const char *function, const fn_array *array) {
    const int negative = is_true(ask(state->torch.is_neg, array->object));
    if (negative == 1)
        PyErr_Format(
            PyExc_TypeError,
            "%s: %s has its negative bit set (a view such as x.conj().imag), so its memory holds other values: "
            "pass %s.resolve_neg()",
            function, array->view.name, array->view.name);
    return negative == 0 ? 0 : -1;
}

int fn_torch_check(fn_state *state, const char *function, fn_array *const *arrays, int count) {
    const int grad = grad_mode(&state->torch);
    if (grad < 0) return -1;
    PyObject *level = PyDict_GetItem(state->torch.forward_ad_globals, state->text_current_level); /* borrowed */
    const bool forward = level && PyLong_Check(level) && PyLong_AsLong(level) >= 0;
    for (int i = 0; i < count; i++) {
        if (arrays[i]->through.door != FN_DOOR_TORCH) continue;
        if ((grad || forward) && check_gradient(state, function, arrays[i], grad, forward) < 0) return -1;
        if (check_negative_bit(state, function, arrays[i]) < 0) return -1;
    }
    return 0;
}

/* ---- results -------------------------------------------------------------------------------------------------------------- */

/* Of the shape of `like`: the fastest of torch's ways. */
static PyObject *empty_like(const fn_torch *torch, const fn_array *like, fn_dtype dtype) {
    int64_t compact = fn_dtypes[like->view.dtype].bytes;
    bool contiguous = dtype == like->view.dtype;
    for (int32_t i = like->view.ndim - 1; contiguous && i >= 0; i--) {
        if (like->shape[i] != 1 && like->stride_bytes[i] != compact) contiguous = false;
        compact *= like->shape[i];
    }
    PyObject *arguments[] = {like->object, torch->dtypes[dtype], torch->contiguous_format};
    return PyObject_Vectorcall(torch->empty_like, arguments, 1, contiguous ? NULL : torch->empty_like_keywords);
}

PyObject *fn_torch_allocate(fn_state *state, const fn_array *like, const fn_result *result, const fn_work *work) {
    const fn_torch *torch = &state->torch;
    PyObject *dtype = torch->dtypes[result->dtype]; /* borrowed */
    const bool same_shape = result->shape == like->view.shape;
    /* Torch reuses memory in the order of the stream that it was allocated on, so that must be the call's. */
    const bool elsewhere = work->given && like->has_stream && like->stream != work->handle;
    const unsigned long long handle = elsewhere ? (uintptr_t)work->handle : 0;
    if (same_shape && elsewhere)
        return fn_streams_call(state, "torch_empty_like", "(OOKi)", like->object, dtype, handle,
                               (int)like->view.device_id);
    if (same_shape) return empty_like(torch, like, result->dtype);
    PyObject *shape = fn_result_shape(result), *object = NULL;
    if (shape && elsewhere) {
        object = fn_streams_call(state, "torch_new_empty", "(OOOKi)", like->object, shape, dtype, handle,
                                 (int)like->view.device_id);
    } else if (shape) {
        PyObject *arguments[] = {like->object, shape, dtype};
        object = PyObject_Vectorcall(torch->new_empty, arguments, 2, torch->new_empty_keywords);
    }
    Py_XDECREF(shape);
    return object;
}

int fn_torch_mark_written(fn_state *state, fn_array *const *arrays, int count) {
    PyObject *written[2]; /* borrowed */
    int tensors = 0;
    for (int i = 0; i < count; i++)
        if (arrays[i]->through.door == FN_DOOR_TORCH) written[tensors++] = arrays[i]->object;
    if (tensors == 0) return 0;
    PyObject *tuple = PyTuple_New(tensors);
    if (!tuple) return -1;
    for (int i = 0; i < tensors; i++) PyTuple_SET_ITEM(tuple, i, Py_NewRef(written[i]));
    PyObject *done = PyObject_CallOneArg(state->torch.increment_version, tuple);
    Py_DECREF(tuple);
    Py_XDECREF(done);
    return done ? 0 : -1;
}
