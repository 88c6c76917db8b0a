/* mm_hopper.c: products of operands that the copy engine can read, on compute capability 9.0: which kernel, which grid.
 *
 * Chosen by what was measured on an H200, bfloat16, the weights not in L2 (4096 x 4096, in us; the mma.sync tiles were never
 * faster): tokens 1 10.6, 16 10.6, 32 11.1, 64 12.0, 128 18.6; above, 657 to 709 TFLOP/s.
 */
#include "mm_hopper.h"

#include "tensor_map.h"

#ifdef FN_MM_HOPPER /* tools/build_cuda.py: compute capability 9.0 is among the GPUs that are compiled for */

enum {
    DECODE_TOKENS = 64,    /* rows of a up to which the weights are read at the speed of the memory, or nearly */
    GATE_TOKENS = 128,     /* rows of a from which a gate may be worked on in tiles */
    DECODE_MOST_ROWS = 64, /* of the weights in a tile */
    DECODE_LEAST_ROWS = 16,
    DECODE_ROW_STEP = 8,
    GROUP_ROWS = 2048, /* of a, worked on side by side */
    PREFILL_STEPS = 2, /* products of the tensor core for each 16 k of a prefill tile; of a decode tile: 1 */
};

static int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
        const int64_t busiest = divided(divided(n, rows), multiprocessors) * rows;
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
    const int64_t rows = decode_rows(plan->n, device->multiprocessors);
    const int64_t decode = divided(plan->n, rows * kernel->cluster) * divided(plan->m, kernel->tokens);
    const int64_t prefill = divided(plan->n, table->prefill.unit_n) * divided(plan->m, table->prefill.unit_m);
    const int64_t decode_turns = divided(decode, device->multiprocessors / kernel->cluster);
    const int64_t prefill_turns = divided(prefill, device->multiprocessors / table->prefill.cluster);
    return decode_turns < PREFILL_STEPS * prefill_turns ? kernel : NULL;
}

bool fn_mm_hopper_serves(const fn_mm_plan *plan, bool chunked, const fn_cuda_properties *device) {
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
    if (!chunked) return true;
    /* Fewer tiles than half of the multiprocessors: the blocks of mm_tile.cuh, which share the chunks, are more. */
    const fn_mm_prefill_kernel *gate = &table_of(plan)->gate;
    return plan->m >= GATE_TOKENS &&
           2 * divided(plan->n, gate->unit_n) * divided(plan->m, gate->unit_m) >= device->multiprocessors;
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
static fn_status launch(const fn_mm_plan *plan, const void *kernel, const void *args, int64_t units, int cluster,
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
                              .k_stages = (uint32_t)divided(plan->k, FN_DECODE_BLOCKS * FN_MM_TILE_K),
                              .stages = (uint32_t)(fit < FN_DECODE_MOST_STAGES ? fit : FN_DECODE_MOST_STAGES),
                              .rows = (uint32_t)rows,
                              .tiles_m = (uint32_t)divided(plan->m, kernel->tokens),
                              .early = plan->weights_are_constant};
    args.units = (uint32_t)divided(plan->n, (int64_t)rows * kernel->cluster) * args.tiles_m;
    FN_TRY(make_maps(plan, &args.a, kernel->tokens / kernel->cluster, &args.b, rows, NULL));
    FN_TRY(fn_cuda_allow_shared(allowed, plan->device_id, kernel->function, device->shared_bytes));
    return launch(plan, kernel->function, &args, args.units, kernel->cluster, FN_DECODE_THREADS, device->shared_bytes,
                  device);
}

static fn_status run_prefill(const fn_mm_plan *plan, const fn_mm_prefill_kernel *kernel, fn_cuda_devices *allowed,
                             const fn_cuda_properties *device) {
    fn_mm_prefill_args args = {.to = result_of(plan),
                               .k_blocks = (uint32_t)divided(plan->k, FN_MM_TILE_K),
                               .units_n = (uint32_t)divided(plan->n, kernel->unit_n),
                               .units_m = (uint32_t)divided(plan->m, kernel->unit_m),
                               .group = (uint32_t)divided(GROUP_ROWS, kernel->unit_m)};
    args.units = args.units_m * args.units_n;
    FN_TRY(make_maps(plan, &args.a, kernel->a_box, &args.b, kernel->b_box, args.to.by_engine ? &args.out : NULL));
    FN_TRY(fn_cuda_allow_shared(allowed, plan->device_id, kernel->function, device->shared_bytes));
    return launch(plan, kernel->function, &args, args.units, kernel->cluster, FN_PREFILL_THREADS, kernel->shared_bytes,
                  device);
}

fn_status fn_mm_run_hopper(const fn_mm_plan *plan, bool chunked, const fn_cuda_properties *device) {
    enum { PREFILL = FN_MM_DECODE_KERNELS, GATE, KERNELS };
    static fn_cuda_devices allowed[2][KERNELS];
    const fn_mm_hopper_kernels *table = table_of(plan);
    fn_cuda_devices *const own = allowed[table == &fn_mm_hopper_f16];
    if (chunked) return run_prefill(plan, &table->gate, &own[GATE], device);
    const fn_mm_decode_kernel *decode = find_decode(plan, device);
    if (decode) return run_decode(plan, decode, &own[decode - table->decode], device);
    return run_prefill(plan, &table->prefill, &own[PREFILL], device);
}

fn_status fn_mm_hopper_warmup(void) {
    const fn_mm_hopper_kernels *const tables[] = {&fn_mm_hopper_bf16, &fn_mm_hopper_f16};
    for (int t = 0; t < 2; t++) {
        for (int i = 0; i < FN_MM_DECODE_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->decode[i].function));
        FN_TRY(fn_cuda_load(tables[t]->prefill.function));
        FN_TRY(fn_cuda_load(tables[t]->gate.function));
    }
    return FN_OK;
}

#else

bool fn_mm_hopper_serves(const fn_mm_plan *plan, bool chunked, const fn_cuda_properties *device) {
    (void)plan, (void)chunked, (void)device;
    return false;
}

fn_status fn_mm_run_hopper(const fn_mm_plan *plan, bool chunked, const fn_cuda_properties *device) {
    (void)plan, (void)chunked, (void)device;
    return fn_fail(FN_ERROR_RUNTIME, "CUDA product: built without compute capability 9.0");
}

fn_status fn_mm_hopper_warmup(void) { return FN_OK; }

#endif
