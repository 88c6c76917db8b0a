/* stub_exchange.c: the DLPack side of stub_producer: managed tensors, the C exchange API, capsules. */
#include "stub_producer.h"

enum { QUARANTINE = 64 };

Counters counters;
int allocator_fails, adopter_fails;
PyTypeObject *stub_type; /* owned by the module, which is never unloaded */
static Managed *quarantine[QUARANTINE];
static size_t quarantined;

static void fill(Array *self, DLTensor *tensor, int64_t *shape, int64_t *strides) {
    memcpy(shape, self->shape, sizeof self->shape);
    memcpy(strides, self->strides, sizeof self->strides);
    *tensor = (DLTensor){.data = self->null_data ? NULL : self->data,
                         .device_type = self->device_type,
                         .device_id = self->device_id,
                         .ndim = self->ndim,
                         .code = self->code,
                         .bits = self->bits,
                         .lanes = self->lanes,
                         .shape = self->null_shape ? NULL : shape,
                         .strides = self->null_strides ? NULL : strides,
                         .byte_offset = self->byte_offset};
}

static void retire(Managed *managed) {
    if (managed->deleted) {
        counters.deleted_twice++;
        return;
    }
    managed->deleted = true;
    counters.deleted++;
    memset(managed->shape, 0x5a, sizeof managed->shape);
    memset(managed->strides, 0x5a, sizeof managed->strides);
    if (managed->memory != NULL) counters.freed++;
    free(managed->memory);
    managed->memory = NULL;
    PyObject *on_delete = managed->array == NULL ? NULL : ((Array *)managed->array)->on_delete;
    if (on_delete != NULL && on_delete != Py_None) Py_XDECREF(PyObject_CallNoArgs(on_delete));
    Py_CLEAR(managed->array);
    free(quarantine[quarantined % QUARANTINE]);
    quarantine[quarantined++ % QUARANTINE] = managed;
}

static void delete_managed(Managed *managed) {
    PyGILState_STATE gil = PyGILState_Ensure(); /* a consumer may release from any thread */
    retire(managed);
    PyGILState_Release(gil);
}

static void delete_versioned(Versioned *tensor) { delete_managed((Managed *)tensor); }
static void delete_legacy(Legacy *tensor) { delete_managed((Managed *)tensor); }

static Managed *export_managed(Array *self, bool legacy) {
    Managed *managed = calloc(1, sizeof *managed);
    if (managed == NULL) return (Managed *)PyErr_NoMemory();
    if (legacy) {
        managed->legacy.deleter = self->null_deleter ? NULL : delete_legacy;
        fill(self, &managed->legacy.tensor, managed->shape, managed->strides);
    } else {
        managed->versioned =
            (Versioned){self->major, 3, NULL, self->null_deleter ? NULL : delete_versioned, self->flags, {0}};
        fill(self, &managed->versioned.tensor, managed->shape, managed->strides);
    }
    if (self->null_deleter) counters.null_deleters++; /* a NULL deleter promises static memory: the array is not kept */
    else managed->array = Py_NewRef((PyObject *)self);
    counters.exported++;
    return managed;
}

static int ask(Array *self, PyObject *kwargs, PyObject **answer) {
    *answer = NULL;
    if (self->fail == FAILS_WITH_EXCEPTION) PyErr_SetString(PyExc_LookupError, "the stub fails on demand");
    if (self->fail != WORKS) return -1;
    if (self->hook == NULL || self->hook == Py_None) return 0;
    *answer = PyObject_CallFunctionObjArgs(self->hook, (PyObject *)self, kwargs ? kwargs : Py_None, NULL);
    return *answer == NULL ? -1 : 0;
}

/* ---- the C exchange API ---- */

static int borrow_from_object(void *object, DLTensor *out) {
    static int64_t shared[2][MAX_NDIM];
    Array *self = object;
    PyObject *answer;
    counters.borrowed++;
    if (ask(self, NULL, &answer) < 0) return -1;
    Py_XDECREF(answer);
    if (self->shared_shape) fill(self, out, shared[0], shared[1]);
    else fill(self, out, self->shape, self->strides);
    return 0;
}

static int managed_from_object(void *object, Versioned **out) {
    PyObject *answer;
    if (ask(object, NULL, &answer) < 0) return -1;
    Py_XDECREF(answer);
    Managed *managed = export_managed(object, false);
    *out = (Versioned *)managed;
    return managed == NULL ? -1 : 0;
}

static int allocate(DLTensor *prototype, Versioned **out, void *context,
                    void (*set_error)(void *, const char *, const char *)) {
    if (allocator_fails == FAILS_WITH_EXCEPTION)
        set_error(context, "MemoryError", "the stub allocator fails on demand");
    if (allocator_fails != WORKS) return -1;
    Managed *managed = calloc(1, sizeof *managed);
    size_t bytes = prototype->bits / 8;
    for (int32_t i = prototype->ndim - 1; i >= 0; i--) {
        managed->strides[i] = i == prototype->ndim - 1 ? 1 : managed->strides[i + 1] * managed->shape[i + 1];
        managed->shape[i] = prototype->shape[i];
        bytes *= (size_t)prototype->shape[i];
    }
    managed->memory = calloc(bytes + 1, 1);
    managed->versioned = (Versioned){1, 3, NULL, delete_versioned, 0, *prototype};
    managed->versioned.tensor.data = managed->memory;
    managed->versioned.tensor.byte_offset = 0;
    managed->versioned.tensor.shape = managed->shape;
    managed->versioned.tensor.strides = managed->strides;
    counters.allocated++;
    *out = &managed->versioned;
    return 0;
}

static int managed_to_object(Versioned *tensor, void **out) {
    if (adopter_fails != WORKS) {
        if (adopter_fails == FAILS_WITH_EXCEPTION)
            PyErr_SetString(PyExc_LookupError, "the stub adopter fails on demand");
        tensor->deleter(tensor); /* ownership was handed over, failure or not */
        return -1;
    }
    Array *self = (Array *)stub_type->tp_alloc(stub_type, 0);
    if (self == NULL) return -1;
    self->adopted = tensor;
    self->data = (char *)tensor->tensor.data + tensor->tensor.byte_offset;
    self->ndim = tensor->tensor.ndim;
    self->code = tensor->tensor.code;
    self->bits = tensor->tensor.bits;
    self->lanes = tensor->tensor.lanes;
    self->device_type = tensor->tensor.device_type;
    self->major = 1;
    memcpy(self->shape, tensor->tensor.shape, (size_t)self->ndim * sizeof *self->shape);
    memcpy(self->strides, tensor->tensor.strides, (size_t)self->ndim * sizeof *self->strides);
    counters.adopted++;
    *out = self;
    return 0;
}

static int current_work_stream(int32_t device_type, int32_t device_id, void **out) {
    (void)device_type, (void)device_id;
    counters.streams++;
    *out = NULL;
    return 0;
}

#define FUNCTIONS(borrow) allocate, managed_from_object, managed_to_object, borrow, current_work_stream
ExchangeAPI api = {1, 3, NULL, FUNCTIONS(borrow_from_object)};
ExchangeAPI api_without_borrow = {1, 3, NULL, FUNCTIONS(NULL)};
/* Another major version: whoever reads on without checking it calls NULL. */
ExchangeAPI api_chained = {.major = 2, .previous = &api};
ExchangeAPI api_future = {.major = 2};

/* ---- __dlpack__ ---- */

static void destroy_capsule(PyObject *capsule) {
    const char *name = PyCapsule_GetName(capsule);
    if (name != NULL && strncmp(name, "used_", 5) == 0) {
        counters.capsules_used++;
        return;
    }
    counters.capsules_unused++;
    retire(PyCapsule_GetPointer(capsule, name)); /* nobody took it, so it is still the producer's */
}

PyObject *make_capsule(Array *self, PyObject *Py_UNUSED(unused)) {
    Managed *managed = export_managed(self, self->legacy);
    if (managed == NULL) return NULL;
    const char *name = self->legacy ? "dltensor" : "dltensor_versioned";
    if (self->capsule_name != NULL && self->capsule_name != Py_None)
        name = PyUnicode_AsUTF8(self->capsule_name); /* lives as long as the array */
    counters.capsules++;
    return PyCapsule_New(managed, name, destroy_capsule);
}

PyObject *capsule_dlpack(Array *self, PyObject *args, PyObject *kwargs) {
    (void)args;
    if (self->refuses_max_version && kwargs != NULL && PyDict_GetItemString(kwargs, "max_version") != NULL) {
        PyErr_SetString(PyExc_TypeError, "__dlpack__() got an unexpected keyword argument 'max_version'");
        return NULL;
    }
    PyObject *answer;
    if (ask(self, kwargs, &answer) < 0) return NULL;
    if (answer != NULL && answer != Py_None) return answer;
    Py_XDECREF(answer);
    return make_capsule(self, NULL);
}
