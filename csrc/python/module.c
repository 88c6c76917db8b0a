/* module.c: fusednorm._core: its state, its method table, what is there and how many threads it may use. */
#include "binding.h"

#include "docs.h"

fn_state *fn_state_of(PyObject *module) { return PyModule_GetState(module); }

/* ---- info, threads, paths ----------------------------------------------------------------------------------------------- */

static PyObject *paths_where(bool (*test)(fn_path)) {
    PyObject *list = PyList_New(0);
    for (int path = 0; list && path < FN_PATH_COUNT; path++) {
        if (!test((fn_path)path)) continue;
        PyObject *name = PyUnicode_FromString(fn_path_name((fn_path)path));
        if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#else
#define COMPILER "gcc " __VERSION__
#endif

static PyObject *py_info(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    fn_path path;
    const fn_status status = fn_cpu_path(&path);
    if (status != FN_OK) {
        fn_raise(status);
        return NULL;
    }
    PyObject *cuda = fn_cuda_info_dict();
    if (!cuda) return NULL;
    return Py_BuildValue("{s:s, s:s, s:{s:s, s:N, s:N, s:s, s:i}, s:N}", "version", FN_VERSION, "compiler", COMPILER,
                         "cpu", "path", fn_path_name(path), "built", paths_where(fn_path_is_built), "available",
                         paths_where(fn_path_is_available), "threading", fn_cpu_threading(), "num_threads",
                         fn_get_num_threads(), "cuda", cuda);
}

static PyObject *py_get_num_threads(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyLong_FromLong(fn_get_num_threads());
}

static PyObject *py_set_num_threads(PyObject *module, PyObject *number) {
    (void)module;
    int overflow = 0;
    if (PyBool_Check(number) || !PyIndex_Check(number)) {
        PyErr_Format(PyExc_TypeError, "set_num_threads: n is %s%s: it must be an integer of at least 1",
                     fn_article(number), fn_type_name(number));
        return NULL;
    }
    const long threads = PyLong_AsLongAndOverflow(number, &overflow);
    if (threads == -1 && !overflow && PyErr_Occurred()) return NULL;
    if (overflow || threads < 1 || threads > 65536) {
        fn_raise_out_of_range("set_num_threads", "n", number, "it must be from 1 to 65536");
        return NULL;
    }
    const fn_status status = fn_set_num_threads((int)threads);
    if (status != FN_OK) {
        fn_raise(status);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *py_force_cpu_path(PyObject *module, PyObject *name) {
    (void)module;
    const char *text = NULL;
    if (name != Py_None && !PyArg_Parse(name, "s:_force_cpu_path", &text)) return NULL; /* refuses a NUL within */
    const fn_status status = fn_cpu_force_path(text);
    if (status != FN_OK) {
        fn_raise(status);
        return NULL;
    }
    Py_RETURN_NONE;
}

#define FASTCALL(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL | METH_KEYWORDS

static PyMethodDef methods[] = {
    {"rms_norm", FASTCALL(fn_py_rms_norm), DOC_RMS_NORM},
    {"fused_add_rmsnorm", FASTCALL(fn_py_fused_add_rmsnorm), DOC_FUSED_ADD_RMSNORM},
    {"rms_norm_batch_invariant", FASTCALL(fn_py_rms_norm_batch_invariant), DOC_RMS_NORM_BATCH_INVARIANT},
    {"mm_dtype", FASTCALL(fn_py_mm_dtype), DOC_MM_DTYPE},
    {"_linear", FASTCALL(fn_py_linear), DOC_LINEAR},
    {"info", py_info, METH_NOARGS, DOC_INFO},
    {"get_num_threads", py_get_num_threads, METH_NOARGS, DOC_GET_NUM_THREADS},
    {"set_num_threads", py_set_num_threads, METH_O, DOC_SET_NUM_THREADS},
    {"warmup", FASTCALL(fn_py_warmup), DOC_WARMUP},
    {"get_weights_are_constant", fn_py_get_weights_are_constant, METH_NOARGS, DOC_GET_WEIGHTS_ARE_CONSTANT},
    {"set_weights_are_constant", fn_py_set_weights_are_constant, METH_O, DOC_SET_WEIGHTS_ARE_CONSTANT},
    {"_promise_weights", fn_py_promise_weights, METH_O, DOC_PROMISE_WEIGHTS},
    {"_force_cpu_path", py_force_cpu_path, METH_O, DOC_FORCE_CPU_PATH},
    {"_force_cuda_schedule", fn_py_force_cuda_schedule, METH_O, DOC_FORCE_CUDA_SCHEDULE},
    {"_force_cuda_product", fn_py_force_cuda_product, METH_O, DOC_FORCE_CUDA_PRODUCT},
    {NULL, NULL, 0, NULL},
};

const fn_signature *const fn_signatures[] = {
    [FN_SIGNATURE_RMS_NORM] = &fn_rms_norm_signature,
    [FN_SIGNATURE_FUSED_ADD_RMSNORM] = &fn_fused_add_rmsnorm_signature,
    [FN_SIGNATURE_RMS_NORM_BATCH_INVARIANT] = &fn_rms_norm_batch_invariant_signature,
    [FN_SIGNATURE_MM_DTYPE] = &fn_mm_dtype_signature,
    [FN_SIGNATURE_LINEAR] = &fn_linear_signature,
    [FN_SIGNATURE_WARMUP] = &fn_warmup_signature,
};
_Static_assert(sizeof fn_signatures / sizeof fn_signatures[0] == FN_SIGNATURES, "every function has a row");

/* ---- state -------------------------------------------------------------------------------------------------------------- */

static int module_exec(PyObject *module) {
    fn_state *state = fn_state_of(module);
#define FN_STATE_INTERN(member, text)                                                                                  \
    if (!(state->member = PyUnicode_InternFromString(text))) return -1;
    FN_STATE_OBJECTS(FN_STATE_INTERN)
#undef FN_STATE_INTERN
    for (int i = 0; i < FN_SIGNATURES; i++)
        if (fn_signature_ready(state, fn_signatures[i]) < 0) return -1;
    state->max_version = Py_BuildValue("(ii)", 1, 3);
    state->max_version_keywords = Py_BuildValue("(s)", "max_version");
    state->stream_keyword = Py_BuildValue("(s)", "stream");
    state->stream_keywords = Py_BuildValue("(ss)", "stream", "max_version");
    state->weights_promise = PyContextVar_New("fusednorm.weights_are_constant", NULL);
    state->buffer_type = (PyTypeObject *)PyType_FromSpec(&fn_buffer_spec);
    if (!state->max_version || !state->max_version_keywords || !state->stream_keyword || !state->stream_keywords ||
        !state->weights_promise || !state->buffer_type)
        return -1;
    return fn_ndarray_ready(state);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    fn_state *state = fn_state_of(module);
    Py_VISIT(state->memmap);
    Py_VISIT(state->buffer_type);
    Py_VISIT(state->bfloat16);
    Py_VISIT(state->torch.tensor);
    Py_VISIT(state->torch.parameter);
    Py_VISIT(state->torch.forward_ad_globals);
    Py_VISIT(state->torch.old_tensor);
    Py_VISIT(state->cupy.ndarray);
    Py_VISIT(state->streams);
    Py_VISIT(state->weights_promise);
    for (int i = 0; i < FN_DOOR_CACHE; i++) Py_VISIT(state->doors[i].type);
    return 0;
}

static int module_clear(PyObject *module) {
    fn_state *state = fn_state_of(module);
    fn_torch *torch = &state->torch;
    torch->ready = false;
    state->cupy.ready = false;
    PyObject **const owned[] = {(PyObject **)&state->memmap,
                                (PyObject **)&state->buffer_type,
                                (PyObject **)&state->bfloat16,
                                &state->max_version,
                                &state->max_version_keywords,
                                (PyObject **)&torch->tensor,
                                (PyObject **)&torch->parameter,
                                &torch->empty_like,
                                &torch->new_empty,
                                &torch->is_grad_enabled,
                                &torch->increment_version,
                                &torch->unpack_dual,
                                &torch->contiguous_format,
                                &torch->requires_grad,
                                &torch->is_neg,
                                &torch->forward_ad_globals,
                                &torch->dtypes[FN_FLOAT32],
                                &torch->dtypes[FN_FLOAT16],
                                &torch->dtypes[FN_BFLOAT16],
                                &torch->empty_like_keywords,
                                &torch->new_empty_keywords,
                                (PyObject **)&torch->old_tensor,
                                (PyObject **)&state->cupy.ndarray,
                                &state->cupy.empty,
                                &state->cupy.get_current_stream,
                                &state->cupy.get_device,
                                &state->stream_keyword,
                                &state->stream_keywords,
                                &state->streams,
                                &state->weights_promise,
#define FN_STATE_ADDRESS(member, text) &state->member,
                                FN_STATE_OBJECTS(FN_STATE_ADDRESS)
#undef FN_STATE_ADDRESS
    };
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) Py_CLEAR(*owned[i]);
    for (int i = 0; i < FN_DOOR_CACHE; i++) Py_CLEAR(state->doors[i].type);
    return 0;
}

static void module_free(void *module) {
    fn_pending_finish();
    fn_state *state = fn_state_of(module);
    for (int i = 0; i < FN_SIGNATURES; i++) {
        PyObject **names = state->parameter_names[fn_signatures[i]->number];
        for (int k = 0; names && k < fn_signatures[i]->count; k++) Py_XDECREF(names[k]);
        PyMem_Free(names);
    }
    module_clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* NumPy's C API is not */
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,         .m_name = "fusednorm._core", .m_doc = "The compiled half of fusednorm.",
    .m_size = sizeof(fn_state),    .m_methods = methods,        .m_slots = slots,
    .m_traverse = module_traverse, .m_clear = module_clear,     .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
