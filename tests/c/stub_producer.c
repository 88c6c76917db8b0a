/* stub_producer.c: array objects that follow or break DLPack on purpose, with counters. Built by tests/build_c.py.
 *
 * Array(buffer, dtype, shape, strides=None, byte_offset=0): the base. `buffer` is any object with the buffer protocol,
 * or None for zeroed memory of its own. Nothing is checked, so every attribute can lie; strides count elements.
 * Stub is an Array with the C exchange API of DLPack 1.3 on its type; its sub-types change that table.
 * Capsule is an Array with `__dlpack__`. `hook(array, kwargs)`, when set, runs whenever the array is asked for:
 * what it raises travels on, and from `__dlpack__` anything that it returns but None is returned in place of a capsule.
 * `on_delete()`, when set, runs in the deleter of each managed tensor, which does not look whether an exception is set.
 */
#include "stub_producer.h"

#include <structmember.h>

static int parse_sequence(PyObject *sequence, const char *what, int64_t *out, int *count) {
    PyObject *fast = PySequence_Fast(sequence, what);
    if (fast == NULL) return -1;
    const Py_ssize_t length = PySequence_Fast_GET_SIZE(fast);
    *count = (int)length;
    for (Py_ssize_t i = 0; i < length && i < MAX_NDIM; i++)
        out[i] = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(fast, i));
    Py_DECREF(fast);
    if (length > MAX_NDIM) PyErr_SetString(PyExc_ValueError, what);
    return PyErr_Occurred() ? -1 : 0;
}

static const struct {
    const char *name;
    unsigned char code, bits;
} dtypes[] = {{"float32", 2, 32}, {"float16", 2, 16}, {"bfloat16", 4, 16},  {"float64", 2, 64},      {"int32", 0, 32},
              {"uint8", 1, 8},    {"bool", 6, 8},     {"complex64", 5, 64}, {"float8_e4m3fn", 10, 8}};

static int array_init(Array *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"buffer", "dtype", "shape", "strides", "byte_offset", NULL};
    PyObject *buffer, *shape, *strides = Py_None;
    const char *dtype;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OsO|OK", names, &buffer, &dtype, &shape, &strides,
                                     &self->byte_offset))
        return -1;
    size_t known = 0;
    while (known < sizeof dtypes / sizeof *dtypes && strcmp(dtypes[known].name, dtype) != 0) known++;
    if (known == sizeof dtypes / sizeof *dtypes) {
        PyErr_Format(PyExc_ValueError, "the stub has no dtype %s", dtype);
        return -1;
    }
    self->code = dtypes[known].code;
    self->bits = dtypes[known].bits;
    self->lanes = 1;
    self->device_type = 1;
    self->major = 1;
    if (parse_sequence(shape, "shape: up to 80 numbers", self->shape, &self->ndim) < 0) return -1;
    size_t elements = 1;
    for (int i = self->ndim - 1; i >= 0; i--) {
        self->strides[i] = (int64_t)elements;
        elements *= (size_t)self->shape[i];
    }
    int count;
    if (strides != Py_None && parse_sequence(strides, "strides: up to 80 numbers", self->strides, &count) < 0)
        return -1;
    if (buffer == Py_None) {
        self->data = self->memory = calloc(elements * self->bits / 8 + self->byte_offset + 1, 1);
        if (self->memory == NULL) return PyErr_NoMemory(), -1;
        return 0;
    }
    if (PyObject_GetBuffer(buffer, &self->view, PyBUF_SIMPLE) < 0) return -1;
    self->data = self->view.buf;
    return 0;
}

static int array_traverse(Array *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->hook);
    Py_VISIT(self->on_delete);
    Py_VISIT(self->view.obj);
    return 0;
}

static int array_clear(Array *self) {
    Py_CLEAR(self->hook);
    Py_CLEAR(self->on_delete);
    return 0;
}

static void array_dealloc(Array *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    array_clear(self);
    PyBuffer_Release(&self->view);
    free(self->memory);
    if (self->adopted != NULL) self->adopted->deleter(self->adopted);
    Py_CLEAR(self->capsule_name);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *capsule_dlpack_device(Array *self, PyObject *Py_UNUSED(unused)) {
    return Py_BuildValue("(ii)", self->device_type, self->device_id);
}

static PyObject *array_bytes(Array *self, PyObject *Py_UNUSED(unused)) {
    Py_ssize_t bytes = self->bits / 8;
    for (int i = 0; i < self->ndim; i++) bytes *= (Py_ssize_t)self->shape[i];
    return PyBytes_FromStringAndSize(self->data + self->byte_offset, bytes);
}

static PyObject *array_shape(Array *self, void *Py_UNUSED(unused)) {
    PyObject *shape = PyTuple_New(self->ndim);
    for (int i = 0; shape != NULL && i < self->ndim; i++)
        PyTuple_SET_ITEM(shape, i, PyLong_FromLongLong(self->shape[i]));
    return shape;
}

#define FIELD(name, type) {#name, type, offsetof(Array, name), 0, NULL}
static PyMemberDef array_members[] = {FIELD(ndim, T_INT),
                                      FIELD(device_type, T_INT),
                                      FIELD(device_id, T_INT),
                                      FIELD(fail, T_INT),
                                      FIELD(code, T_UBYTE),
                                      FIELD(bits, T_UBYTE),
                                      FIELD(lanes, T_USHORT),
                                      FIELD(major, T_UINT),
                                      FIELD(flags, T_ULONGLONG),
                                      FIELD(byte_offset, T_ULONGLONG),
                                      FIELD(null_strides, T_BOOL),
                                      FIELD(null_shape, T_BOOL),
                                      FIELD(null_data, T_BOOL),
                                      FIELD(shared_shape, T_BOOL),
                                      FIELD(legacy, T_BOOL),
                                      FIELD(null_deleter, T_BOOL),
                                      FIELD(refuses_max_version, T_BOOL),
                                      FIELD(capsule_name, T_OBJECT),
                                      FIELD(hook, T_OBJECT),
                                      FIELD(on_delete, T_OBJECT),
                                      {0}};
static PyGetSetDef array_getset[] = {{.name = "shape", .get = (getter)array_shape}, {0}};
static PyMethodDef array_methods[] = {{"tobytes", (PyCFunction)array_bytes, METH_NOARGS, NULL}, {0}};
static PyMethodDef capsule_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))capsule_dlpack, METH_VARARGS | METH_KEYWORDS, NULL},
    {"__dlpack_device__", (PyCFunction)capsule_dlpack_device, METH_NOARGS, NULL},
    {"capsule", (PyCFunction)make_capsule, METH_NOARGS, "a capsule, without asking the hook"},
    {0}};

enum { TYPE_FLAGS = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE };
static PyType_Slot array_slots[] = {
    {Py_tp_init, array_init},     {Py_tp_dealloc, array_dealloc}, {Py_tp_traverse, array_traverse},
    {Py_tp_clear, array_clear},   {Py_tp_members, array_members}, {Py_tp_methods, array_methods},
    {Py_tp_getset, array_getset}, {Py_tp_new, PyType_GenericNew}, {0}};
static PyType_Slot stub_slots[] = {{0}};
static PyType_Slot capsule_slots[] = {{Py_tp_methods, capsule_methods}, {0}};
static PyType_Spec array_spec = {"stub_producer.Array", sizeof(Array), 0, TYPE_FLAGS | Py_TPFLAGS_HAVE_GC, array_slots};
static PyType_Spec stub_spec = {"stub_producer.Stub", sizeof(Array), 0, TYPE_FLAGS, stub_slots};
static PyType_Spec capsule_spec = {"stub_producer.Capsule", sizeof(Array), 0, TYPE_FLAGS, capsule_slots};

/* ---- the module ---- */

static PyObject *nothing(PyObject *Py_UNUSED(module), PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(count)) {
    Py_RETURN_NONE;
}

static PyObject *get_counters(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
#define COUNTER(name) #name, counters.name
    return Py_BuildValue("{sL sL sL sL sL sL sL sL sL sL sL sL sL}", COUNTER(borrowed), COUNTER(exported),
                         COUNTER(deleted), COUNTER(deleted_twice), COUNTER(allocated), COUNTER(freed), COUNTER(adopted),
                         COUNTER(streams), COUNTER(capsules), COUNTER(capsules_used), COUNTER(capsules_unused),
                         COUNTER(null_deleters), "outstanding",
                         counters.exported + counters.allocated - counters.deleted - counters.null_deleters);
}

static PyObject *reset(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    memset(&counters, 0, sizeof counters);
    allocator_fails = adopter_fails = WORKS;
    Py_RETURN_NONE;
}

static PyObject *set_failures(PyObject *Py_UNUSED(module), PyObject *args) {
    if (!PyArg_ParseTuple(args, "ii", &allocator_fails, &adopter_fails)) return NULL;
    Py_RETURN_NONE;
}

static PyObject *capsule_name(PyObject *Py_UNUSED(module), PyObject *capsule) {
    return PyUnicode_FromString(PyCapsule_GetName(capsule));
}

static PyMethodDef functions[] = {
    {"nothing", (PyCFunction)(void (*)(void))nothing, METH_FASTCALL, "returns None"},
    {"counters", get_counters, METH_NOARGS, "a dict of all counters"},
    {"reset", reset, METH_NOARGS, "all counters to 0, nothing fails"},
    {"set_failures", set_failures, METH_VARARGS, "(allocator, adopter): 0 works, 1 raises, 2 fails silently"},
    {"capsule_name", capsule_name, METH_O, "the name that a capsule has now"},
    {0}};

/* Adds a type whose `__dlpack_c_exchange_api__` is `api`, named as the standard says or `capsule_name`. */
static int add_type(PyObject *module, const char *name, PyObject *base, ExchangeAPI *table, const char *capsule_name) {
    PyObject *capsule = PyCapsule_New(table, capsule_name, NULL);
    PyObject *type = PyObject_CallFunction((PyObject *)&PyType_Type, "s(O){sOss}", name, base,
                                           "__dlpack_c_exchange_api__", capsule, "__module__", "stub_producer");
    Py_XDECREF(capsule);
    return type == NULL ? -1 : PyModule_AddObject(module, name, type);
}

static int execute(PyObject *module) {
    PyObject *array = PyType_FromSpec(&array_spec);
    if (array == NULL || PyModule_AddObject(module, "Array", array) < 0) return -1;
    PyObject *stub = PyType_FromSpecWithBases(&stub_spec, array);
    PyObject *capsule = PyType_FromSpecWithBases(&capsule_spec, array);
    PyObject *table = PyCapsule_New(&api, "dlpack_exchange_api", NULL);
    if (stub == NULL || capsule == NULL || table == NULL) return -1;
    if (PyObject_SetAttrString(stub, "__dlpack_c_exchange_api__", table) < 0) return -1;
    Py_DECREF(table);
    stub_type = (PyTypeObject *)Py_NewRef(stub);
    if (PyModule_AddObject(module, "Stub", stub) < 0 || PyModule_AddObject(module, "Capsule", capsule) < 0) return -1;
    if (add_type(module, "StubWithoutBorrow", stub, &api_without_borrow, "dlpack_exchange_api") < 0) return -1;
    if (add_type(module, "StubChained", stub, &api_chained, "dlpack_exchange_api") < 0) return -1;
    if (add_type(module, "StubFuture", stub, &api_future, "dlpack_exchange_api") < 0) return -1;
    return add_type(module, "StubMisnamed", stub, &api, "dlpack_exchange");
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, execute}, {0}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "stub_producer", .m_methods = functions,
                                        .m_slots = module_slots};

PyMODINIT_FUNC PyInit_stub_producer(void) { return PyModuleDef_Init(&definition); }
