/* binding.h: what the files of the Python boundary share. Nothing outside csrc/python includes Python.h.
 *
 *   module.c     the module: its state, its method table, info() and the thread count
 *   norms.c      the three norm functions: arguments -> fn_call, with fn_norm -> results
 *   mm.c         mm_dtype and what router_logits runs: arguments -> fn_call, with fn_mm -> results
 *   call.c       one call of any operation: arrays in, streams, the work, results out
 *   arguments.c  METH_FASTCALL parsing, scalars, flags, dtypes by any name
 *   array.c      any object -> fn_array: which door it comes through, and how it is given back
 *   dlpack.c     DLPack in: capsules, and the C exchange API
 *   buffer.c     DLPack out: memory of a result that a framework takes over
 *   ndarray.c    NumPy by its C API
 *   torch.c      what DLPack does not say of a torch tensor: gradients, negative bit, version counter
 *   cupy.c       CuPy by its attributes
 *   interface.c  __cuda_array_interface__
 *   stream.c     CUDA: the stream that a call runs on, and the order between it and the arrays' own streams
 *   pending.c    CUDA: memory that has to outlive the queued kernel that uses it
 *   device.c     CUDA: what is there, warmup(), the promise about weights
 *
 * Who decides what about streams: an importer (dlpack.c, cupy.c, interface.c) says which stream an array's own work is
 * queued on (fn_array.stream); call.c picks the call's stream (fn_work); stream.c orders the two; fn_norm and fn_mm queue.
 *
 * A borrowed PyObject * is marked so where it is declared; functions return 0 or -1 with an exception set.
 */
#ifndef FUSEDNORM_BINDING_H
#define FUSEDNORM_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../fusednorm.h"
#include "dlpack_abi.h"

/* ---- arrays --------------------------------------------------------------------------------------------------------- */

/* The door through which an object's memory is reached; a function of its type alone. */
typedef enum {
    FN_DOOR_NDARRAY,       /* NumPy's C API */
    FN_DOOR_TORCH,         /* torch's C exchange API, and the checks in torch.c */
    FN_DOOR_EXCHANGE,      /* another library's C exchange API */
    FN_DOOR_DLPACK,        /* __dlpack__: runs Python code, as all that follow do */
    FN_DOOR_JAX,           /* __dlpack__ of an immutable array */
    FN_DOOR_CUPY,          /* attributes of a cupy.ndarray */
    FN_DOOR_CUDA_INTERFACE /* __cuda_array_interface__ and nothing better */
} fn_door;

enum { FN_DOORS_OF_PYTHON = 1 << FN_DOOR_DLPACK | 1 << FN_DOOR_JAX | 1 << FN_DOOR_CUPY | 1 << FN_DOOR_CUDA_INTERFACE };

static inline bool fn_runs_python(fn_door door) { return (FN_DOORS_OF_PYTHON >> door & 1) != 0; }
static inline bool fn_exports_capsules(fn_door door) { return door == FN_DOOR_DLPACK || door == FN_DOOR_JAX; }

typedef struct {
    fn_door door;
    const dl_exchange_api *api; /* TORCH and EXCHANGE */
    bool old_torch;             /* DLPACK: a tensor of a torch without the C exchange API */
} fn_door_info;

/* The CUDA stream that a call runs on. */
typedef struct {
    bool given; /* by stream= */
    bool known;
    void *handle; /* NULL: the legacy default stream */
} fn_work;

/* Nearly all arrays; keeps a call's frame small, since a foreign __dlpack__ may call us again from within. */
enum { FN_FEW_DIMENSIONS = 6 };

typedef struct {
    fn_tensor view;
    PyObject *object; /* borrowed: the caller's argument */
    fn_door_info through;
    dl_managed_tensor_versioned *versioned; /* owned, or NULL */
    dl_managed_tensor *legacy;              /* owned, or NULL */
    bool copied;                            /* the producer made a copy: useless as an output */
    bool any_device;                        /* CUDA: managed or no memory, which every device reaches */
    bool has_stream;                        /* CUDA: the array's owner says which stream its work is queued on: */
    void *stream;
    int64_t *shape, *stride_bytes; /* what view points at: in `few`, or in `many` */
    int64_t few[2 * FN_FEW_DIMENSIONS];
    int64_t *many; /* owned, or NULL */
} fn_array;

/* ---- module state --------------------------------------------------------------------------------------------------- */

enum { FN_DOOR_CACHE = 16 };

typedef struct {
    bool ready;
    PyTypeObject *tensor, *parameter;
    const dl_exchange_api *api;
    PyObject *empty_like, *new_empty, *is_grad_enabled, *increment_version, *unpack_dual, *contiguous_format;
    PyObject *requires_grad, *is_neg; /* descriptors of torch.Tensor */
    PyObject *forward_ad_globals;
    PyObject *dtypes[FN_DTYPE_COUNT];
    PyObject *empty_like_keywords; /* ("dtype", "memory_format") */
    PyObject *new_empty_keywords;  /* ("dtype",) */
    PyTypeObject *old_tensor;      /* torch.Tensor of a torch without the C exchange API */
} fn_torch;

typedef struct {
    bool ready;
    PyTypeObject *ndarray;
    PyObject *empty, *get_current_stream, *get_device;
} fn_cupy;

#define FN_STATE_OBJECTS(X)                                                                                            \
    X(text_dlpack, "__dlpack__")                                                                                       \
    X(text_dlpack_device, "__dlpack_device__")                                                                         \
    X(text_exchange_api, "__dlpack_c_exchange_api__")                                                                  \
    X(text_cuda_interface, "__cuda_array_interface__")                                                                 \
    X(text_array_namespace, "__array_namespace__")                                                                     \
    X(text_from_dlpack, "from_dlpack")                                                                                 \
    X(text_name, "name")                                                                                               \
    X(text_current_level, "_current_level")                                                                            \
    X(text_tangent, "tangent")                                                                                         \
    X(text_data, "data")                                                                                               \
    X(text_ptr, "ptr")                                                                                                 \
    X(text_device_id, "device_id")                                                                                     \
    X(text_shape, "shape")                                                                                             \
    X(text_strides, "strides")                                                                                         \
    X(text_dtype, "dtype")

/* Functions that take keywords; fn_signatures has a row for each. */
enum {
    FN_SIGNATURE_RMS_NORM,
    FN_SIGNATURE_FUSED_ADD_RMSNORM,
    FN_SIGNATURE_RMS_NORM_BATCH_INVARIANT,
    FN_SIGNATURE_MM_DTYPE,
    FN_SIGNATURE_LINEAR,
    FN_SIGNATURE_WARMUP,
    FN_SIGNATURES
};

typedef struct {
    PyTypeObject *memmap, *buffer_type;
    PyTypeObject *bfloat16; /* ml_dtypes' scalar type once it has been seen */
    fn_torch torch;
    struct {
        PyTypeObject *type; /* owned */
        fn_door_info info;
    } doors[FN_DOOR_CACHE];
    fn_cupy cupy;
    PyObject *max_version_keywords, *max_version; /* ("max_version",) and (1, 3) */
    PyObject *stream_keyword, *stream_keywords;   /* ("stream",) and ("stream", "max_version") */
    PyObject *streams;                            /* fusednorm._streams once it is needed */
    PyObject *weights_promise;                    /* a ContextVar, unset until the first context is entered */
    bool weights_promised_in_contexts;            /* some context has been entered */
    bool weights_promised;                        /* for the whole process */
    bool cuda_is_there;                           /* known to be usable */
    PyObject **parameter_names[FN_SIGNATURES];    /* per function, interned; see arguments.c */
#define FN_STATE_MEMBER(member, text) PyObject *member;
    FN_STATE_OBJECTS(FN_STATE_MEMBER)
#undef FN_STATE_MEMBER
} fn_state;

fn_state *fn_state_of(PyObject *module);

/* ---- array.c -------------------------------------------------------------------------------------------------------- */

/* `name` as in error texts: "rms_norm: weight". Finds the door; runs Python code at most at the first sight of a type. */
int fn_array_open(fn_state *state, const char *function, const char *name, PyObject *object, fn_array *array);
/* For doors that run Python code: reaches the memory now, or for those that export capsules learns the device first. */
int fn_array_reach(fn_state *state, const char *function, fn_array *array);
/* For the other doors: reaches the memory. `own`: keep it alive while the GIL is released. */
int fn_array_import_native(fn_state *state, const char *function, fn_array *array, bool own);
void fn_array_close(fn_array *array);
/* Makes room for `ndim` sizes and strides, and points the view at it. */
int fn_array_reserve(fn_array *array, int32_t ndim);

/* A new result. The shape may be another array's own. */
typedef struct {
    int32_t ndim;
    const int64_t *shape;
    fn_dtype dtype;
} fn_result;

/* Its shape as a tuple of Python's. New reference, or NULL. */
PyObject *fn_result_shape(const fn_result *result);
/* An uninitialised C-contiguous array in the framework and on the device of `like`; for DLPACK and JAX in CPU memory a
 * fn_buffer that fn_array_deliver turns into the framework's array once it is filled (on CUDA, call.c makes one around the
 * framework's own memory). New reference, or NULL. */
PyObject *fn_array_allocate(fn_state *state, const char *function, const fn_array *like, const fn_result *result,
                            const fn_work *work);
PyObject *fn_array_deliver(fn_state *state, const fn_array *like, PyObject *allocated /* stolen */);

/* Raises the exception of a failed status. */
int fn_raise(fn_status status);

/* "module.Type" of an object, for error texts; the text lives as long as the type. */
const char *fn_type_name(PyObject *object);
static inline const char *fn_article(PyObject *object) { return object == Py_None ? "" : "a "; }

/* ---- arguments.c ---------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *function;
    const char *const *names;
    int count, positional, required;
    int number; /* index into fn_state.parameter_names */
} fn_signature;

int fn_signature_ready(fn_state *state, const fn_signature *signature);
/* values[count]: borrowed, NULL where not given. */
int fn_parse(fn_state *state, const fn_signature *signature, PyObject *const *args, Py_ssize_t positional,
             PyObject *keywords, PyObject **values);
int fn_parse_double(fn_state *state, const char *function, const char *name, PyObject *object, double *value);
/* ValueError that shows the number. */
void fn_raise_out_of_range(const char *function, const char *name, PyObject *number, const char *allowed);
int fn_parse_flag(const char *function, const char *name, PyObject *object, bool *value);
/* Any spelling of a dtype: a name, a NumPy dtype or scalar type, a torch or ml_dtypes or JAX dtype. */
int fn_parse_dtype(fn_state *state, const char *function, const char *name, PyObject *object, fn_dtype *dtype);

/* ---- dlpack.c ------------------------------------------------------------------------------------------------------- */

const dl_exchange_api *fn_exchange_api_of(fn_state *state, PyTypeObject *type); /* NULL without an exception: none */
/* Asks the object for its device alone. */
int fn_capsule_device(fn_state *state, const char *function, fn_array *array);
/* `work`: what the producer shall order before (CUDA); NULL in CPU memory. */
int fn_import_capsule(fn_state *state, const char *function, fn_array *array, const fn_work *work);
int fn_import_exchange(fn_state *state, const char *function, fn_array *array, bool own);
PyObject *fn_exchange_allocate(const char *function, const fn_array *like, const fn_result *result);

/* ---- buffer.c ------------------------------------------------------------------------------------------------------- */

PyObject *fn_buffer_new(fn_state *state, const fn_result *result);
/* A buffer around the CUDA memory that a capsule gave `array`, which `work` is filling; takes the managed tensor over. */
PyObject *fn_buffer_adopt(fn_state *state, fn_array *array, void *work);
extern PyType_Spec fn_buffer_spec;

/* ---- ndarray.c ------------------------------------------------------------------------------------------------------ */

int fn_ndarray_ready(fn_state *state);
bool fn_is_exact_ndarray(PyObject *object);
bool fn_is_ndarray(PyObject *object);
int fn_import_ndarray(fn_state *state, const char *function, fn_array *array);
PyObject *fn_ndarray_allocate(fn_state *state, const char *function, const fn_result *result);
PyObject *fn_new_descriptor(fn_state *state, const char *function, fn_dtype dtype); /* a NumPy dtype object */
/* 1 and *dtype for a NumPy dtype object of ours, 0 for another object, -1 for a NumPy dtype that is not ours. */
int fn_dtype_from_descriptor(fn_state *state, PyObject *object, fn_dtype *dtype);

/* ---- torch.c -------------------------------------------------------------------------------------------------------- */

/* Loads the names that torch.c needs if torch is imported already; 0 also if it is not. */
int fn_torch_ready(fn_state *state);
/* Refuses tensors among these whose gradient the call would lose, or whose values are not what lies in memory. Lets other
 * Python threads run, so it comes before any memory is borrowed. */
int fn_torch_check(fn_state *state, const char *function, fn_array *const *arrays, int count);
PyObject *fn_torch_allocate(fn_state *state, const fn_array *like, const fn_result *result, const fn_work *work);
/* Tells autograd that the torch tensors among these, at most 2, were written. */
int fn_torch_mark_written(fn_state *state, fn_array *const *arrays, int count);

/* ---- cupy.c --------------------------------------------------------------------------------------------------------- */

int fn_cupy_ready(fn_state *state); /* as fn_torch_ready */
int fn_import_cupy(fn_state *state, const char *function, fn_array *array);
PyObject *fn_cupy_allocate(fn_state *state, const char *function, const fn_array *like, const fn_result *result,
                           const fn_work *work);

/* ---- interface.c ---------------------------------------------------------------------------------------------------- */

int fn_import_cuda_interface(fn_state *state, const char *function, fn_array *array);

/* ---- stream.c ------------------------------------------------------------------------------------------------------- */

/* A handle as NULL (legacy default), 2 (per thread) or a cudaStream_t: CUDA's 0 and 1 are the same stream. */
static inline void *fn_stream_handle(uintptr_t number) { return number <= 1 ? NULL : (void *)number; }
/* The value of stream=, any object. */
int fn_parse_stream(const char *function, PyObject *object, fn_work *work);
/* Fills in has_stream and stream of an array that came through an exchange API; the others have theirs. */
int fn_array_stream(fn_array *array);
/* A function of fusednorm._streams, the rare cases that are written in Python. New reference, or NULL. */
PyObject *fn_streams_call(fn_state *state, const char *name, const char *format, ...);
/* Orders the work stream after (before the work) or before (after it) the streams of these arrays, where that is ours. */
int fn_order_before_work(const fn_work *work, fn_array *const *arrays, int count, int32_t device);
int fn_order_after_work(const fn_work *work, fn_array *const *arrays, int count, int32_t device);
/* Tells torch that memory of its tensors among these is in use on a stream that is not their own. */
int fn_record_torch(fn_state *state, const fn_work *work, fn_array *const *arrays, int count);

/* ---- pending.c ------------------------------------------------------------------------------------------------------ */

extern int fn_pending_count;
/* Releases what is finished. May run Python code. */
void fn_pending_drain(void);
/* Waits for all of it. */
void fn_pending_finish(void);
/* Takes over what these arrays hold and must not be released before the work queued so far. */
int fn_pending_keep(const fn_work *work, fn_array *const *arrays, int count, int32_t device);
/* The same for one managed tensor (one of the two) with its event, all taken over. */
void fn_pending_push(void *event, dl_managed_tensor_versioned *versioned, dl_managed_tensor *legacy);

/* ---- device.c ------------------------------------------------------------------------------------------------------- */

/* RuntimeError that names the argument if no array on CUDA can be taken here. */
int fn_require_cuda(fn_state *state, const char *function, const fn_array *array, const char *where);
bool fn_weights_promised(fn_state *state);
PyObject *fn_cuda_info_dict(void);
PyObject *fn_py_warmup(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *fn_py_force_cuda_schedule(PyObject *module, PyObject *name);
PyObject *fn_py_force_cuda_product(PyObject *module, PyObject *name);
PyObject *fn_py_get_weights_are_constant(PyObject *module, PyObject *unused);
PyObject *fn_py_set_weights_are_constant(PyObject *module, PyObject *constant);
PyObject *fn_py_promise_weights(PyObject *module, PyObject *constant);

/* ---- call.c --------------------------------------------------------------------------------------------------------- */

enum { FN_MOST_OPERANDS = 6 };

typedef struct fn_call fn_call;

/* What call.c has to know of an operation. Its operands are numbered: first the inputs, of which number 0 decides the device,
 * then the outputs. Output number k, where it is new, belongs to the framework of input number k and has its dtype; the
 * first may have out_dtype instead. */
typedef struct {
    int inputs, operands;
    bool in_place; /* output number k may be exactly input number k */
    /* What remains to be checked of the arguments, which may run Python code; NULL: nothing. */
    int (*check)(fn_call *call, fn_array *const *array);
    /* Fills in the shape of a new output in place of its input's; NULL: nothing to fill in. The shape lives in `room`. */
    int (*reshape)(const fn_call *call, fn_array *const *array, fn_result *result, int64_t *room);
    /* How much there is to do, in units of the time that a norm takes for an element. */
    double (*effort)(const fn_call *call, fn_array *const *array);
    /* Does it. On the CPU perhaps without the GIL. `array`: NULL where absent. */
    fn_status (*compute)(const fn_call *call, fn_array *const *array);
} fn_call_kind;

struct fn_call {
    fn_state *state;
    const fn_call_kind *operation;
    const char *function;
    const char *const *names;          /* of the operands */
    PyObject *given[FN_MOST_OPERANDS]; /* borrowed; NULL: not given */
    bool allocate[FN_MOST_OPERANDS];   /* outputs: make a result */
    PyObject *out_dtype;               /* borrowed; NULL: not given */
    PyObject *stream;                  /* borrowed; NULL: not given */
    fn_work work;                      /* CUDA: its handle is the stream to queue the work on */
    bool weights_are_constant;         /* CUDA */
};

/* The results in `results`, by the outputs' numbers, new references. */
int fn_run_call(fn_call *call, PyObject **results);

static inline PyObject *fn_unless_none(PyObject *object) { return object == Py_None ? NULL : object; }
static inline const fn_tensor *fn_view_of(const fn_array *array) { return array ? &array->view : NULL; }
/* As a double: it may be more than any integer. */
double fn_elements_of(const fn_tensor *view);

/* ---- norms.c, mm.c -------------------------------------------------------------------------------------------------- */

extern const fn_signature fn_rms_norm_signature, fn_fused_add_rmsnorm_signature, fn_rms_norm_batch_invariant_signature;
extern const fn_signature fn_mm_dtype_signature, fn_linear_signature;
extern const fn_signature fn_warmup_signature;                 /* device.c */
extern const fn_signature *const fn_signatures[FN_SIGNATURES]; /* module.c */
PyObject *fn_py_rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *fn_py_fused_add_rmsnorm(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *fn_py_rms_norm_batch_invariant(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *fn_py_mm_dtype(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *fn_py_linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);

#endif
