/* mm_fma_few.c: does a kernel of mm_fma_few.cu serve a product? If so: which, on how many blocks. None of it moves a
 * bit. */
#include "cuda.h"
#include "mm_fma.h"

#include <assert.h>

enum {
    UNIT = 16,                                        /* bytes */
    MOST_WEIGHTS = INT32_MAX / FN_MM_FMA_MOST_BLOCKS, /* more than a launch can have blocks for */
};

/* ---- operands ---------------------------------------------------------------------------------------------------- */

static bool is_whole(int64_t address_or_bytes) { return address_or_bytes % UNIT == 0; }

/* Rows along `dimension` of the matrix, if each consists of whole units. */
static bool describe(const fn_matrix *matrix, int dimension, int64_t rows, int64_t k, fn_fma_few_side *side) {
    const int bytes = fn_dtypes[matrix->dtype].bytes;
    *side = (fn_fma_few_side){matrix->data, matrix->stride[dimension], rows};
    return matrix->stride[1 - dimension] == bytes && is_whole(k * bytes) && is_whole((int64_t)(intptr_t)side->data) &&
           (rows == 1 || is_whole(side->row_stride));
}

/* Tokens are a's rows or, swapped, b's columns; weights are the others. */
static bool find_operands(const fn_mm_plan *plan, bool swapped, fn_fma_few_args *args) {
    const fn_matrix *const weights = swapped ? &plan->a : &plan->b, *const tokens = swapped ? &plan->b : &plan->a;
    const int64_t rows = swapped ? plan->n : plan->m, weight_rows = swapped ? plan->m : plan->n;
    *args = (fn_fma_few_args){.k = plan->k,
                              .out = plan->out.data,
                              .bias = plan->bias.data,
                              .out_weight_stride = plan->out.stride[!swapped],
                              .out_token_stride = plan->out.stride[swapped],
                              .token_dtype = tokens->dtype,
                              .out_dtype = plan->out.dtype,
                              .bias_dtype = plan->bias.dtype,
                              .early = plan->weights_are_constant && !swapped};
    *(swapped ? &args->bias_token_stride : &args->bias_weight_stride) = plan->bias.stride[1];
    return plan->k > 0 && rows <= FN_FMA_FEW_ROWS && weight_rows <= MOST_WEIGHTS && weights->dtype == FN_FLOAT32 &&
           describe(weights, !swapped, weight_rows, plan->k, &args->weights) &&
           describe(tokens, swapped, rows, plan->k, &args->tokens);
}

bool fn_fma_few_serves(const fn_mm_plan *plan, fn_fma_few_args *args) {
    const bool swapped = plan->n < plan->m; /* at best the tokens are the fewer ones */
    return find_operands(plan, swapped, args) || find_operands(plan, !swapped, args);
}

/* ---- which kernel ------------------------------------------------------------------------------------------------ */

static int64_t tiles_of(const fn_fma_few_kernel *kernel, int warps, const fn_fma_few_args *args) {
    return fn_divide_up(args->weights.rows, (int64_t)kernel->warp_rows * warps) * args->groups;
}

/* So many blocks that each may do all of K: then nothing but the memory's speed counts. */
static bool fills(int64_t blocks, const fn_cuda_properties *device) {
    return blocks * 4 >= device->multiprocessors * 3;
}

static const fn_fma_few_kernel *choose_kernel(const fn_cuda_properties *device, fn_fma_few_args *args) {
    const fn_fma_few_kernel *const many = &fn_fma_few_kernels[FN_FMA_FEW_KERNELS - 1], *kernel = fn_fma_few_kernels;
    while (kernel->tokens < args->tokens.rows && kernel < many - 1) kernel++;
    args->groups = (int32_t)fn_divide_up(args->tokens.rows, kernel->tokens);
    return args->groups > 1 && fills(tiles_of(many, many->warps, args), device) ? many : kernel;
}

typedef struct {
    int warps, cluster, shared_bytes;
} layout;

static int64_t rounds_of(const fn_fma_few_args *args, int cluster) {
    return fn_divide_up(fn_divide_up(args->k, FN_MM_CHUNK), cluster);
}

static layout layout_of(const fn_fma_few_kernel *kernel, const fn_fma_few_args *args, int warps, int cluster) {
    const int64_t chunks = fn_divide_up(args->k, FN_MM_CHUNK);
    int bytes = warps * kernel->warp_bytes + (rounds_of(args, cluster) > 1 ? 2 : 1) * kernel->token_bytes;
    if (cluster > 1) bytes += (int)chunks * kernel->sums * warps * 32 * (int)sizeof(float) + FN_FMA_FEW_BARRIER_BYTES;
    return (layout){warps, cluster, bytes};
}

static fn_cuda_launch launch_of(const fn_mm_plan *plan, const fn_fma_few_kernel *kernel, const fn_fma_few_args *args,
                                int64_t tiles, layout chosen) {
    return (fn_cuda_launch){.kernel = kernel->function,
                            .args = args,
                            .blocks = (unsigned)(tiles * chosen.cluster),
                            .outer_blocks = 1,
                            .threads = 32 * (unsigned)chosen.warps,
                            .cluster = chosen.cluster,
                            .shared_bytes = chosen.shared_bytes,
                            .device = plan->device_id,
                            .stream = plan->stream};
}

/* Can the device have such a cluster, of blocks with all the shared memory that there is? */
static fn_status can_cluster(const fn_mm_plan *plan, const fn_fma_few_kernel *kernel, const fn_fma_few_args *args,
                             const fn_cuda_properties *device, layout wanted, bool *can) {
    static fn_cuda_counts known[FN_FMA_FEW_KERNELS][FN_FMA_FEW_MOST_WARPS + 1][FN_MM_FMA_MOST_BLOCKS + 1];
    wanted.shared_bytes = device->shared_bytes;
    const fn_cuda_launch launch = launch_of(plan, kernel, args, 1, wanted);
    int at_once = 0;
    FN_TRY(
        fn_cuda_clusters_at_once(&known[kernel - fn_fma_few_kernels][wanted.warps][wanted.cluster], &launch, &at_once));
    *can = at_once > 0;
    return FN_OK;
}

/* The one by which a multiprocessor gets the fewest bytes: those of a block's chunks, of weights and of tokens, times
 * the blocks that it gets. Among equals the one with more warps, then with fewer blocks. */
static fn_status choose_layout(const fn_mm_plan *plan, const fn_fma_few_kernel *kernel, const fn_fma_few_args *args,
                               const fn_cuda_properties *device, layout *chosen) {
    const int64_t chunks = fn_divide_up(args->k, FN_MM_CHUNK), token_bytes = fn_dtypes[args->token_dtype].bytes;
    const bool filled = fills(tiles_of(kernel, kernel->warps, args), device);
    const int largest = filled || !device->clusters || chunks > FN_FMA_FEW_MOST_SENT ? 1
                        : chunks < FN_MM_FMA_MOST_BLOCKS                             ? (int)chunks
                                                                                     : FN_MM_FMA_MOST_BLOCKS;
    int64_t least = INT64_MAX;
    *chosen = layout_of(kernel, args, 1, 1);
    for (int warps = kernel->warps; warps > 0 && !(filled && least < INT64_MAX); warps /= 2) {
        const int64_t tiles = tiles_of(kernel, warps, args);
        const int64_t chunk_bytes =
            FN_MM_CHUNK * (4 * (int64_t)kernel->warp_rows * warps + token_bytes * kernel->tokens);
        for (int cluster = 1; cluster <= largest; cluster++) {
            if (cluster > 1 && rounds_of(args, cluster) == rounds_of(args, cluster - 1)) continue;
            const layout l = layout_of(kernel, args, warps, cluster);
            const int64_t bytes =
                fn_divide_up(tiles * cluster, device->multiprocessors) * rounds_of(args, cluster) * chunk_bytes;
            bool can = l.shared_bytes <= device->shared_bytes && bytes < least;
            if (can && cluster > 1) FN_TRY(can_cluster(plan, kernel, args, device, l, &can));
            if (can) least = bytes, *chosen = l;
        }
    }
    return FN_OK;
}

/* ---- the launch -------------------------------------------------------------------------------------------------- */

fn_status fn_mm_run_few(const fn_mm_plan *plan, fn_fma_few_args *args) {
    static fn_cuda_devices allowed[FN_FMA_FEW_KERNELS];
    fn_cuda_properties device;
    layout chosen;
    FN_TRY(fn_cuda_properties_of(plan->device_id, &device));
    const fn_fma_few_kernel *const kernel = choose_kernel(&device, args);
    FN_TRY(choose_layout(plan, kernel, args, &device, &chosen));
    FN_TRY(fn_cuda_allow_shared(&allowed[kernel - fn_fma_few_kernels], plan->device_id, kernel->function,
                                device.shared_bytes));
    const int64_t tiles = tiles_of(kernel, chosen.warps, args);
    assert(tiles <= MOST_WEIGHTS); /* a tile has at least 8 weights; there are at most 2 groups of tokens */
    args->cluster = chosen.cluster;
    args->token_rooms = rounds_of(args, chosen.cluster) > 1 ? 2 : 1;
    const fn_cuda_launch launch = launch_of(plan, kernel, args, tiles, chosen);
    return fn_cuda_run("CUDA mm kernel", &launch);
}

fn_status fn_fma_few_warmup(void) {
    for (int i = 0; i < FN_FMA_FEW_KERNELS; i++) FN_TRY(fn_cuda_load(fn_fma_few_kernels[i].function));
    return FN_OK;
}
