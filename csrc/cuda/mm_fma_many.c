/* mm_fma_many.c: does a kernel of mm_fma_many_sm90a.cu serve a product? If so: which, on how many blocks. None of it moves a
 * bit. */
#include "mm_fma.h"
#include "tensor_map.h"

#include <stdlib.h>

#ifdef FN_MM_HOPPER /* tools/build_cuda.py: compute capability 9.0 is among the GPUs that are compiled for */

enum { ROW_BYTES = 128 };

static fn_tensor_map_source rows_of(const fn_mm_plan *plan, bool swapped) {
    return swapped ? (fn_tensor_map_source){plan->b.data, plan->b.dtype, plan->n, plan->k, plan->b.stride[1]}
                   : (fn_tensor_map_source){plan->a.data, plan->a.dtype, plan->m, plan->k, plan->a.stride[0]};
}

bool fn_fma_many_serves(const fn_mm_plan *plan, const fn_cuda_properties *device, bool *swapped) {
    if (!device->exactly_90 || plan->m <= FN_FMA_FEW_ROWS || plan->n <= FN_FMA_FEW_ROWS) return false;
    const fn_dtype a = plan->a.dtype, b = plan->b.dtype;
    if (a != FN_FLOAT32 && b != FN_FLOAT32) return false;
    *swapped = a == b ? llabs(plan->out.stride[0]) < llabs(plan->out.stride[1]) : b != FN_FLOAT32;
    const fn_tensor_map_source rows = rows_of(plan, false), columns = rows_of(plan, true);
    return plan->a.stride[1] == fn_dtypes[a].bytes && plan->b.stride[0] == fn_dtypes[b].bytes &&
           fn_tensor_map_serves(&rows) && fn_tensor_map_serves(&columns);
}

/* ---- which kernel, in which clusters --------------------------------------------------------------------------------- */

typedef struct {
    int kernel, bits; /* clusters of 2 to the power of `bits` blocks */
    int64_t tiles, at_once;
} choice;

/* Thousandths of what a chunk takes a full multiprocessor: 13.6 us on an H200 for fp32, 15.8 for 16 bits. A block of the second
 * kernel has half of one, and is slower alone: of `beside` clusters each block has a multiprocessor. Of 28 shapes that were
 * measured in all kernels and clusters the chosen one was the fastest at 25, and took up to 2.5 % more at 3. */
static int64_t time_of(const fn_fma_out *to, choice c, int64_t beside, fn_dtype dtype) {
    enum { START = 80, EXCHANGE = 30, NARROW = 1000, NARROW_ALONE = 640, WIDE = 1020, WIDE_16_BITS = 970 };
    const int64_t chunks = fn_divide_up(fn_divide_up(to->k, FN_MM_CHUNK), (int64_t)1 << c.bits);
    const int64_t rounds = c.tiles / c.at_once, rest = c.tiles % c.at_once;
    const int64_t full = c.kernel == 1 ? NARROW : dtype == FN_FLOAT32 ? WIDE : WIDE_16_BITS;
    const bool alone = c.kernel == 1 && rest <= (rounds ? beside / 2 : beside);
    const int64_t chunk = rounds * full + (rest == 0 ? 0 : alone ? NARROW_ALONE : full);
    return START + chunks * (chunk + (c.bits ? EXCHANGE * (rounds + (rest > 0)) : 0));
}

static fn_status clusters_at_once(const fn_mm_plan *plan, fn_dtype dtype, int kernel, int bits,
                                  const fn_cuda_properties *device, int64_t *at_once) {
    static fn_cuda_counts asked[FN_DTYPE_COUNT][FN_FMA_MANY_KERNELS][FN_FMA_CLUSTER_SIZES];
    const fn_mm_fma_kernel *const found = &fn_fma_many_kernels[dtype][kernel];
    *at_once = (int64_t)device->multiprocessors * found->resident;
    if (bits == 0) return FN_OK;
    const fn_cuda_launch launch = fn_fma_launch_of(plan, found, NULL, 1, bits);
    int clusters = 0;
    FN_TRY(fn_cuda_clusters_at_once(&asked[dtype][kernel][bits], &launch, &clusters));
    *at_once = clusters;
    return FN_OK;
}

static fn_status choose(const fn_mm_plan *plan, const fn_fma_out *to, fn_dtype dtype, const fn_cuda_properties *device,
                        choice *chosen) {
    int64_t least = INT64_MAX;
    for (int bits = 0; bits < FN_FMA_CLUSTER_SIZES; bits++) {
        int64_t beside = 0;
        for (int kernel = 0; kernel < FN_FMA_MANY_KERNELS; kernel++) {
            choice c = {kernel, bits, fn_fma_tiles(&fn_fma_many_kernels[dtype][kernel], to), 0};
            FN_TRY(clusters_at_once(plan, dtype, kernel, bits, device, &c.at_once));
            if (kernel == 0) beside = c.at_once;
            if (c.at_once < 1) continue;
            const int64_t time = time_of(to, c, beside, dtype);
            if (time < least) least = time, *chosen = c;
        }
    }
    return FN_OK;
}

/* ---- the launch ---------------------------------------------------------------------------------------------------------- */

static fn_status make_maps(const fn_mm_plan *plan, const fn_mm_fma_kernel *kernel, bool swapped,
                           fn_fma_many_args *args) {
    const fn_tensor_map_source rows = rows_of(plan, swapped), columns = rows_of(plan, !swapped);
    int previous = 0;
    FN_TRY(fn_cuda_enter(plan->device_id, &previous));
    fn_status status = fn_tensor_map(&args->rows, &rows, kernel->rows, ROW_BYTES);
    if (status == FN_OK) status = fn_tensor_map(&args->columns, &columns, kernel->columns, ROW_BYTES);
    fn_cuda_leave(plan->device_id, previous);
    return status;
}

fn_status fn_mm_run_many(const fn_mm_plan *plan, const fn_cuda_properties *device, bool swapped) {
    static fn_cuda_devices allowed[FN_DTYPE_COUNT][FN_FMA_MANY_KERNELS];
    const fn_dtype dtype = rows_of(plan, swapped).dtype;
    fn_fma_many_args args = {.to = fn_fma_result_of(plan, swapped)};
    choice chosen = {0};
    FN_TRY(choose(plan, &args.to, dtype, device, &chosen));
    const fn_mm_fma_kernel *const kernel = &fn_fma_many_kernels[dtype][chosen.kernel];
    args.tiles = (uint32_t)chosen.tiles;
    fn_fma_set_tiles(&args.to, kernel, chosen.bits);
    FN_TRY(make_maps(plan, kernel, swapped, &args));
    FN_TRY(
        fn_cuda_allow_shared(&allowed[dtype][chosen.kernel], plan->device_id, kernel->function, kernel->shared_bytes));
    const int64_t clusters =
        chosen.tiles < chosen.at_once ? chosen.tiles : chosen.at_once; /* which go through all tiles */
    const fn_cuda_launch launch = fn_fma_launch_of(plan, kernel, &args, clusters, chosen.bits);
    return fn_cuda_run("CUDA mm kernel", &launch);
}

fn_status fn_fma_many_warmup(const fn_cuda_properties *device) {
    if (!device->exactly_90) return FN_OK;
    for (int i = 0; i < FN_DTYPE_COUNT; i++)
        for (int j = 0; j < FN_FMA_MANY_KERNELS; j++) FN_TRY(fn_cuda_load(fn_fma_many_kernels[i][j].function));
    return FN_OK;
}

#else

bool fn_fma_many_serves(const fn_mm_plan *plan, const fn_cuda_properties *device, bool *swapped) {
    (void)plan, (void)device, (void)swapped;
    return false;
}

fn_status fn_mm_run_many(const fn_mm_plan *plan, const fn_cuda_properties *device, bool swapped) {
    (void)plan, (void)device, (void)swapped;
    return fn_fail(FN_ERROR_RUNTIME, "CUDA product: built without compute capability 9.0");
}

fn_status fn_fma_many_warmup(const fn_cuda_properties *device) {
    (void)device;
    return FN_OK;
}

#endif
