/* stub_producer.h: what stub_producer.c (Python types, module) and stub_exchange.c (DLPack's side) share.
 *
 * The structures are those of DLPack 1.3, declared here so that the tests agree with the standard, not with csrc/.
 */
#ifndef STUB_PRODUCER_H
#define STUB_PRODUCER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct Versioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct Versioned *);
    uint64_t flags;
    DLTensor tensor;
} Versioned;

typedef struct Legacy {
    DLTensor tensor;
    void *context;
    void (*deleter)(struct Legacy *);
} Legacy;

typedef struct ExchangeAPI {
    uint32_t major, minor;
    struct ExchangeAPI *previous;
    int (*allocate)(DLTensor *, Versioned **, void *, void (*set_error)(void *, const char *, const char *));
    int (*managed_from_object)(void *, Versioned **);
    int (*managed_to_object)(Versioned *, void **);
    int (*borrow_from_object)(void *, DLTensor *);
    int (*current_work_stream)(int32_t, int32_t, void **);
} ExchangeAPI;

enum { MAX_NDIM = 80 };
/* What Array.fail, allocator_fails and adopter_fails hold. */
enum { WORKS, FAILS_WITH_EXCEPTION, FAILS_SILENTLY };

/* A managed tensor of either kind. It keeps its array alive until its deleter runs; then its fields are made useless and
 * the memory is kept a while, so that a second deleter call is counted and a late reader finds nonsense. */
typedef struct Managed {
    union {
        Versioned versioned;
        Legacy legacy;
    };
    PyObject *array;
    void *memory; /* of the allocator */
    bool deleted;
    int64_t shape[MAX_NDIM], strides[MAX_NDIM];
} Managed;

typedef struct {
    PyObject_HEAD Py_buffer view;
    void *memory;       /* owned, when there is no view */
    Versioned *adopted; /* owned, when made by managed_to_object */
    char *data;
    int64_t shape[MAX_NDIM], strides[MAX_NDIM];
    unsigned long long byte_offset, flags;
    int ndim, device_type, device_id, fail;
    unsigned char code, bits;
    unsigned short lanes;
    unsigned major;
    char null_strides, null_shape, null_data,
        shared_shape;                               /* Stub: one static shape for all, overwritten by each borrow */
    char legacy, null_deleter, refuses_max_version; /* Capsule */
    PyObject *capsule_name, *hook, *on_delete;
} Array;

typedef struct {
    long long borrowed, exported, deleted, deleted_twice, allocated, freed, adopted, streams;
    long long capsules, capsules_used, capsules_unused, null_deleters;
} Counters;

extern Counters counters;
extern int allocator_fails, adopter_fails;
extern PyTypeObject *stub_type;
extern ExchangeAPI api, api_without_borrow, api_chained, api_future;

PyObject *make_capsule(Array *self, PyObject *unused);
PyObject *capsule_dlpack(Array *self, PyObject *args, PyObject *kwargs);

#endif
