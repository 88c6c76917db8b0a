/* mm_tensor.c: a product of two operands of the same 16-bit dtype becomes launches: how K is cut, which kernel, which grid.
 *
 * How K is cut decides bits and follows from N and K alone. All else moves speed alone.
 */
#include "mm_tensor.h"

#include "cuda.h"
#include "mm_hopper.h"

enum {
    GATE_TOKENS = 128, /* rows of a, up to which a warp takes a chunk */
    MOST_OUTER_BLOCKS = 65535,
};

/* ---- the contract: how K is cut ------------------------------------------------------------------------------------------ */

fn_mm_cut fn_mm_cut_of(int64_t n, int64_t k) {
    const int64_t tiles = fn_divide_up(k, FN_MM_TILE_K), chunk = FN_MM_GATE_CHUNK / FN_MM_TILE_K;
    if (n > FN_MM_GATE_COLUMNS || tiles <= chunk) return (fn_mm_cut){tiles, tiles, 1};
    const int64_t even = fn_divide_up(tiles, FN_MM_GATE_PARTS), part = even < chunk ? chunk : even;
    return (fn_mm_cut){part, chunk, (int32_t)fn_divide_up(tiles, part)};
}

/* ---- shared memory ------------------------------------------------------------------------------------------------------ */

enum { GATES = FN_MM_TILE_KERNELS, FEW = GATES + FN_MM_GATE_KERNELS, KERNELS = FEW + FN_MM_FEW_KERNELS };

/* The devices that let the kernel have all that a block can have. */
static fn_cuda_devices allowed[2][KERNELS];

static fn_status allow(const fn_mm_tensor_kernels *table, const fn_mm_tensor_kernel *kernel, int32_t device,
                       int bytes) {
    const bool gate = kernel >= table->gate && kernel < table->gate + FN_MM_GATE_KERNELS;
    const bool few = kernel >= table->few && kernel < table->few + FN_MM_FEW_KERNELS;
    const ptrdiff_t number = few    ? FEW + (kernel - table->few)
                             : gate ? GATES + (kernel - table->gate)
                                    : kernel - table->tile;
    return fn_cuda_allow_shared(&allowed[table == &fn_mm_f16][number], device, kernel->function, bytes);
}

/* ---- which kernel ------------------------------------------------------------------------------------------------------- */

typedef struct {
    const fn_mm_tensor_kernel *kernel;
    int cluster, parts_each, threads, shared_bytes;
} layout;

/* A warp for each chunk of a part, a block for all parts: the fewest weights of which a block each has a multiprocessor to
 * itself, since a second round is slower. */
static bool few_layout(const fn_mm_tensor_kernels *table, const fn_mm_plan *plan, const fn_mm_cut *cut,
                       const fn_cuda_properties *device, layout *found) {
    const int64_t chunks = fn_divide_up(cut->part_tiles, cut->chunk_tiles);
    if (!device->exactly_90 || plan->k % 8 != 0 || chunks > FN_MM_FEW_MOST_WARPS) return false;
    for (int i = 0; i < FN_MM_FEW_KERNELS; i++) {
        const fn_mm_tensor_kernel *kernel = &table->few[i];
        if (kernel->tokens < plan->m || (int64_t)kernel->weights * device->multiprocessors < plan->n) continue;
        /* A thread for each part of each output, which it adds up; and a warp for each chunk. */
        const int64_t folding = fn_divide_up((int64_t)kernel->tokens * kernel->weights * FN_MM_GATE_PARTS, 32);
        const int warps = (int)(chunks > folding ? chunks : folding);
        const int bytes = warps * kernel->shared_bytes + kernel->sums_bytes;
        *found = (layout){kernel, 1, cut->parts, 32 * warps, bytes};
        return bytes <= device->shared_bytes;
    }
    return false;
}

/* The largest cluster of blocks with all shared memory that the device can hold; 1: none. */
static fn_status largest_cluster(const fn_mm_tensor_kernels *table, const fn_mm_plan *plan,
                                 const fn_cuda_properties *device, int *blocks) {
    static fn_cuda_counts known[2][FN_MM_GATE_PARTS + 1];
    const fn_mm_tensor_kernel *kernel = &table->gate[0];
    *blocks = 1;
    if (!device->clusters) return FN_OK;
    for (int size = FN_MM_GATE_PARTS; size > 1 && *blocks == 1; size--) {
        int clusters = 0;
        const fn_cuda_launch launch = {.kernel = kernel->function,
                                       .blocks = (unsigned)size,
                                       .outer_blocks = 1,
                                       .threads = 32 * FN_MM_GATE_MOST_WARPS,
                                       .cluster = size,
                                       .shared_bytes = device->shared_bytes,
                                       .device = plan->device_id};
        FN_TRY(fn_cuda_clusters_at_once(&known[table == &fn_mm_f16][size], &launch, &clusters));
        if (clusters > 0) *blocks = size;
    }
    return FN_OK;
}

/* A warp for each chunk, a block for each part. */
static bool gate_layout(const fn_mm_tensor_kernels *table, const fn_mm_plan *plan, const fn_mm_cut *cut,
                        const fn_cuda_properties *device, int largest, layout *found) {
    const int64_t warps = fn_divide_up(cut->part_tiles, cut->chunk_tiles);
    if (cut->parts > largest || plan->m > GATE_TOKENS || warps > FN_MM_GATE_MOST_WARPS) return false;
    const int owner_bits = 31 - __builtin_clz((unsigned)cut->parts);
    found->kernel = NULL;
    for (int i = 0; i < FN_MM_GATE_KERNELS; i++) {
        const fn_mm_tensor_kernel *kernel = &table->gate[i];
        const int bytes =
            (int)warps * kernel->shared_bytes + FN_GATE_BARRIER_BYTES + cut->parts * (kernel->sums_bytes >> owner_bits);
        if (bytes > device->shared_bytes) break;
        *found = (layout){kernel, cut->parts, 1, 32 * (int)warps, bytes};
        if (kernel->tokens >= plan->m) break;
    }
    return found->kernel != NULL;
}

static const fn_mm_tensor_kernel *find_tile(const fn_mm_tensor_kernels *table, bool chunked, bool whole, int64_t tokens,
                                            const fn_cuda_properties *device) {
    const fn_mm_tensor_kernel *best = NULL;
    for (int i = 0; i < FN_MM_TILE_KERNELS; i++) {
        const fn_mm_tensor_kernel *kernel = &table->tile[i];
        if (kernel->chunked != chunked || kernel->whole != whole || kernel->shared_bytes > device->shared_bytes)
            continue;
        best = kernel;
        if (kernel->tokens >= tokens) break;
    }
    return best;
}

static int64_t blocks_of(const fn_mm_tensor_kernel *kernel, const fn_mm_plan *plan) {
    return fn_divide_up(plan->n, kernel->weights) * fn_divide_up(plan->m, kernel->tokens);
}

static void tile_layout(const fn_mm_tensor_kernels *table, const fn_mm_plan *plan, const fn_mm_cut *cut, bool whole,
                        const fn_cuda_properties *device, int largest, layout *found) {
    const bool chunked = cut->parts > 1;
    const fn_mm_tensor_kernel *kernel = find_tile(table, chunked, whole, plan->m, device);
    /* Larger tiles read less, but leave multiprocessors idle when they are few. */
    while (kernel->tokens > 64 && blocks_of(kernel, plan) < device->multiprocessors * 3 / 4)
        kernel = find_tile(table, chunked, whole, kernel->tokens / 2, device);
    *found = (layout){kernel, 1, cut->parts, kernel->threads, kernel->shared_bytes};
    if (!chunked) return;
    int64_t cluster = device->multiprocessors / blocks_of(kernel, plan);
    if (cluster > cut->parts) cluster = cut->parts;
    if (cluster > largest) cluster = largest;
    if (cluster < 2) return;
    const int64_t each = fn_divide_up(cut->parts, cluster), more = each > 2 ? each - 2 : 0;
    const int64_t bytes = kernel->shared_bytes + more * kernel->sums_bytes;
    if (bytes > device->shared_bytes) return;
    *found = (layout){kernel, (int)fn_divide_up(cut->parts, each), (int)each, kernel->threads, (int)bytes};
}

static fn_status choose_layout(const fn_mm_tensor_kernels *table, const fn_mm_plan *plan, const fn_mm_cut *cut,
                               bool whole, const fn_cuda_properties *device, layout *chosen) {
    const bool parts = cut->parts > 1;
    int largest = 1;
    if (parts && whole && few_layout(table, plan, cut, device, chosen)) return FN_OK;
    if (parts) FN_TRY(largest_cluster(table, plan, device, &largest));
    if (parts && whole && gate_layout(table, plan, cut, device, largest, chosen)) return FN_OK;
    tile_layout(table, plan, cut, whole, device, largest, chosen);
    return FN_OK;
}

/* ---- operands ----------------------------------------------------------------------------------------------------------- */

static bool is_aligned(uint64_t address_or_stride, uint64_t to) { return address_or_stride % to == 0; }

static fn_mm_tensor_side side_of(const fn_matrix *from, int along_rows, int64_t rows) {
    fn_mm_tensor_side side = {from->data, from->stride[along_rows], from->stride[1 - along_rows], rows, false};
    side.whole = side.k_stride == 2 && is_aligned((uint64_t)(uintptr_t)side.data, 16) &&
                 (rows == 1 || is_aligned((uint64_t)side.row_stride, 16));
    return side;
}

static bool is_out_whole(const fn_mm_plan *plan) {
    const int bytes = fn_dtypes[plan->out.dtype].bytes;
    return plan->out.stride[1] == bytes && is_aligned((uint64_t)(uintptr_t)plan->out.data, 4 * (uint64_t)bytes) &&
           (plan->m == 1 || is_aligned((uint64_t)plan->out.stride[0], 4 * (uint64_t)bytes));
}

/* ---- launches ----------------------------------------------------------------------------------------------------------- */

static const char name[] = "CUDA product kernel";

fn_status fn_mm_run_tensor(const fn_mm_plan *plan) {
    const fn_mm_tensor_kernels *table = plan->a.dtype == FN_FLOAT16 ? &fn_mm_f16 : &fn_mm_bf16;
    const fn_mm_cut cut = fn_mm_cut_of(plan->n, plan->k);
    fn_mm_tensor_args args = {.tokens = side_of(&plan->a, 0, plan->m),
                              .weights = side_of(&plan->b, 1, plan->n),
                              .k = plan->k,
                              .cut = cut,
                              .early = plan->weights_are_constant,
                              .out = plan->out.data,
                              .bias = plan->bias.data,
                              .out_token_stride = plan->out.stride[0],
                              .out_weight_stride = plan->out.stride[1],
                              .bias_stride = plan->bias.stride[1],
                              .out_dtype = plan->out.dtype,
                              .bias_dtype = plan->bias.dtype,
                              .out_whole = is_out_whole(plan)};
    const bool whole = args.tokens.whole && args.weights.whole;
    fn_cuda_properties device;
    FN_TRY(fn_cuda_properties_of(plan->device_id, &device));
    if (fn_mm_hopper_serves(plan, &cut, &device)) return fn_mm_run_hopper(plan, &cut, &device);
    layout chosen;
    FN_TRY(choose_layout(table, plan, &cut, whole, &device, &chosen));
    args.cluster = chosen.cluster;
    args.parts_each = chosen.parts_each;
    FN_TRY(allow(table, chosen.kernel, plan->device_id, device.shared_bytes));
    const int64_t columns_of_blocks = fn_divide_up(plan->n, chosen.kernel->weights) * chosen.cluster;
    FN_REQUIRE(columns_of_blocks <= INT32_MAX, FN_ERROR_VALUE, "mm_dtype: b has too many columns for one launch");
    fn_cuda_launch launch = {.kernel = chosen.kernel->function,
                             .args = &args,
                             .blocks = (unsigned)columns_of_blocks,
                             .threads = (unsigned)chosen.threads,
                             .cluster = chosen.cluster,
                             .shared_bytes = chosen.shared_bytes,
                             .device = plan->device_id,
                             .stream = plan->stream};
    const int64_t most_rows = (int64_t)MOST_OUTER_BLOCKS * chosen.kernel->tokens;
    for (int64_t row = 0; row < plan->m; row += most_rows) {
        const int64_t rows = plan->m - row < most_rows ? plan->m - row : most_rows;
        args.tokens.data = plan->a.data + row * plan->a.stride[0];
        args.tokens.rows = rows;
        args.out = plan->out.data + row * plan->out.stride[0];
        launch.outer_blocks = (unsigned)fn_divide_up(rows, chosen.kernel->tokens);
        FN_TRY(fn_cuda_run(name, &launch));
    }
    return FN_OK;
}

fn_status fn_mm_tensor_warmup(void) {
    const fn_mm_tensor_kernels *const tables[] = {&fn_mm_bf16, &fn_mm_f16};
    for (int t = 0; t < 2; t++) {
        for (int i = 0; i < FN_MM_TILE_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->tile[i].function));
        for (int i = 0; i < FN_MM_GATE_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->gate[i].function));
        for (int i = 0; i < FN_MM_FEW_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->few[i].function));
    }
    return FN_OK;
}
