/* cuda.h: what the host half of csrc/cuda shares: one way to call the runtime, one way to launch. */
#ifndef FUSEDNORM_CUDA_H
#define FUSEDNORM_CUDA_H

#include "../fusednorm.h"

#include <cuda_runtime_api.h>
#include <stdatomic.h>

static inline int64_t fn_divide_up(int64_t size, int64_t part) { return size / part + (size % part != 0); }

typedef struct {
    int multiprocessors;
    bool clusters; /* thread block clusters and programmatic dependent launch: compute capability 9.0 and newer, in the
                      device and in the code that it runs */
    bool exactly_90;  /* compute capability 9.0 itself: it runs what was compiled for it alone (sm_90a) */
    int shared_bytes; /* that a block can have */
} fn_cuda_properties;

/* Read once for each device. */
fn_status fn_cuda_properties_of(int32_t device, fn_cuda_properties *properties);

typedef struct {
    const void *kernel;
    const void *args; /* the kernel's one parameter */
    unsigned blocks, outer_blocks, threads;
    int cluster;      /* blocks; 1: none */
    int shared_bytes; /* besides what the kernel declares; beyond 48 KiB, after fn_cuda_allow_shared */
    int32_t device;
    void *stream;
} fn_cuda_launch;

/* On the device, whatever the current one is; the current one comes back. Programmatic dependent launch where the device
 * has it, unless FUSEDNORM_PDL=0. */
fn_status fn_cuda_run(const char *function, const fn_cuda_launch *launch);

enum { FN_CUDA_MOST_DEVICES = 64 };

/* Bit d: device d. */
typedef _Atomic uint64_t fn_cuda_devices;

/* Of each device, and 1 more; 0 is not known yet. */
typedef struct {
    _Atomic int16_t of[FN_CUDA_MOST_DEVICES];
} fn_cuda_counts;

/* Lets a kernel have so much shared memory, on the device; `done`, one for each kernel, keeps on which devices it has. */
fn_status fn_cuda_allow_shared(fn_cuda_devices *done, int32_t device, const void *kernel, int bytes);

/* How many clusters of the launch's kernel, threads and shared memory the device can hold at once; `asked`, one for each such,
 * keeps what was asked for before. The first to ask lets the kernel have all shared memory that a block can have. */
fn_status fn_cuda_clusters_at_once(fn_cuda_counts *asked, const fn_cuda_launch *launch, int *clusters);

/* Makes the device and its context current, for calls of the driver; `previous` is what fn_cuda_leave takes. */
fn_status fn_cuda_enter(int32_t device, int *previous);
void fn_cuda_leave(int32_t device, int previous);

/* A function of the driver, as it was in the version of CUDA (12000 is 12.0). */
fn_status fn_cuda_driver_function(const char *name, unsigned version, void **function);

/* Loads the kernel on the current device. */
fn_status fn_cuda_load(const void *kernel);

/* The kernels' own warm-ups; the device is current. One for each operation. */
fn_status fn_norm_warmup(void);
fn_status fn_mm_warmup(const fn_cuda_properties *device);

/* FN_ERROR_RUNTIME with CUDA's name and text for the error. Takes the error out of the runtime, where the next call of some
 * framework would find it. */
fn_status fn_cuda_fail(const char *what, cudaError_t error);

#define FN_CUDA_TRY(what, expression)                                                                                  \
    do {                                                                                                               \
        const cudaError_t fn_cuda_error_ = (expression);                                                               \
        if (fn_cuda_error_ != cudaSuccess) return fn_cuda_fail((what), fn_cuda_error_);                                \
    } while (0)

#endif
