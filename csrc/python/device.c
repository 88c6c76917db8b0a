/* device.c: what of CUDA is there, warmup(), and the promise about weights. */
#include "binding.h"

int fn_require_cuda(fn_state *state, const char *function, const fn_array *array, const char *where) {
    if (state->cuda_is_there) return 0;
    fn_cuda_info info; /* asks the driver, so not before the first array on CUDA is seen */
    fn_cuda_describe(&info);
    if (info.built && !info.reason[0]) {
        state->cuda_is_there = true;
        return 0;
    }
    if (info.built)
        PyErr_Format(PyExc_RuntimeError, "%s: %s is %s, but no CUDA device can be used: %s", function, array->view.name,
                     where, info.reason);
    else
        PyErr_Format(PyExc_RuntimeError,
                     "%s: %s is %s, but this fusednorm was built without CUDA: only arrays in CPU memory are taken",
                     function, array->view.name, where);
    return -1;
}

/* ---- info --------------------------------------------------------------------------------------------------------------- */

static PyObject *version_text(int32_t version) {
    if (version <= 0) return PyUnicode_FromString("");
    return PyUnicode_FromFormat("%d.%d", (int)version / 1000, (int)version % 1000 / 10);
}

static PyObject *device_dict(int32_t number) {
    fn_cuda_device device;
    const fn_status status = fn_cuda_describe_device(number, &device);
    if (status != FN_OK) {
        fn_raise(status);
        return NULL;
    }
    return Py_BuildValue("{s:s, s:N, s:i}", "name", device.name, "compute_capability",
                         PyUnicode_FromFormat("%d.%d", (int)device.major, (int)device.minor), "multiprocessors",
                         (int)device.multiprocessors);
}

PyObject *fn_cuda_info_dict(void) {
    fn_cuda_info info;
    fn_cuda_describe(&info);
    PyObject *text = PyUnicode_FromString(info.architectures ? info.architectures : "");
    PyObject *architectures = text ? PyUnicode_Split(text, NULL, -1) : NULL;
    Py_XDECREF(text);
    PyObject *devices = architectures ? PyList_New(0) : NULL;
    for (int32_t i = 0; devices && i < info.devices; i++) {
        PyObject *device = device_dict(i);
        if (!device || PyList_Append(devices, device) < 0) Py_CLEAR(devices);
        Py_XDECREF(device);
    }
    if (!devices) {
        Py_XDECREF(architectures);
        return NULL;
    }
    return Py_BuildValue("{s:O, s:O, s:s, s:N, s:N, s:N, s:N}", "built", info.built ? Py_True : Py_False, "available",
                         info.built && !info.reason[0] ? Py_True : Py_False, "reason", info.reason, "runtime",
                         version_text(info.runtime_version), "driver", version_text(info.driver_version),
                         "architectures", architectures, "devices", devices);
}

/* ---- warmup ------------------------------------------------------------------------------------------------------------- */

static int refuse_device(PyObject *exception, PyObject *object) {
    PyErr_Format(exception,
                 "warmup: device is %R: it must be None (the current device), the number of a CUDA device, \"cuda\", "
                 "\"cuda:1\" or a torch.device of that kind",
                 object);
    return -1;
}

static int take_number(PyObject *argument, PyObject *number, int32_t *device) {
    int overflow = 0;
    PyObject *index = PyNumber_Index(number);
    const long value = index ? PyLong_AsLongAndOverflow(index, &overflow) : -1;
    Py_XDECREF(index);
    if (!index) return -1;
    if (overflow || value < 0 || value > INT32_MAX) return refuse_device(PyExc_ValueError, argument);
    *device = (int32_t)value;
    return 0;
}

/* "cuda" or "cuda:1", which is also how a torch.device prints. 1: the current one, 0: *device, -1 */
static int device_from_text(PyObject *argument, PyObject *text, int32_t *device) {
    const char *utf8 = PyUnicode_AsUTF8(text);
    if (!utf8) return -1;
    if (strcmp(utf8, "cuda") == 0) return 1;
    size_t digits = 0;
    if (strncmp(utf8, "cuda:", 5) == 0) digits = strspn(utf8 + 5, "0123456789");
    if (digits == 0 || digits > 6 || utf8[5 + digits]) return refuse_device(PyExc_ValueError, argument);
    *device = (int32_t)strtol(utf8 + 5, NULL, 10);
    return 0;
}

static int parse_device(PyObject *object, int32_t *device) {
    if (!object || object == Py_None) return 1;
    if (PyBool_Check(object)) return refuse_device(PyExc_TypeError, object);
    if (PyIndex_Check(object)) return take_number(object, object, device);
    if (PyUnicode_Check(object)) return device_from_text(object, object, device);
    if (strcmp(Py_TYPE(object)->tp_name, "torch.device") != 0) return refuse_device(PyExc_TypeError, object);
    PyObject *text = PyObject_Str(object);
    const int status = text ? device_from_text(object, text, device) : -1;
    Py_XDECREF(text);
    return status;
}

static const char *const warmup_names[] = {"device"};
const fn_signature fn_warmup_signature = {"warmup", warmup_names, 1, 1, 0, FN_SIGNATURE_WARMUP};

PyObject *fn_py_warmup(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords) {
    PyObject *object; /* borrowed */
    int32_t device = 0;
    if (fn_parse(fn_state_of(module), &fn_warmup_signature, args, nargs, keywords, &object) < 0) return NULL;
    const int current = parse_device(object, &device);
    if (current < 0) return NULL;
    fn_status status = FN_OK;
    if (current) status = fn_cuda_current_device(&device);
    if (status == FN_OK) {
        Py_BEGIN_ALLOW_THREADS status = fn_cuda_warmup(device);
        Py_END_ALLOW_THREADS
    }
    if (status != FN_OK) {
        fn_raise(status);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *force_by_name(PyObject *name, const char *format, fn_status (*force)(const char *)) {
    const char *text = NULL;
    if (name != Py_None && !PyArg_Parse(name, format, &text)) return NULL;
    const fn_status status = force(text);
    if (status != FN_OK) {
        fn_raise(status);
        return NULL;
    }
    Py_RETURN_NONE;
}

PyObject *fn_py_force_cuda_schedule(PyObject *module, PyObject *name) {
    (void)module;
    return force_by_name(name, "s:_force_cuda_schedule", fn_cuda_force_schedule);
}

PyObject *fn_py_force_cuda_product(PyObject *module, PyObject *name) {
    (void)module;
    return force_by_name(name, "s:_force_cuda_product", fn_cuda_force_product);
}

/* ---- weights_are_constant ------------------------------------------------------------------------------------------------ */

bool fn_weights_promised(fn_state *state) {
    if (!state->weights_promised_in_contexts) return state->weights_promised;
    PyObject *value = NULL;
    if (PyContextVar_Get(state->weights_promise, NULL, &value) < 0) {
        PyErr_Clear();
        return false;
    }
    const bool promised = value ? value == Py_True : state->weights_promised;
    Py_XDECREF(value);
    return promised;
}

PyObject *fn_py_get_weights_are_constant(PyObject *module, PyObject *unused) {
    (void)unused;
    return PyBool_FromLong(fn_state_of(module)->weights_promised);
}

PyObject *fn_py_set_weights_are_constant(PyObject *module, PyObject *constant) {
    bool promised = false;
    if (fn_parse_flag("set_weights_are_constant", "constant", constant, &promised) < 0) return NULL;
    fn_state_of(module)->weights_promised = promised;
    Py_RETURN_NONE;
}

/* For weights_are_constant(): the token that undoes it. */
PyObject *fn_py_promise_weights(PyObject *module, PyObject *constant) {
    fn_state *state = fn_state_of(module);
    bool promised = false;
    if (fn_parse_flag("weights_are_constant", "constant", constant, &promised) < 0) return NULL;
    state->weights_promised_in_contexts = true;
    return PyContextVar_Set(state->weights_promise, promised ? Py_True : Py_False);
}
