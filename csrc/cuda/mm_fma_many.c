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

/* Percent of a round's time in a block of the first kernel. The second's blocks have half the outputs, two of them share a
 * multiprocessor, and one alone does not fill it. */
static int64_t weight_of(int kernel, const fn_fma_grid *grid, int64_t tiles, const fn_cuda_properties *device) {
    enum { WIDE = 100, NARROW = 104, NARROW_ALONE = 60 };
    return kernel == 0 ? WIDE : tiles << grid->bits <= device->multiprocessors ? NARROW_ALONE : NARROW;
}

static int64_t tiles_of(const fn_mm_fma_kernel *kernel, const fn_fma_out *to) {
    return fn_divide_up(to->rows, kernel->rows) * fn_divide_up(to->columns, kernel->columns);
}

static fn_status make_maps(const fn_mm_plan *plan, const fn_mm_fma_kernel *kernel, bool swapped, fn_fma_many_args *args) {
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
    static fn_fma_counts asked[FN_DTYPE_COUNT][FN_FMA_MANY_KERNELS];
    const fn_dtype dtype = rows_of(plan, swapped).dtype;
    fn_fma_many_args args = {.to = fn_fma_result_of(plan, swapped)};
    fn_fma_grid grid = {0};
    int64_t least = INT64_MAX;
    int chosen = 0;
    for (int i = 0; i < FN_FMA_MANY_KERNELS; i++) {
        const fn_mm_fma_kernel *const kernel = &fn_fma_many_kernels[dtype][i];
        const int64_t tiles = tiles_of(kernel, &args.to);
        fn_fma_grid found;
        FN_TRY(fn_fma_choose_grid(plan, kernel, &asked[dtype][i], tiles, device, &found));
        const int64_t time = found.rounds * weight_of(i, &found, tiles, device);
        if (time < least) least = time, grid = found, chosen = i;
    }
    const fn_mm_fma_kernel *const kernel = &fn_fma_many_kernels[dtype][chosen];
    const int64_t tiles = tiles_of(kernel, &args.to);
    args.tiles = (uint32_t)tiles;
    args.to.row_tiles = (uint32_t)fn_divide_up(args.to.rows, kernel->rows);
    args.to.column_tiles = (uint32_t)fn_divide_up(args.to.columns, kernel->columns);
    args.to.panel = args.to.row_tiles < FN_FMA_PANEL ? args.to.row_tiles : FN_FMA_PANEL;
    args.to.cluster_bits = grid.bits;
    args.to.whole_groups = fn_fma_has_whole_groups(&args.to);
    FN_TRY(make_maps(plan, kernel, swapped, &args));
    FN_TRY(fn_cuda_allow_shared(&allowed[dtype][chosen], plan->device_id, kernel->function, kernel->shared_bytes));
    const fn_cuda_launch launch =
        fn_fma_launch_of(plan, kernel, &args, tiles < grid.at_once ? tiles : grid.at_once, grid.bits);
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
