/* binding.h: what the files of the Python boundary share. Nothing outside csrc/python includes Python.h.
 *
 *   module.c     the module: its state, its method table, info() and the thread count
 *   norms.c      the three norm functions: arguments -> arrays -> fn_norm -> results
 *   arguments.c  METH_FASTCALL parsing, scalars, flags, dtypes by any name
 *   array.c      any object -> fn_array: which door it comes through, and how it is given back
 *   dlpack.c     DLPack in: capsules, and the C exchange API
 *   buffer.c     DLPack out: memory of ours that a framework takes over
 *   ndarray.c    NumPy by its C API
 *   torch.c      what DLPack does not say of a torch tensor: gradients, negative bit, version counter
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
    FN_DOOR_NDARRAY,  /* NumPy's C API */
    FN_DOOR_TORCH,    /* torch's C exchange API, and the checks in torch.c */
    FN_DOOR_EXCHANGE, /* another library's C exchange API */
    FN_DOOR_DLPACK,   /* __dlpack__: runs Python code */
    FN_DOOR_JAX       /* __dlpack__ of an immutable array */
} fn_door;

static inline bool fn_runs_python(fn_door door) { return door == FN_DOOR_DLPACK || door == FN_DOOR_JAX; }

typedef struct {
    fn_door door;
    const dl_exchange_api *api; /* TORCH and EXCHANGE */
} fn_door_info;

/* Nearly all arrays; keeps a call's frame small, since a foreign __dlpack__ may call us again from within. */
enum { FN_FEW_DIMENSIONS = 6 };

typedef struct {
    fn_tensor view;
    PyObject *object; /* borrowed: the caller's argument */
    fn_door_info through;
    dl_managed_tensor_versioned *versioned; /* owned, or NULL */
    dl_managed_tensor *legacy;              /* owned, or NULL */
    bool copied;                            /* the producer made a copy: useless as an output */
    int64_t *shape, *stride_bytes;          /* what view points at: in `few`, or in `many` */
    int64_t few[2 * FN_FEW_DIMENSIONS];
    int64_t *many; /* owned, or NULL */
} fn_array;

/* ---- module state --------------------------------------------------------------------------------------------------- */

enum { FN_DOOR_CACHE = 16 };

typedef struct {
    bool ready;
    PyTypeObject *tensor, *parameter;
    const dl_exchange_api *api;
    PyObject *empty_like, *is_grad_enabled, *increment_version, *unpack_dual, *contiguous_format;
    PyObject *requires_grad, *is_neg; /* descriptors of torch.Tensor */
    PyObject *forward_ad_globals;
    PyObject *dtypes[FN_DTYPE_COUNT];
    PyObject *empty_like_keywords; /* ("dtype", "memory_format") */
} fn_torch;

#define FN_STATE_OBJECTS(X)                                                                                            \
    X(text_dlpack, "__dlpack__")                                                                                       \
    X(text_dlpack_device, "__dlpack_device__")                                                                         \
    X(text_exchange_api, "__dlpack_c_exchange_api__")                                                                  \
    X(text_cuda_interface, "__cuda_array_interface__")                                                                 \
    X(text_array_namespace, "__array_namespace__")                                                                     \
    X(text_from_dlpack, "from_dlpack")                                                                                 \
    X(text_name, "name")                                                                                               \
    X(text_current_level, "_current_level")                                                                            \
    X(text_tangent, "tangent")

/* Functions that take keywords; fn_signatures has a row for each. */
enum { FN_SIGNATURE_RMS_NORM, FN_SIGNATURE_FUSED_ADD_RMSNORM, FN_SIGNATURE_RMS_NORM_BATCH_INVARIANT, FN_SIGNATURES };

typedef struct {
    PyTypeObject *memmap, *buffer_type;
    PyTypeObject *bfloat16; /* ml_dtypes' scalar type once it has been seen */
    fn_torch torch;
    struct {
        PyTypeObject *type; /* owned */
        fn_door_info info;
    } doors[FN_DOOR_CACHE];
    PyObject *max_version_keywords, *max_version; /* ("max_version",) and (1, 3) */
    PyObject **parameter_names[FN_SIGNATURES];    /* per function, interned; see arguments.c */
#define FN_STATE_MEMBER(member, text) PyObject *member;
    FN_STATE_OBJECTS(FN_STATE_MEMBER)
#undef FN_STATE_MEMBER
} fn_state;

fn_state *fn_state_of(PyObject *module);

/* ---- array.c -------------------------------------------------------------------------------------------------------- */

/* `name` as in error texts: "rms_norm: weight". Finds the door; runs Python code at most at the first sight of a type. */
int fn_array_open(fn_state *state, const char *function, const char *name, PyObject *object, fn_array *array);
/* For doors that run Python code: reaches the memory now. Nothing for the others. */
int fn_array_import_foreign(fn_state *state, const char *function, fn_array *array);
/* For the other doors: reaches the memory. `own`: keep it alive while the GIL is released. */
int fn_array_import_native(fn_state *state, const char *function, fn_array *array, bool own);
void fn_array_close(fn_array *array);
/* Makes room for `ndim` sizes and strides, and points the view at it. */
int fn_array_reserve(fn_array *array, int32_t ndim);

/* An uninitialised C-contiguous array like `like` with another dtype, in its framework; for DLPACK and JAX a fn_buffer
 * that fn_array_deliver turns into the framework's array once it is filled. New reference, or NULL. */
PyObject *fn_array_allocate(fn_state *state, const char *function, const fn_array *like, fn_dtype dtype);
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
int fn_import_capsule(fn_state *state, const char *function, fn_array *array);
int fn_import_exchange(const char *function, fn_array *array, bool own);
PyObject *fn_exchange_allocate(const char *function, const fn_array *like, fn_dtype dtype);

/* ---- buffer.c ------------------------------------------------------------------------------------------------------- */

PyObject *fn_buffer_new(fn_state *state, const fn_array *like, fn_dtype dtype);
extern PyType_Spec fn_buffer_spec;

/* ---- ndarray.c ------------------------------------------------------------------------------------------------------ */

int fn_ndarray_ready(fn_state *state);
bool fn_is_exact_ndarray(PyObject *object);
bool fn_is_ndarray(PyObject *object);
int fn_import_ndarray(fn_state *state, const char *function, fn_array *array);
PyObject *fn_ndarray_allocate(fn_state *state, const char *function, const fn_array *like, fn_dtype dtype);
/* 1 and *dtype for a NumPy dtype object of ours, 0 for another object, -1 for a NumPy dtype that is not ours. */
int fn_dtype_from_descriptor(fn_state *state, PyObject *object, fn_dtype *dtype);

/* ---- torch.c -------------------------------------------------------------------------------------------------------- */

/* Loads the names that torch.c needs if torch is imported already; 0 also if it is not. */
int fn_torch_ready(fn_state *state);
/* Refuses tensors among these whose gradient the call would lose, or whose values are not what lies in memory. Lets other
 * Python threads run, so it comes before any memory is borrowed. */
int fn_torch_check(fn_state *state, const char *function, fn_array *const *arrays, int count);
PyObject *fn_torch_allocate(fn_state *state, const fn_array *like, fn_dtype dtype);
/* Tells autograd that the torch tensors among these, at most 2, were written. */
int fn_torch_mark_written(fn_state *state, fn_array *const *arrays, int count);

/* ---- norms.c -------------------------------------------------------------------------------------------------------- */

extern const fn_signature *const fn_signatures[FN_SIGNATURES];
PyObject *fn_py_rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *fn_py_fused_add_rmsnorm(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *fn_py_rms_norm_batch_invariant(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);

#endif
