/* pending.c: memory that has to outlive the queued kernel that uses it.
 *
 * A capsule's producer takes its memory back when its deleter runs, and knows nothing of our kernel. So the deleter runs
 * once an event behind the kernel is done: looked at when a later call begins, for at most PENDING_CALLS calls, and waited
 * for when the module goes. The GIL guards the list. Torch tensors and CuPy arrays are not kept: their memory is reused
 * in the order of the stream that the kernel is on, or that waits for it; with stream=, CuPy arrays are.
 */
#include "binding.h"

#include <unistd.h>

enum { PENDING_CALLS = 64 };

typedef struct {
    void *event;
    dl_managed_tensor_versioned *versioned[FN_MOST_OPERANDS];
    dl_managed_tensor *legacy[FN_MOST_OPERANDS];
    PyObject *objects[FN_MOST_OPERANDS];
} pending_call;

static pending_call pending[PENDING_CALLS]; /* oldest first */
static pid_t owner;
int fn_pending_count;

/* Deleters may run Python code, which may call us again: the entry has left the list by then. */
static void release(pending_call *call) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    for (int i = 0; i < FN_MOST_OPERANDS; i++) {
        if (call->versioned[i] && call->versioned[i]->deleter) call->versioned[i]->deleter(call->versioned[i]);
        if (call->legacy[i] && call->legacy[i]->deleter) call->legacy[i]->deleter(call->legacy[i]);
        Py_XDECREF(call->objects[i]);
        if (PyErr_Occurred()) PyErr_WriteUnraisable(NULL);
    }
    PyErr_Restore(type, value, traceback);
}

static pending_call take_out(int index) {
    const pending_call call = pending[index];
    memmove(&pending[index], &pending[index + 1], sizeof pending[0] * (size_t)(--fn_pending_count - index));
    return call;
}

/* A forked child inherits the list but not the device: its memory is the parent's to release. */
static bool is_ours(void) {
    if (fn_pending_count == 0) return false;
    if (owner == getpid()) return true;
    fn_pending_count = 0;
    return false;
}

void fn_pending_drain(void) {
    if (!is_ours()) return;
    for (int i = 0; i < fn_pending_count;) {
        if (!fn_cuda_event_is_done(pending[i].event)) {
            i++;
            continue;
        }
        pending_call call = take_out(i);
        fn_cuda_event_finish(call.event);
        release(&call);
        i = 0; /* the list may be another one by now */
    }
}

static void finish_oldest(void) {
    pending_call call = take_out(0);
    Py_BEGIN_ALLOW_THREADS fn_cuda_event_finish(call.event);
    Py_END_ALLOW_THREADS release(&call);
}

void fn_pending_finish(void) {
    while (is_ours()) finish_oldest();
}

static void push(const pending_call *call) {
    while (is_ours() && fn_pending_count == PENDING_CALLS) finish_oldest();
    owner = getpid();
    pending[fn_pending_count++] = *call;
}

void fn_pending_push(void *event, dl_managed_tensor_versioned *versioned, dl_managed_tensor *legacy) {
    push(&(pending_call){.event = event, .versioned = {versioned}, .legacy = {legacy}});
}

/* The framework that owns the array reuses its memory in an order that the work is not part of. */
static bool keeps_object(const fn_work *work, const fn_array *array) {
    const fn_door door =
        array->through.door; /* a torch tensor: fn_record_torch. An interface's lifetime is the caller's */
    return (door == FN_DOOR_CUPY || door == FN_DOOR_EXCHANGE) && work->given && array->stream != work->handle;
}

int fn_pending_keep(const fn_work *work, fn_array *const *arrays, int count, int32_t device) {
    bool any = false;
    for (int i = 0; i < count; i++)
        any |= arrays[i]->view.device_type == FN_CUDA &&
               (arrays[i]->versioned || arrays[i]->legacy || keeps_object(work, arrays[i]));
    if (!any) return 0;
    pending_call call = {0};
    const fn_status status = fn_cuda_event_record(device, work->handle, &call.event);
    if (status != FN_OK) return fn_raise(status);
    if (!call.event) return 0; /* a capture: nothing runs now, and a replay is the caller's business */
    for (int i = 0; i < count; i++) {
        fn_array *array = arrays[i];
        if (array->view.device_type != FN_CUDA) continue;
        call.versioned[i] = array->versioned;
        call.legacy[i] = array->legacy;
        array->versioned = NULL;
        array->legacy = NULL;
        if (keeps_object(work, array)) call.objects[i] = Py_NewRef(array->object);
    }
    push(&call);
    return 0;
}
