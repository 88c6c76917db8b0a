/* mm_tensor.c: a product of two operands of the same 16-bit dtype becomes launches: how K is cut, which kernel, which grid.
 *
 * How K is cut into chunks decides bits and follows from N and K alone. All else moves speed alone.
 */
#include "mm_tensor.h"

#include "cuda.h"
#include "mm_hopper.h"

enum {
    GATE_TOKENS = 128,    /* rows of a, up to which a warp takes a chunk */
    MOST_CHUNKS_EACH = 4, /* of a block of a gate kernel */
    MOST_OUTER_BLOCKS = 65535,
};

static int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- shared memory ------------------------------------------------------------------------------------------------------ */

/* The devices that let the kernel have all that a block can have. */
static fn_cuda_devices allowed[2][FN_MM_TILE_KERNELS + FN_MM_GATE_KERNELS];

static fn_status allow(const fn_mm_tensor_kernels *table, const fn_mm_tensor_kernel *kernel, int32_t device,
                       int bytes) {
    const bool gate = kernel >= table->gate && kernel < table->gate + FN_MM_GATE_KERNELS;
    fn_cuda_devices *const done =
        &allowed[table == &fn_mm_f16][gate ? FN_MM_TILE_KERNELS + (kernel - table->gate) : kernel - table->tile];
    return fn_cuda_allow_shared(done, device, kernel->function, bytes);
}

/* ---- which kernel ------------------------------------------------------------------------------------------------------- */

typedef struct {
    const fn_mm_tensor_kernel *kernel;
    int cluster, chunks_each, threads, shared_bytes;
} layout;

/* A warp for each chunk, a cluster for all. */
static bool gate_layout(const fn_mm_tensor_kernels *table, const fn_mm_plan *plan, int64_t chunks,
                        const fn_cuda_properties *device, layout *found) {
    if (!device->clusters || plan->m > GATE_TOKENS || chunks > FN_MM_TENSOR_MOST_BLOCKS * MOST_CHUNKS_EACH)
        return false;
    const int each = (int)divided(chunks, FN_MM_TENSOR_MOST_BLOCKS);
    found->kernel = NULL;
    for (int i = 0; i < FN_MM_GATE_KERNELS; i++) {
        const fn_mm_tensor_kernel *kernel = &table->gate[i];
        const int cluster = (int)divided(chunks, each), owner_bits = 31 - __builtin_clz((unsigned)cluster);
        const int bytes = each * kernel->shared_bytes + (int)chunks * (kernel->sums_bytes >> owner_bits);
        if (bytes > device->shared_bytes) break;
        *found = (layout){kernel, cluster, each, 32 * each, bytes};
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
    return divided(plan->n, kernel->weights) * divided(plan->m, kernel->tokens);
}

static void tile_layout(const fn_mm_tensor_kernels *table, const fn_mm_plan *plan, bool chunked, bool whole,
                        int64_t chunks, const fn_cuda_properties *device, layout *found) {
    const fn_mm_tensor_kernel *kernel = find_tile(table, chunked, whole, plan->m, device);
    /* Larger tiles read less, but leave multiprocessors idle when they are few. */
    while (kernel->tokens > 64 && blocks_of(kernel, plan) < device->multiprocessors * 3 / 4)
        kernel = find_tile(table, chunked, whole, kernel->tokens / 2, device);
    *found = (layout){kernel, 1, (int)chunks, kernel->threads, kernel->shared_bytes};
    if (!chunked || !device->clusters) return;
    int64_t cluster = device->multiprocessors / blocks_of(kernel, plan);
    if (cluster > FN_MM_TENSOR_MOST_BLOCKS) cluster = FN_MM_TENSOR_MOST_BLOCKS;
    if (cluster > chunks) cluster = chunks;
    if (cluster < 2) return;
    const int64_t room = (device->shared_bytes - kernel->shared_bytes) / kernel->sums_bytes;
    int64_t each = divided(chunks, cluster);
    if (each > room) each = room;
    if (each < 1 || divided(chunks, each) < 2 || divided(chunks, each) > FN_MM_TENSOR_MOST_BLOCKS) return;
    const int64_t bytes = kernel->shared_bytes + each * kernel->sums_bytes;
    *found = (layout){kernel, (int)divided(chunks, each), (int)each, kernel->threads, (int)bytes};
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
    const bool chunked = plan->n <= FN_MM_GATE_COLUMNS && plan->k > FN_MM_GATE_CHUNK;
    const int64_t tiles = divided(plan->k, FN_MM_TILE_K);
    fn_mm_tensor_args args = {.tokens = side_of(&plan->a, 0, plan->m),
                              .weights = side_of(&plan->b, 1, plan->n),
                              .k = plan->k,
                              .chunk_tiles = chunked ? FN_MM_GATE_CHUNK / FN_MM_TILE_K : tiles,
                              .chunks = (int32_t)(chunked ? divided(plan->k, FN_MM_GATE_CHUNK) : 1),
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
    if (fn_mm_hopper_serves(plan, chunked, &device)) return fn_mm_run_hopper(plan, chunked, &device);
    layout chosen;
    if (!chunked || !whole || !gate_layout(table, plan, args.chunks, &device, &chosen))
        tile_layout(table, plan, chunked, whole, args.chunks, &device, &chosen);
    args.cluster = chosen.cluster;
    args.chunks_each = chosen.chunks_each;
    FN_TRY(allow(table, chosen.kernel, plan->device_id, device.shared_bytes));
    const int64_t columns_of_blocks = divided(plan->n, chosen.kernel->weights) * chosen.cluster;
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
        launch.outer_blocks = (unsigned)divided(rows, chosen.kernel->tokens);
        FN_TRY(fn_cuda_run(name, &launch));
    }
    return FN_OK;
}

fn_status fn_mm_tensor_warmup(void) {
    const fn_mm_tensor_kernels *const tables[] = {&fn_mm_bf16, &fn_mm_f16};
    for (int t = 0; t < 2; t++) {
        for (int i = 0; i < FN_MM_TILE_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->tile[i].function));
        for (int i = 0; i < FN_MM_GATE_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->gate[i].function));
    }
    return FN_OK;
}
