/* mm_fma.c: a product's plan becomes one launch of a kernel of mm_fma_few.cu or of mm_fma_many_sm90a.cu, if one serves it, or
 * of mm_fma.cu (or a few launches): which, on how many blocks. None of it moves a bit. */
#include "mm_fma.h"
#include "cuda.h"

#include <stdlib.h>

enum { MOST_TILES = 1 << 13 }; /* of a launch, along each side */

static bool is_multiple(uint64_t address_or_stride, int size) { return address_or_stride % (uint64_t)size == 0; }

/* Rows along `dimension` of the matrix. */
static fn_mm_fma_side side_of(const fn_matrix *matrix, int dimension, int64_t rows, int64_t k) {
    const int bytes = fn_dtypes[matrix->dtype].bytes;
    fn_mm_fma_side side = {.data = matrix->data,
                           .row_stride = matrix->stride[dimension],
                           .k_stride = matrix->stride[1 - dimension],
                           .rows = rows,
                           .dtype = matrix->dtype,
                           .access = FN_MM_ANY};
    const bool k_first = side.k_stride == bytes && (k > 1 || side.row_stride != bytes);
    side.along_rows = !k_first && (side.row_stride == bytes || llabs(side.row_stride) < llabs(side.k_stride));
    const bool side_by_side = (side.along_rows ? side.row_stride : side.k_stride) == bytes;
    const uint64_t row_step = rows > 1 ? (uint64_t)side.row_stride : 0, k_step = k > 1 ? (uint64_t)side.k_stride : 0;
    const uint64_t between = (uint64_t)(uintptr_t)side.data | (side.along_rows ? k_step : row_step);
    const int64_t length = side.along_rows ? rows : k;
    if (side_by_side && !side.along_rows && side.dtype == FN_FLOAT32 && is_multiple(between, 16))
        side.access = FN_MM_COPIED;
    else if (side_by_side && length % 4 == 0 && is_multiple(between, 4 * bytes)) side.access = FN_MM_HELD;
    else if (side.dtype == FN_FLOAT32 && is_multiple((uint64_t)(uintptr_t)side.data | row_step | k_step, 4))
        side.access = FN_MM_COPIED_SINGLY;
    return side;
}

/* ---- what the kernels share ---------------------------------------------------------------------------------------- */

fn_fma_out fn_fma_result_of(const fn_mm_plan *plan, bool swapped) {
    fn_fma_out to = {.k = plan->k,
                     .rows = swapped ? plan->n : plan->m,
                     .columns = swapped ? plan->m : plan->n,
                     .out = plan->out.data,
                     .bias = plan->bias.data,
                     .out_stride = {plan->out.stride[swapped], plan->out.stride[!swapped]},
                     .out_dtype = plan->out.dtype,
                     .bias_dtype = plan->bias.dtype};
    to.bias_stride[!swapped] = plan->bias.stride[1];
    return to;
}

void fn_fma_set_tiles(fn_fma_out *to, const fn_mm_fma_kernel *kernel, int cluster_bits) {
    enum { PANEL = 16 };
    to->row_tiles = (uint32_t)fn_divide_up(to->rows, kernel->rows);
    to->column_tiles = (uint32_t)fn_divide_up(to->columns, kernel->columns);
    to->panel = to->row_tiles < PANEL ? to->row_tiles : PANEL;
    to->cluster_bits = cluster_bits;
    to->whole_groups = to->out_stride[1] == fn_dtypes[to->out_dtype].bytes &&
                       is_multiple((uint64_t)(uintptr_t)to->out | (uint64_t)(to->rows > 1 ? to->out_stride[0] : 0), 16);
}

fn_cuda_launch fn_fma_launch_of(const fn_mm_plan *plan, const fn_mm_fma_kernel *kernel, const void *args,
                                int64_t clusters, int bits) {
    return (fn_cuda_launch){.kernel = kernel->function,
                            .args = args,
                            .blocks = (unsigned)(clusters << bits),
                            .outer_blocks = 1,
                            .threads = (unsigned)kernel->threads,
                            .cluster = 1 << bits,
                            .shared_bytes = kernel->shared_bytes,
                            .device = plan->device_id,
                            .stream = plan->stream};
}

/* ---- mm_fma.cu ------------------------------------------------------------------------------------------------------ */

/* The cluster for a tile whose blocks have the fewest chunks to do, one after the other: those of a block, times the rounds of
 * clusters that the device makes. */
static fn_status choose_cluster(const fn_mm_plan *plan, const fn_mm_fma_kernel *kernel, int64_t tiles,
                                const fn_cuda_properties *device, int *cluster_bits) {
    static fn_cuda_counts asked[FN_MM_FMA_KERNELS][FN_FMA_CLUSTER_SIZES];
    const int64_t chunks = fn_divide_up(plan->k, FN_MM_CHUNK);
    const int room = device->shared_bytes / (kernel->shared_bytes + FN_MM_FMA_BLOCK_BYTES);
    const int resident = room < 1 ? 1 : room < kernel->resident ? room : kernel->resident;
    int64_t least = fn_divide_up(tiles, (int64_t)device->multiprocessors * resident) * chunks;
    *cluster_bits = 0;
    for (int bits = 1; device->clusters && bits < FN_FMA_CLUSTER_SIZES; bits++) {
        const fn_cuda_launch launch = fn_fma_launch_of(plan, kernel, NULL, 1, bits);
        int at_once = 0;
        FN_TRY(fn_cuda_clusters_at_once(&asked[kernel - fn_mm_fma_kernels][bits], &launch, &at_once));
        if (at_once < 1) continue;
        const int64_t one_by_one = fn_divide_up(tiles, at_once) * fn_divide_up(chunks, (int64_t)1 << bits);
        if (one_by_one < least) least = one_by_one, *cluster_bits = bits;
    }
    return FN_OK;
}

static void set_steps(fn_mm_fma_side *side, int tile_k, int cluster_bits) {
    side->chunk_skip = (((int64_t)1 << cluster_bits) - 1) * FN_MM_CHUNK;
    side->chunk_step = side->chunk_skip * side->k_stride;
    side->tile_step = tile_k * side->k_stride;
}

static fn_status run_tiles(const fn_mm_plan *plan, const fn_mm_fma_kernel *kernel, const fn_cuda_properties *device,
                           fn_mm_fma_args *args) {
    const int64_t tiles = fn_fma_tiles(kernel, &args->to);
    static fn_cuda_devices allowed[FN_MM_FMA_KERNELS];
    FN_TRY(fn_cuda_allow_shared(&allowed[kernel - fn_mm_fma_kernels], plan->device_id, kernel->function,
                                kernel->shared_bytes));
    int bits;
    FN_TRY(choose_cluster(plan, kernel, tiles, device, &bits));
    fn_fma_set_tiles(&args->to, kernel, bits);
    set_steps(&args->rows, kernel->k, bits);
    set_steps(&args->columns, kernel->k, bits);
    const fn_cuda_launch launch = fn_fma_launch_of(plan, kernel, args, tiles, bits);
    return fn_cuda_run("CUDA mm kernel", &launch);
}

fn_status fn_mm_run_fma(const fn_mm_plan *plan) {
    fn_fma_few_args few_args;
    if (fn_fma_few_serves(plan, &few_args)) return fn_mm_run_few(plan, &few_args);
    fn_cuda_properties device;
    FN_TRY(fn_cuda_properties_of(plan->device_id, &device));
    bool swapped;
    if (fn_fma_many_serves(plan, &device, &swapped)) return fn_mm_run_many(plan, &device, swapped);
    const int64_t few = fn_mm_fma_kernels[FN_MM_FMA_KERNELS - 2].rows;
    /* Rows of the tiles are a's rows or b's columns: the fewer of them, or those further apart in out. */
    swapped =
        plan->m <= few || plan->n <= few ? plan->n < plan->m : llabs(plan->out.stride[0]) < llabs(plan->out.stride[1]);
    const fn_mm_fma_side a = side_of(&plan->a, 0, plan->m, plan->k), b = side_of(&plan->b, 1, plan->n, plan->k);
    const fn_mm_fma_side rows = swapped ? b : a, columns = swapped ? a : b;
    const fn_fma_out to = fn_fma_result_of(plan, swapped);
    const fn_mm_fma_kernel *kernel = fn_mm_fma_kernels;
    while (kernel->rows < to.rows && kernel < fn_mm_fma_kernels + FN_MM_FMA_KERNELS - 1) kernel++;
    const int64_t most_rows = (int64_t)MOST_TILES * kernel->rows, most_columns = (int64_t)MOST_TILES * kernel->columns;
    for (int64_t row = 0; row < to.rows; row += most_rows)
        for (int64_t column = 0; column < to.columns; column += most_columns) {
            fn_mm_fma_args args = {.rows = rows, .columns = columns, .to = to};
            args.rows.rows = args.to.rows = to.rows - row < most_rows ? to.rows - row : most_rows;
            args.columns.rows = args.to.columns =
                to.columns - column < most_columns ? to.columns - column : most_columns;
            if (row) args.rows.data += row * rows.row_stride;
            if (column) args.columns.data += column * columns.row_stride;
            args.to.out += row * to.out_stride[0] + column * to.out_stride[1];
            if (args.to.bias) args.to.bias += row * to.bias_stride[0] + column * to.bias_stride[1];
            FN_TRY(run_tiles(plan, kernel, &device, &args));
        }
    return FN_OK;
}

fn_status fn_mm_fma_warmup(const fn_cuda_properties *device) {
    for (int i = 0; i < FN_MM_FMA_KERNELS; i++) FN_TRY(fn_cuda_load(fn_mm_fma_kernels[i].function));
    FN_TRY(fn_fma_many_warmup(device));
    return fn_fma_few_warmup();
}
