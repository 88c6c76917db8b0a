/* mm_hopper.c: products of operands that the copy engine can read, on compute capability 9.0: which kernel, which grid.
 *
 * Chosen by what was measured on an H200, bfloat16, the weights not in L2 (4096 x 4096, in us; the mma.sync tiles were never
 * faster): tokens 1 10.6, 16 10.6, 32 11.1, 64 12.0, 128 18.6; above, 657 to 709 TFLOP/s.
 */
#include "mm_hopper.h"

#include "tensor_map.h"

#ifdef FN_MM_HOPPER /* tools/build_cuda.py: compute capability 9.0 is among the GPUs that are compiled for */

enum {
    DECODE_TOKENS = 64, /* rows of a up to which the weights are read at the speed of the memory, or nearly */
    GATE_TOKENS = 32,   /* rows of a up to which mm_gate.cuh is faster, where K is cut */
    DECODE_MOST_TOKENS = 512,
    DECODE_MOST_ROWS = 64, /* of the weights in a tile */
    DECODE_LEAST_ROWS = 16,
    DECODE_ROW_STEP = 8,
    GROUP_ROWS = 2048, /* of a, worked on side by side */
    PREFILL_STEPS = 2, /* products of the tensor core for each 16 k of a prefill tile; of a decode tile: 1 */
};

static const fn_mm_hopper_kernels *table_of(const fn_mm_plan *plan) {
    return plan->a.dtype == FN_FLOAT16 ? &fn_mm_hopper_f16 : &fn_mm_hopper_bf16;
}

static fn_tensor_map_source tokens_of(const fn_mm_plan *plan) {
    return (fn_tensor_map_source){plan->a.data, plan->a.dtype, plan->m, plan->k, plan->a.stride[0]};
}

static fn_tensor_map_source weights_of(const fn_mm_plan *plan) {
    return (fn_tensor_map_source){plan->b.data, plan->b.dtype, plan->n, plan->k, plan->b.stride[1]};
}

static fn_tensor_map_source out_of(const fn_mm_plan *plan) {
    return (fn_tensor_map_source){plan->out.data, plan->out.dtype, plan->m, plan->n, plan->out.stride[0]};
}

/* ---- which kernel ------------------------------------------------------------------------------------------------------- */

/* Rows of the weights in a decode tile: the fewest for the busiest multiprocessor, and of those the largest tile. */
static int decode_rows(int64_t n, int multiprocessors) {
    int best = DECODE_MOST_ROWS;
    int64_t least = INT64_MAX;
    for (int rows = DECODE_MOST_ROWS; rows >= DECODE_LEAST_ROWS; rows -= DECODE_ROW_STEP) {
        const int64_t busiest = fn_divide_up(fn_divide_up(n, rows), multiprocessors) * rows;
        if (busiest < least) least = busiest, best = rows;
    }
    return best;
}

/* NULL: the prefill kernel. Where tokens and weights are few, its tiles leave most multiprocessors idle. */
static const fn_mm_decode_kernel *find_decode(const fn_mm_plan *plan, const fn_cuda_properties *device) {
    const fn_mm_hopper_kernels *table = table_of(plan);
    const fn_mm_decode_kernel *kernel = table->decode;
    while (kernel->tokens < plan->m && kernel < table->decode + FN_MM_DECODE_KERNELS - 1) kernel++;
    if (plan->m <= DECODE_TOKENS) return kernel;
    if (plan->m > DECODE_MOST_TOKENS) return NULL; /* turns are no measure where there are many */
    const int64_t rows = decode_rows(plan->n, device->multiprocessors);
    const int64_t decode = fn_divide_up(plan->n, rows * kernel->cluster) * fn_divide_up(plan->m, kernel->tokens);
    const int64_t prefill = fn_divide_up(plan->n, table->prefill.unit_n) * fn_divide_up(plan->m, table->prefill.unit_m);
    const int64_t decode_turns = fn_divide_up(decode, device->multiprocessors / kernel->cluster);
    const int64_t prefill_turns = fn_divide_up(prefill, device->multiprocessors / table->prefill.cluster);
    return decode_turns < PREFILL_STEPS * prefill_turns ? kernel : NULL;
}

bool fn_mm_hopper_serves(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_cuda_properties *device) {
    enum { LEAST_MULTIPROCESSORS = 2 }; /* a cluster's */
    if (!device->exactly_90 || device->multiprocessors < LEAST_MULTIPROCESSORS) return false;
    const int bytes = fn_dtypes[plan->a.dtype].bytes, out_bytes = fn_dtypes[plan->out.dtype].bytes;
    const fn_tensor_map_source tokens = tokens_of(plan), weights = weights_of(plan);
    if (plan->a.stride[1] != bytes || plan->b.stride[0] != bytes || !fn_tensor_map_serves(&tokens) ||
        !fn_tensor_map_serves(&weights))
        return false;
    if (plan->out.stride[1] != out_bytes || (uintptr_t)plan->out.data % (unsigned)out_bytes != 0 ||
        plan->out.stride[0] % out_bytes != 0)
        return false;
    return cut->parts == 1 || plan->m > GATE_TOKENS;
}

/* ---- launches ----------------------------------------------------------------------------------------------------------- */

static const char name[] = "CUDA product kernel";

static fn_mm_out result_of(const fn_mm_plan *plan) {
    const fn_tensor_map_source out = out_of(plan);
    return (fn_mm_out){.data = plan->out.data,
                       .stride = plan->out.stride[0],
                       .bias = plan->bias.data,
                       .bias_stride = plan->bias.stride[1],
                       .dtype = plan->out.dtype,
                       .bias_dtype = plan->bias.dtype,
                       .rows = (uint32_t)plan->m,
                       .columns = (uint32_t)plan->n,
                       .by_engine = fn_tensor_map_serves(&out)};
}

/* Blocks stay until all units are done: no more clusters than fit at once. */
static fn_status launch_units(const fn_mm_plan *plan, const void *kernel, const void *args, int64_t units, int cluster,
                              int threads, int shared_bytes, const fn_cuda_properties *device) {
    const int64_t fit = device->multiprocessors / cluster, clusters = units < fit ? units : fit;
    return fn_cuda_run(name, &(fn_cuda_launch){.kernel = kernel,
                                               .args = args,
                                               .blocks = (unsigned)(clusters * cluster),
                                               .outer_blocks = 1,
                                               .threads = (unsigned)threads,
                                               .cluster = cluster,
                                               .shared_bytes = shared_bytes,
                                               .device = plan->device_id,
                                               .stream = plan->stream});
}

/* The operands' maps, and that of out where the engine writes it. */
static fn_status make_maps(const fn_mm_plan *plan, CUtensorMap *a, int a_box, CUtensorMap *b, int b_box,
                           CUtensorMap *out) {
    const fn_tensor_map_source tokens = tokens_of(plan), weights = weights_of(plan), result = out_of(plan);
    int previous = 0;
    FN_TRY(fn_cuda_enter(plan->device_id, &previous));
    fn_status status = fn_tensor_map(a, &tokens, a_box);
    if (status == FN_OK) status = fn_tensor_map(b, &weights, b_box);
    if (status == FN_OK && out) status = fn_tensor_map(out, &result, FN_STAGING_ROWS);
    fn_cuda_leave(plan->device_id, previous);
    return status;
}

static fn_status run_decode(const fn_mm_plan *plan, const fn_mm_decode_kernel *kernel, fn_cuda_devices *allowed,
                            const fn_cuda_properties *device) {
    const int rows = decode_rows(plan->n, device->multiprocessors);
    const int stage = FN_DECODE_BLOCKS * FN_ATOM_BYTES * (rows + kernel->tokens);
    const int barriers = 2 * (int)sizeof(uint64_t);
    const int fit = (device->shared_bytes - FN_SHARED_ALIGNMENT - FN_DECODE_SLACK) / (stage + barriers);
    fn_mm_decode_args args = {.to = result_of(plan),
                              .k_stages = (uint32_t)fn_divide_up(plan->k, FN_DECODE_BLOCKS * FN_MM_TILE_K),
                              .stages = (uint32_t)(fit < FN_DECODE_MOST_STAGES ? fit : FN_DECODE_MOST_STAGES),
                              .rows = (uint32_t)rows,
                              .tiles_m = (uint32_t)fn_divide_up(plan->m, kernel->tokens),
                              .early = plan->weights_are_constant};
    args.units = (uint32_t)fn_divide_up(plan->n, (int64_t)rows * kernel->cluster) * args.tiles_m;
    FN_TRY(make_maps(plan, &args.a, kernel->tokens / kernel->cluster, &args.b, rows, NULL));
    FN_TRY(fn_cuda_allow_shared(allowed, plan->device_id, kernel->function, device->shared_bytes));
    return launch_units(plan, kernel->function, &args, args.units, kernel->cluster, FN_DECODE_THREADS,
                        device->shared_bytes, device);
}

static fn_status run_prefill(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_mm_prefill_kernel *kernel,
                             fn_cuda_devices *allowed, const fn_cuda_properties *device) {
    fn_mm_prefill_args args = {.to = result_of(plan),
                               .k_blocks = (uint32_t)fn_divide_up(plan->k, FN_MM_TILE_K),
                               .part_blocks = (uint32_t)cut->part_tiles,
                               .units_n = (uint32_t)fn_divide_up(plan->n, kernel->unit_n),
                               .units_m = (uint32_t)fn_divide_up(plan->m, kernel->unit_m),
                               .group = (uint32_t)fn_divide_up(GROUP_ROWS, kernel->unit_m)};
    args.units = args.units_m * args.units_n;
    FN_TRY(make_maps(plan, &args.a, kernel->a_box, &args.b, kernel->b_box, args.to.by_engine ? &args.out : NULL));
    FN_TRY(fn_cuda_allow_shared(allowed, plan->device_id, kernel->function, device->shared_bytes));
    return launch_units(plan, kernel->function, &args, args.units, kernel->cluster, FN_PREFILL_THREADS,
                        kernel->shared_bytes, device);
}

/* ---- K in parts ---------------------------------------------------------------------------------------------------------- */

/* A kernel, for the estimate of its time. */
typedef struct {
    uint32_t tokens, weights, cluster, resident,
        parts;      /* a block's tile; blocks on a multiprocessor; parts of K a block works on */
    double fetched; /* of its operands, that no other block has fetched for it */
    double sums;    /* of its tile's sums, moved through shared memory when all are there */
} tiling;

/* `blocks` at a time, on the multiprocessors that clusters of such blocks can use. Nanoseconds, nearly: measured on an H200, and
 * such that of 10 kernels at 55 shapes the best was chosen, or one within 4 %, but 4 times (6 to 37 % slower). */
static double round_of(const tiling *t, uint32_t part_tiles, uint32_t blocks, uint32_t usable) {
    const double start = 1200; /* a launch, and what comes first */
    const double sums = 20, operands = 80,
                 l2 = 7500; /* bytes in a nanosecond: of a multiprocessor, twice; of the device */
    const double each = (blocks + usable - 1) / usable, cells = (double)t->tokens * t->weights;
    const double bytes = (double)FN_ATOM_BYTES * t->parts * part_tiles * (t->tokens + t->weights);
    const double in = each * bytes / operands, out = blocks * t->fetched * bytes / l2;
    return start + each * t->sums * cells * sizeof(float) / sums + (in > out ? in : out);
}

static double estimate(const tiling *t, const fn_mm_plan *plan, const fn_mm_cut *cut, uint32_t clusters_at_once) {
    const uint32_t rows = plan->m < INT32_MAX ? (uint32_t)plan->m : INT32_MAX, parts = (uint32_t)cut->part_tiles;
    const uint32_t clusters = (rows + t->tokens - 1) / t->tokens * (((uint32_t)plan->n + t->weights - 1) / t->weights);
    const uint32_t at_once = clusters_at_once * t->cluster, usable = at_once / t->resident;
    const uint32_t rounds = clusters / clusters_at_once, rest = clusters % clusters_at_once;
    return (rounds ? rounds * round_of(t, parts, at_once, usable) : 0) +
           (rest ? round_of(t, parts, rest * t->cluster, usable) : 0);
}

static tiling tiling_of_split(const fn_mm_split_kernel *kernel) {
    tiling t = {(uint32_t)kernel->tokens,
                (uint32_t)kernel->weights,
                (uint32_t)kernel->cluster,
                (uint32_t)kernel->resident,
                FN_MM_GATE_PARTS / (uint32_t)kernel->cluster,
                1,
                1};
    if (t.parts == 2) t.sums = 1.5; /* half of the blocks send two parts' sums */
    if (t.parts == 4) t.sums = 0.5; /* half of them stay where they are */
    return t;
}

/* The blocks of a cluster have tiles of their own, and share what they fetch of b. */
static tiling tiling_of_parts(const fn_mm_prefill_kernel *kernel) {
    tiling t = {
        (uint32_t)(kernel->unit_m / kernel->cluster), (uint32_t)kernel->unit_n, 1, 1, FN_MM_GATE_PARTS, 1, 0.25};
    t.fetched = (t.tokens + (double)t.weights / kernel->cluster) / (t.tokens + t.weights);
    return t;
}

static fn_cuda_launch split_launch(const fn_mm_plan *plan, const fn_mm_split_kernel *kernel, const void *args,
                                   int64_t tiles) {
    return (fn_cuda_launch){.kernel = kernel->function,
                            .args = args,
                            .blocks = (unsigned)(tiles * kernel->cluster),
                            .outer_blocks = 1,
                            .threads = (unsigned)kernel->threads,
                            .cluster = kernel->cluster,
                            .shared_bytes = kernel->shared_bytes,
                            .device = plan->device_id,
                            .stream = plan->stream};
}

/* NULL: the kernel whose blocks do not share K. */
static fn_status find_split(const fn_mm_plan *plan, const fn_mm_cut *cut, fn_cuda_devices *allowed,
                            const fn_cuda_properties *device, const fn_mm_split_kernel **found) {
    static fn_cuda_counts at_once[2][FN_MM_SPLIT_KERNELS];
    const fn_mm_hopper_kernels *table = table_of(plan);
    const tiling unsplit = tiling_of_parts(&table->parts);
    double least = estimate(&unsplit, plan, cut, (uint32_t)device->multiprocessors);
    *found = NULL;
    for (int i = 0; i < FN_MM_SPLIT_KERNELS; i++) {
        const fn_mm_split_kernel *kernel = &table->split[i];
        const fn_cuda_launch launch = split_launch(plan, kernel, NULL, 1);
        const tiling split = tiling_of_split(kernel);
        int clusters = 0;
        FN_TRY(fn_cuda_allow_shared(&allowed[i], plan->device_id, kernel->function, device->shared_bytes));
        FN_TRY(fn_cuda_clusters_at_once(&at_once[table == &fn_mm_hopper_f16][i], &launch, &clusters));
        if (clusters < 1) continue;
        const double time = estimate(&split, plan, cut, (uint32_t)clusters);
        if (time < least) least = time, *found = kernel;
    }
    return FN_OK;
}

static fn_status run_split(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_mm_split_kernel *kernel) {
    fn_mm_split_args args = {.to = result_of(plan),
                             .k_blocks = (uint32_t)fn_divide_up(plan->k, FN_MM_TILE_K),
                             .part_blocks = (uint32_t)cut->part_tiles,
                             .tiles_m = (uint32_t)fn_divide_up(plan->m, kernel->tokens),
                             .early = plan->weights_are_constant};
    FN_TRY(make_maps(plan, &args.a, kernel->tokens, &args.b, kernel->weights, NULL));
    const fn_cuda_launch launch =
        split_launch(plan, kernel, &args, args.tiles_m * fn_divide_up(plan->n, kernel->weights));
    return fn_cuda_run(name, &launch);
}

/* ---- all ----------------------------------------------------------------------------------------------------------------- */

fn_status fn_mm_run_hopper(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_cuda_properties *device) {
    enum { PREFILL = FN_MM_DECODE_KERNELS, PARTS, SPLIT, KERNELS = SPLIT + FN_MM_SPLIT_KERNELS };
    static fn_cuda_devices allowed[2][KERNELS];
    const fn_mm_hopper_kernels *table = table_of(plan);
    fn_cuda_devices *const own = allowed[table == &fn_mm_hopper_f16];
    if (cut->parts > 1) {
        const fn_mm_split_kernel *split;
        FN_TRY(find_split(plan, cut, own + SPLIT, device, &split));
        if (split) return run_split(plan, cut, split);
        return run_prefill(plan, cut, &table->parts, &own[PARTS], device);
    }
    const fn_mm_decode_kernel *decode = find_decode(plan, device);
    if (decode) return run_decode(plan, decode, &own[decode - table->decode], device);
    return run_prefill(plan, cut, &table->prefill, &own[PREFILL], device);
}

fn_status fn_mm_hopper_warmup(void) {
    const fn_mm_hopper_kernels *const tables[] = {&fn_mm_hopper_bf16, &fn_mm_hopper_f16};
    for (int t = 0; t < 2; t++) {
        for (int i = 0; i < FN_MM_DECODE_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->decode[i].function));
        FN_TRY(fn_cuda_load(tables[t]->prefill.function));
        FN_TRY(fn_cuda_load(tables[t]->parts.function));
        for (int i = 0; i < FN_MM_SPLIT_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->split[i].function));
    }
    return FN_OK;
}

#else

bool fn_mm_hopper_serves(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_cuda_properties *device) {
    (void)plan, (void)cut, (void)device;
    return false;
}

fn_status fn_mm_run_hopper(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_cuda_properties *device) {
    (void)plan, (void)cut, (void)device;
    return fn_fail(FN_ERROR_RUNTIME, "CUDA product: built without compute capability 9.0");
}

fn_status fn_mm_hopper_warmup(void) { return FN_OK; }

#endif
