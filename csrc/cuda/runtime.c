/* runtime.c: the device: its properties, launches, streams, events, and CUDA's errors. The only file that calls the runtime.
 *
 * The runtime is linked statically, so that importing needs no driver; without one its calls return an error. It shares each
 * device's primary context with every framework in the process.
 */
#include "cuda.h"
#include "launch.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

fn_status fn_cuda_fail(const char *what, cudaError_t error) {
    (void)cudaGetLastError();
    return fn_fail(FN_ERROR_RUNTIME, "%s: %s (%s)", what, cudaGetErrorName(error), cudaGetErrorString(error));
}

/* ---- the current device ---------------------------------------------------------------------------------------------- */

/* Makes the device current; `previous` is what leave_device takes, and needs nothing where the device was current. */
static cudaError_t enter_device(int32_t device, int *previous) {
    const cudaError_t error = cudaGetDevice(previous);
    if (error != cudaSuccess || *previous == device) return error;
    return cudaSetDevice(device);
}

static void leave_device(int32_t device, int previous) {
    if (previous != device) cudaSetDevice(previous);
}

/* ---- properties ------------------------------------------------------------------------------------------------------ */

static fn_cuda_properties known[FN_CUDA_MOST_DEVICES];
static atomic_bool is_known[FN_CUDA_MOST_DEVICES];

fn_status fn_cuda_properties_of(int32_t device, fn_cuda_properties *properties) {
    if (device >= 0 && device < FN_CUDA_MOST_DEVICES && atomic_load_explicit(&is_known[device], memory_order_acquire)) {
        *properties = known[device];
        return FN_OK;
    }
    int major = 0, minor = 0, previous = 0;
    struct cudaFuncAttributes code;
    FN_CUDA_TRY("CUDA device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    FN_CUDA_TRY("CUDA device", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    FN_CUDA_TRY("CUDA device",
                cudaDeviceGetAttribute(&properties->multiprocessors, cudaDevAttrMultiProcessorCount, device));
    FN_CUDA_TRY("CUDA device",
                cudaDeviceGetAttribute(&properties->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    FN_CUDA_TRY("CUDA device", enter_device(device, &previous));
    const cudaError_t error = cudaFuncGetAttributes(&code, fn_norm_strided_kernel); /* one for all of the module */
    leave_device(device, previous);
    FN_CUDA_TRY("CUDA kernels", error);
    /* A driver may have compiled the PTX of an older architecture, in which what needs a newer one was left out. */
    properties->clusters = major >= 9 && code.ptxVersion >= 90;
    properties->exactly_90 = major == 9 && minor == 0;
    if (device < FN_CUDA_MOST_DEVICES) {
        static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
        pthread_mutex_lock(&lock);
        if (!atomic_load(&is_known[device])) known[device] = *properties;
        atomic_store_explicit(&is_known[device], true, memory_order_release);
        pthread_mutex_unlock(&lock);
    }
    return FN_OK;
}

void fn_cuda_describe(fn_cuda_info *info) {
    *info = (fn_cuda_info){.built = true, .architectures = FN_CUDA_ARCHITECTURES};
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
        snprintf(info->reason, sizeof info->reason, "%s (%s)", cudaGetErrorName(error), cudaGetErrorString(error));
        devices = 0;
    } else if (devices == 0) {
        snprintf(info->reason, sizeof info->reason, "there is no CUDA device");
    }
    info->devices = devices;
    if (cudaRuntimeGetVersion(&info->runtime_version) != cudaSuccess) info->runtime_version = 0;
    if (cudaDriverGetVersion(&info->driver_version) != cudaSuccess) info->driver_version = 0;
}

fn_status fn_cuda_describe_device(int32_t device, fn_cuda_device *description) {
    struct cudaDeviceProp properties;
    FN_CUDA_TRY("CUDA device", cudaGetDeviceProperties(&properties, device));
    snprintf(description->name, sizeof description->name, "%s", properties.name);
    description->major = properties.major;
    description->minor = properties.minor;
    description->multiprocessors = properties.multiProcessorCount;
    return FN_OK;
}

fn_status fn_cuda_current_device(int32_t *device) {
    int current = 0;
    FN_CUDA_TRY("CUDA device", cudaGetDevice(&current));
    *device = current;
    return FN_OK;
}

fn_status fn_cuda_device_of(const void *address, int32_t *device) {
    struct cudaPointerAttributes attributes;
    FN_CUDA_TRY("CUDA memory", cudaPointerGetAttributes(&attributes, address));
    if (attributes.type == cudaMemoryTypeManaged) return fn_cuda_current_device(device);
    FN_REQUIRE(attributes.type == cudaMemoryTypeDevice, FN_ERROR_VALUE,
               "CUDA memory: the address is not in a device's memory");
    *device = attributes.device;
    return FN_OK;
}

/* ---- launches -------------------------------------------------------------------------------------------------------- */

/* Programmatic dependent launch, unless the environment says no: -1 until it was asked. */
static bool dependent_launch(void) {
    static atomic_int wanted = -1;
    int known_wish = atomic_load_explicit(&wanted, memory_order_relaxed);
    if (known_wish < 0) {
        const char *text = getenv("FUSEDNORM_PDL");
        known_wish = !(text && strcmp(text, "0") == 0);
        atomic_store(&wanted, known_wish);
    }
    return known_wish;
}

/* A launch as the runtime takes it. */
typedef struct {
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attributes[2];
} configuration;

static void configure(configuration *c, const fn_cuda_launch *launch, bool has_dependent_launch) {
    unsigned count = 0;
    if (has_dependent_launch && dependent_launch()) {
        c->attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        c->attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (launch->cluster > 1) {
        c->attributes[count].id = cudaLaunchAttributeClusterDimension;
        c->attributes[count].val.clusterDim.x = (unsigned)launch->cluster;
        c->attributes[count].val.clusterDim.y = c->attributes[count].val.clusterDim.z = 1;
        count++;
    }
    c->config = (cudaLaunchConfig_t){.gridDim = {launch->blocks, launch->outer_blocks, 1},
                                     .blockDim = {launch->threads, 1, 1},
                                     .dynamicSmemBytes = (size_t)launch->shared_bytes,
                                     .stream = launch->stream,
                                     .attrs = c->attributes,
                                     .numAttrs = count};
}

static cudaError_t launch_here(const fn_cuda_launch *launch, bool has_dependent_launch) {
    configuration c;
    configure(&c, launch, has_dependent_launch);
    union {
        const void *read;
        void *passed;
    } args = {launch->args};
    return cudaLaunchKernelExC(&c.config, launch->kernel, &args.passed);
}

fn_status fn_cuda_run(const char *function, const fn_cuda_launch *launch) {
    fn_cuda_properties properties;
    int previous = 0;
    FN_TRY(fn_cuda_properties_of(launch->device, &properties));
    FN_CUDA_TRY(function, enter_device(launch->device, &previous));
    const cudaError_t error = launch_here(launch, properties.clusters);
    leave_device(launch->device, previous);
    FN_CUDA_TRY(function, error);
    return FN_OK;
}

fn_status fn_cuda_allow_shared(fn_cuda_devices *done, int32_t device, const void *kernel, int bytes) {
    const uint64_t bit = device >= 0 && device < FN_CUDA_MOST_DEVICES ? (uint64_t)1 << device : 0;
    if (atomic_load_explicit(done, memory_order_relaxed) & bit) return FN_OK;
    int previous = 0;
    FN_CUDA_TRY("CUDA device", enter_device(device, &previous));
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    leave_device(device, previous);
    FN_CUDA_TRY("CUDA kernel", error);
    atomic_fetch_or(done, bit);
    return FN_OK;
}

fn_status fn_cuda_clusters_at_once(fn_cuda_counts *asked, const fn_cuda_launch *launch, int *clusters) {
    _Atomic int16_t none = 0, *const kept = launch->device < FN_CUDA_MOST_DEVICES ? &asked->of[launch->device] : &none;
    *clusters = atomic_load_explicit(kept, memory_order_relaxed) - 1;
    if (*clusters >= 0) return FN_OK;
    fn_cuda_properties properties;
    int previous = 0;
    FN_TRY(fn_cuda_properties_of(launch->device, &properties));
    configuration c;
    configure(&c, launch, false);
    FN_CUDA_TRY("CUDA device", enter_device(launch->device, &previous));
    cudaError_t error =
        cudaFuncSetAttribute(launch->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, properties.shared_bytes);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(clusters, launch->kernel, &c.config);
    if (error == cudaErrorInvalidClusterSize) { /* the device has no such clusters at all */
        (void)cudaGetLastError();
        error = cudaSuccess;
        *clusters = 0;
    }
    leave_device(launch->device, previous);
    FN_CUDA_TRY("CUDA kernel", error);
    atomic_store_explicit(kept, (int16_t)(*clusters < INT16_MAX ? *clusters + 1 : INT16_MAX), memory_order_relaxed);
    return FN_OK;
}

/* A thread's first cudaSetDevice makes the context current, even for the device that is current already. */
fn_status fn_cuda_enter(int32_t device, int *previous) {
    FN_CUDA_TRY("CUDA device", cudaGetDevice(previous));
    FN_CUDA_TRY("CUDA device", cudaSetDevice(device));
    return FN_OK;
}

void fn_cuda_leave(int32_t device, int previous) { leave_device(device, previous); }

/* The module is not linked with the driver's library, which may be absent. */
fn_status fn_cuda_driver_function(const char *name, unsigned version, void **function) {
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    *function = NULL;
#if CUDART_VERSION >= 12050
    FN_CUDA_TRY(name, cudaGetDriverEntryPointByVersion(name, function, version, cudaEnableDefault, &found));
#else
    (void)version;
    FN_CUDA_TRY(name, cudaGetDriverEntryPoint(name, function, cudaEnableDefault, &found));
#endif
    FN_REQUIRE(found == cudaDriverEntryPointSuccess && *function, FN_ERROR_RUNTIME,
               "%s: the driver has no such function", name);
    return FN_OK;
}

fn_status fn_cuda_load(const void *kernel) {
    struct cudaFuncAttributes attributes;
    FN_CUDA_TRY("warmup", cudaFuncGetAttributes(&attributes, kernel));
    return FN_OK;
}

fn_status fn_cuda_warmup(int32_t device) {
    int devices = 0, previous = 0;
    FN_CUDA_TRY("warmup", cudaGetDeviceCount(&devices));
    FN_REQUIRE(device >= 0 && device < devices, FN_ERROR_VALUE, "warmup: device is %d: must be from 0 to %d", device,
               devices - 1);
    fn_cuda_properties properties;
    FN_TRY(fn_cuda_properties_of(device, &properties));
    FN_CUDA_TRY("warmup", enter_device(device, &previous));
    fn_status status = fn_norm_warmup();
    if (status == FN_OK) status = fn_mm_warmup(&properties);
    leave_device(device, previous);
    return status;
}

/* ---- streams and events ------------------------------------------------------------------------------------------------ */

/* Events that order streams wait here for their next use: creating one would be a hidden cost of each call. An event may be
 * recorded again as soon as the wait for it is queued. */
static struct {
    pthread_mutex_t lock;
    cudaEvent_t event[FN_CUDA_MOST_DEVICES];
} order = {.lock = PTHREAD_MUTEX_INITIALIZER};

static cudaError_t order_here(int32_t device, cudaStream_t earlier, cudaStream_t later) {
    cudaError_t error = cudaSuccess;
    if (!order.event[device]) error = cudaEventCreateWithFlags(&order.event[device], cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaEventRecord(order.event[device], earlier);
    if (error == cudaSuccess) error = cudaStreamWaitEvent(later, order.event[device], 0);
    return error;
}

fn_status fn_cuda_order_streams(int32_t device, void *earlier, void *later) {
    int previous = 0;
    if (earlier == later) return FN_OK;
    FN_REQUIRE(device >= 0 && device < FN_CUDA_MOST_DEVICES, FN_ERROR_RUNTIME,
               "CUDA device: number %d: at most %d are supported", device, FN_CUDA_MOST_DEVICES);
    FN_CUDA_TRY("CUDA stream", enter_device(device, &previous));
    pthread_mutex_lock(&order.lock);
    const cudaError_t error = order_here(device, earlier, later);
    pthread_mutex_unlock(&order.lock);
    leave_device(device, previous);
    FN_CUDA_TRY("CUDA stream", error);
    return FN_OK;
}

fn_status fn_cuda_event_record(int32_t device, void *stream, void **event) {
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    int previous = 0;
    *event = NULL;
    FN_CUDA_TRY("CUDA stream", enter_device(device, &previous));
    cudaEvent_t made = NULL;
    cudaError_t error = cudaStreamIsCapturing(stream, &capture);
    if (error == cudaSuccess && capture == cudaStreamCaptureStatusNone) {
        error = cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
        if (error == cudaSuccess) error = cudaEventRecord(made, stream);
        if (error != cudaSuccess && made) cudaEventDestroy(made);
    }
    leave_device(device, previous);
    FN_CUDA_TRY("CUDA stream", error);
    *event = made;
    return FN_OK;
}

/* Another thread may be capturing, in the mode that forbids such questions to the whole process. */
bool fn_cuda_event_is_done(void *event) {
    if (!event) return true;
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    const cudaError_t answer = cudaEventQuery(event);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (answer != cudaSuccess) (void)cudaGetLastError();
    return answer != cudaErrorNotReady; /* an error will not go away: a lost device, a forked child */
}

void fn_cuda_event_finish(void *event) {
    if (!event) return;
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (cudaEventSynchronize(event) != cudaSuccess) (void)cudaGetLastError();
    if (cudaEventDestroy(event) != cudaSuccess) (void)cudaGetLastError();
    cudaThreadExchangeStreamCaptureMode(&mode);
}
