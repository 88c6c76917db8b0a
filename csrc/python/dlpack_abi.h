/* dlpack_abi.h: the DLPack structures that cross the Python boundary (DLPack 1.x, and 0.x for legacy capsules).
 * Declared here so that building needs no other project's header; the layouts are the published ABI. */
#ifndef FUSEDNORM_DLPACK_ABI_H
#define FUSEDNORM_DLPACK_ABI_H

#include <stdint.h>

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_CUDA_MANAGED = 13 };

typedef struct {
    uint32_t major, minor;
} dl_version;

typedef struct {
    int32_t type, id;
} dl_device;

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} dl_dtype;

typedef struct {
    void *data;
    dl_device device;
    int32_t ndim;
    dl_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL: compact, row major */
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed_tensor {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed_tensor *self);
} dl_managed_tensor;

enum { DL_FLAG_READ_ONLY = 1, DL_FLAG_IS_COPIED = 2 };

typedef struct dl_managed_tensor_versioned {
    dl_version version;
    void *context;
    void (*deleter)(struct dl_managed_tensor_versioned *self);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed_tensor_versioned;

/* The C exchange API, DLPack 1.3: a table that a type carries as `__dlpack_c_exchange_api__`. The functions need the GIL,
 * return 0 or -1 with a Python exception set, and synchronise nothing. */
typedef struct dl_exchange_header {
    dl_version version;
    struct dl_exchange_header *previous;
} dl_exchange_header;

typedef struct {
    dl_exchange_header header;
    int (*allocate)(dl_tensor *prototype, dl_managed_tensor_versioned **out, void *error_context,
                    void (*set_error)(void *error_context, const char *kind, const char *message));
    int (*managed_from_object)(void *object, dl_managed_tensor_versioned **out);
    int (*managed_to_object)(dl_managed_tensor_versioned *stolen, void **out_object);
    int (*borrow_from_object)(void *object, dl_tensor *out); /* may be NULL; valid until control returns to Python */
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out_stream);
} dl_exchange_api;

#endif
