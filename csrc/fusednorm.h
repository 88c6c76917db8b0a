/* fusednorm.h: the plain C ABI. No Python and no CUDA header is needed to read or to call it.
 *
 * How a call flows: the caller describes each array by a fn_tensor that points at memory it keeps alive; the operation
 * checks everything once (dispatch.c), writes nothing before all checks have passed, and runs on the arrays' device.
 * The result's bits are a function of the values, the row length, the dtypes and the options alone: docs/numerics.md.
 */
#ifndef FUSEDNORM_H
#define FUSEDNORM_H

#include <stdbool.h>
#include <stdint.h>

#include "dtypes.h"
#include "status.h"

#define FN_MAX_NDIM 64

typedef enum { FN_CPU = 1, FN_CUDA = 2 } fn_device_type; /* DLPack's numbers */

/* A view of an array that the caller keeps alive. Strides are in bytes and may be zero, negative or any other number;
 * no alignment is assumed. `data` may be NULL when a dimension is 0. `name` is the argument's name in error texts. */
typedef struct {
    const char *name;
    void *data; /* the element at index 0, ..., 0 */
    const int64_t *shape;
    const int64_t *stride_bytes;
    int32_t ndim;
    fn_dtype dtype;
    fn_device_type device_type;
    int32_t device_id;
    bool readonly;
} fn_tensor;

/* Where the sum of x and residual is rounded to residual_out's dtype. */
typedef enum {
    FN_SUM_FP32,                  /* nowhere but in residual_out itself */
    FN_SUM_ROUNDED,               /* before everything that reads it */
    FN_SUM_ROUNDED_AFTER_VARIANCE /* between the variance and the normalisation */
} fn_round_sum;

/* One norm. Arrays that are not used are NULL. `x`, `residual`, `post_residual_addition`, `out` and `residual_out` have
 * one shape (..., H), H >= 1; `weight` is (H,). `out` may be exactly `x` and `residual_out` exactly `residual`: the same
 * memory, shape, strides and dtype. Any other overlap of an output with anything is an error. */
typedef struct {
    const char *function; /* the caller's name for it, in error texts; NULL: "norm" */
    const fn_tensor *x;
    const fn_tensor *residual;               /* NULL: no addition, and no residual_out */
    const fn_tensor *post_residual_addition; /* NULL: none; needs residual */
    const fn_tensor *weight;                 /* NULL: no multiplication; needs weight_offset == 0 */
    const fn_tensor *out;
    const fn_tensor *residual_out; /* given if and only if residual is */
    double eps;                    /* >= 0 and finite, rounded to fp32 */
    double weight_offset;          /* finite, rounded to fp32 */
    bool cast_x_before_out_mul;
    fn_round_sum round_sum;
    void *stream; /* CUDA: the cudaStream_t to queue the work on, NULL is the default stream. CPU: not read */
    bool weights_are_constant; /* CUDA: no kernel still at work writes weight, so that it may be read early (PDL) */
} fn_norm_args;

/* Checks everything, then runs; on CUDA, queues the work and returns. Returns before any write if a check fails. The
 * caller's rounding mode, flush-to-zero and current device are neither obeyed nor disturbed. */
fn_status fn_norm(const fn_norm_args *args);

/* One product: out = a @ b + bias, accumulated in fp32 and rounded once. Any strides; out overlaps nothing, itself included.
 * M, N and K may be 0: K = 0 gives +0 + bias. */
typedef struct {
    const char *function;      /* the caller's name for it, in error texts; NULL: "mm" */
    const fn_tensor *a;        /* (M, K) */
    const fn_tensor *b;        /* (K, N) */
    const fn_tensor *bias;     /* (N,), or NULL */
    const fn_tensor *out;      /* (M, N) */
    void *stream;              /* as in fn_norm_args */
    bool weights_are_constant; /* as in fn_norm_args, of b */
} fn_mm_args;

/* As fn_norm: checks everything, then runs or queues. */
fn_status fn_mm(const fn_mm_args *args);

/* Paths: what executes an operation. The CPU ones give the same bits; the best that the processor and the operating
 * system support is chosen at first use, or the one that the environment variable FUSEDNORM_CPU names. */
typedef enum { FN_PATH_SCALAR, FN_PATH_AVX2, FN_PATH_AVX512, FN_PATH_AVX512_BF16, FN_PATH_NEON, FN_PATH_COUNT } fn_path;

const char *fn_path_name(fn_path path);
bool fn_path_is_built(fn_path path);
bool fn_path_is_available(fn_path path); /* built, and the processor and the operating system can run it */

fn_status fn_cpu_path(fn_path *path);          /* the path that calls take now; the error of a wrong FUSEDNORM_CPU */
fn_status fn_cpu_force_path(const char *name); /* NULL: back to the automatic choice */
const char *fn_cpu_threading(void);            /* "openmp" or "none" */

/* Threads that one large call may use, >= 1. Starts at OMP_NUM_THREADS or the number of processors. A forked child
 * always runs on the calling thread, since an OpenMP pool does not survive fork(). */
int fn_get_num_threads(void);
fn_status fn_set_num_threads(int threads);

/* ---- CUDA ----
 *
 * Any build has these functions. In one without CUDA, or where no driver or device is, they fail with FN_ERROR_RUNTIME and
 * the reason. None of them makes the host wait for a device unless it says so. A device id is CUDA's ordinal. */
typedef struct {
    bool built;
    int32_t devices;                         /* that this process sees; 0 without a driver */
    int32_t runtime_version, driver_version; /* 13000 is 13.0; 0: none */
    const char *architectures;               /* as compiled, such as "80 90 90-ptx"; "" without CUDA */
    char reason[256];                        /* why no array on CUDA can be taken; "" if one can */
} fn_cuda_info;

typedef struct {
    char name[256];
    int32_t major, minor, multiprocessors; /* compute capability, and their number */
} fn_cuda_device;

void fn_cuda_describe(fn_cuda_info *info);
fn_status fn_cuda_describe_device(int32_t device, fn_cuda_device *description);
fn_status fn_cuda_current_device(int32_t *device);
/* The device that memory lives on, for arrays that do not say; managed memory: the current one. FN_ERROR_VALUE for memory
 * that no device can reach. */
fn_status fn_cuda_device_of(const void *address, int32_t *device);
/* Loads every kernel on the device, which a graph capture must not meet for the first time. */
fn_status fn_cuda_warmup(int32_t device);
/* What is queued on `later` from now on starts after all that is queued on `earlier` now. */
fn_status fn_cuda_order_streams(int32_t device, void *earlier, void *later);
/* Marks the work queued on the stream so far. *event is NULL if the stream is being captured: nothing runs then. */
fn_status fn_cuda_event_record(int32_t device, void *stream, void **event);
bool fn_cuda_event_is_done(void *event); /* never waits; NULL is done */
void fn_cuda_event_finish(void *event);  /* waits for it if it must, and frees it; NULL: nothing */
/* For tests: NULL returns to the policy (cuda/schedule.h), or to what FUSEDNORM_CUDA_SCHEDULE names. */
fn_status fn_cuda_force_schedule(const char *name);
/* As that, for products whose K is in parts, on compute capability 9.0: NULL returns to the policy (cuda/mm_hopper.c), or to what
 * FUSEDNORM_CUDA_PRODUCT names. */
fn_status fn_cuda_force_product(const char *name);

#endif
