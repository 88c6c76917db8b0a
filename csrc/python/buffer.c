/* buffer.c: memory of a result on its way to a framework, which takes it over by its own from_dlpack: our own in CPU
 * memory; on CUDA the framework's, which allocated it, lent it to us, and gets it back behind the work that fills it. */
#include "binding.h"

#include <stdlib.h>

enum { BUFFER_ALIGNMENT = 64 }; /* what JAX needs to share memory and not copy it */

typedef struct {
    PyObject_HEAD void *memory;
    bool on_cuda; /* the memory is the managed tensor's, of one kind or the other */
    dl_managed_tensor_versioned *versioned;
    dl_managed_tensor *legacy;
    void *work, *event; /* the stream that fills it, and a mark behind that work; NULL in a capture */
    int32_t device_id;
    int32_t ndim;
    fn_dtype dtype;
    int64_t shape[FN_MAX_NDIM], strides[FN_MAX_NDIM];
} fn_buffer;

/* Without memory yet. */
static fn_buffer *new_buffer(fn_state *state, const fn_result *result, int64_t *elements) {
    fn_buffer *buffer = PyObject_New(fn_buffer, state->buffer_type);
    if (!buffer) return NULL;
    buffer->memory = NULL;
    buffer->on_cuda = false;
    buffer->ndim = result->ndim;
    buffer->dtype = result->dtype;
    *elements = 1;
    for (int32_t i = result->ndim - 1; i >= 0; i--) {
        buffer->shape[i] = result->shape[i];
        buffer->strides[i] = *elements;
        if (__builtin_mul_overflow(*elements, result->shape[i], elements)) *elements = INT64_MAX / 8;
    }
    return buffer;
}

PyObject *fn_buffer_new(fn_state *state, const fn_result *result) {
    int64_t elements;
    fn_buffer *buffer = new_buffer(state, result, &elements);
    if (!buffer) return NULL;
    const size_t bytes = ((size_t)elements * (size_t)fn_dtypes[result->dtype].bytes + BUFFER_ALIGNMENT) &
                         ~(size_t)(BUFFER_ALIGNMENT - 1);
    buffer->memory = aligned_alloc(BUFFER_ALIGNMENT, bytes);
    if (!buffer->memory) {
        Py_DECREF(buffer);
        return PyErr_NoMemory();
    }
    return (PyObject *)buffer;
}

PyObject *fn_buffer_adopt(fn_state *state, fn_array *array, void *work) {
    void *event = NULL;
    const fn_status status = fn_cuda_event_record(array->view.device_id, work, &event);
    if (status != FN_OK) {
        fn_raise(status);
        return NULL;
    }
    int64_t elements;
    const fn_result result = {array->view.ndim, array->view.shape, array->view.dtype};
    fn_buffer *buffer = new_buffer(state, &result, &elements);
    if (!buffer) {
        fn_cuda_event_finish(event);
        return NULL;
    }
    buffer->memory = array->view.data;
    buffer->on_cuda = true;
    buffer->versioned = array->versioned;
    buffer->legacy = array->legacy;
    array->versioned = NULL;
    array->legacy = NULL;
    buffer->work = work;
    buffer->event = event;
    buffer->device_id = array->view.device_id;
    return (PyObject *)buffer;
}

/* The last user is gone, perhaps before the kernel that fills the memory has run. */
static void release_cuda(const fn_buffer *buffer) {
    fn_pending_push(buffer->event, buffer->versioned, buffer->legacy);
    fn_pending_drain();
}

static void buffer_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (((fn_buffer *)self)->on_cuda) release_cuda((fn_buffer *)self);
    else free(((fn_buffer *)self)->memory);
    PyObject_Free(self);
    Py_DECREF(type);
}

static void release_owner(void *owner) {
    const PyGILState_STATE gil = PyGILState_Ensure(); /* a consumer may drop a tensor on any thread */
    Py_DECREF((PyObject *)owner);
    PyGILState_Release(gil);
}

static void delete_versioned(dl_managed_tensor_versioned *managed) {
    release_owner(managed->context);
    free(managed);
}

static void delete_legacy(dl_managed_tensor *managed) {
    release_owner(managed->context);
    free(managed);
}

/* Runs when a capsule dies; one that was consumed has another name. */
static void drop_versioned(PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor_versioned")) return;
    delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
}

static void drop_legacy(PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    delete_legacy(PyCapsule_GetPointer(capsule, "dltensor"));
}

static dl_tensor buffer_tensor(fn_buffer *buffer) {
    return (dl_tensor){
        .data = buffer->memory,
        .device = {buffer->on_cuda ? DL_CUDA : DL_CPU, buffer->on_cuda ? buffer->device_id : 0},
        .ndim = buffer->ndim,
        .dtype = {(uint8_t)fn_dtypes[buffer->dtype].dlpack_code, (uint8_t)(8 * fn_dtypes[buffer->dtype].bytes), 1},
        .shape = buffer->shape,
        .strides = buffer->strides,
    };
}

/* The consumer's stream, by DLPack's numbers, goes on behind the work. */
static int order_consumer(const fn_buffer *buffer, PyObject *stream) {
    long long number = 1; /* None: the legacy default stream */
    if (stream && stream != Py_None) number = PyLong_AsLongLong(stream);
    if (number == -1) return PyErr_Occurred() ? -1 : 0; /* the consumer orders itself */
    void *consumer = fn_stream_handle((uintptr_t)number);
    if (consumer == buffer->work) return 0;
    const fn_status status = fn_cuda_order_streams(buffer->device_id, buffer->work, consumer);
    return status == FN_OK ? 0 : fn_raise(status);
}

static PyObject *buffer_dlpack(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = NULL, *max_version = NULL, *device = NULL, *copy = NULL; /* borrowed */
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$OOOO:__dlpack__", names, &stream, &max_version, &device, &copy))
        return NULL;
    const bool versioned = max_version && PyTuple_Check(max_version) && PyTuple_GET_SIZE(max_version) > 0 &&
                           PyLong_AsLong(PyTuple_GET_ITEM(max_version, 0)) >= 1;
    if (PyErr_Occurred()) return NULL;
    if (((fn_buffer *)self)->on_cuda && order_consumer((fn_buffer *)self, stream) < 0) return NULL;
    PyObject *capsule;
    if (versioned) {
        dl_managed_tensor_versioned *managed = malloc(sizeof *managed);
        if (!managed) return PyErr_NoMemory();
        *managed = (dl_managed_tensor_versioned){
            {1, 0}, Py_NewRef(self), delete_versioned, 0, buffer_tensor((fn_buffer *)self)};
        capsule = PyCapsule_New(managed, "dltensor_versioned", drop_versioned);
        if (!capsule) delete_versioned(managed);
    } else {
        dl_managed_tensor *managed = malloc(sizeof *managed);
        if (!managed) return PyErr_NoMemory();
        *managed = (dl_managed_tensor){buffer_tensor((fn_buffer *)self), Py_NewRef(self), delete_legacy};
        capsule = PyCapsule_New(managed, "dltensor", drop_legacy);
        if (!capsule) delete_legacy(managed);
    }
    return capsule;
}

static PyObject *buffer_dlpack_device(PyObject *self, PyObject *unused) {
    (void)unused;
    const fn_buffer *buffer = (fn_buffer *)self;
    return Py_BuildValue("(ii)", buffer->on_cuda ? DL_CUDA : DL_CPU, buffer->on_cuda ? (int)buffer->device_id : 0);
}

static PyMethodDef buffer_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))buffer_dlpack, METH_VARARGS | METH_KEYWORDS, NULL},
    {"__dlpack_device__", buffer_dlpack_device, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot buffer_slots[] = {
    {Py_tp_doc, "Memory of a result, on its way to a framework's from_dlpack."},
    {Py_tp_methods, buffer_methods},
    {Py_tp_dealloc, buffer_dealloc},
    {0, NULL},
};

PyType_Spec fn_buffer_spec = {
    .name = "fusednorm._core._Buffer",
    .basicsize = sizeof(fn_buffer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = buffer_slots,
};
