/* mm_hopper.c: products of operands that the copy engine can read, on compute capability 9.0: which kernel, which grid.
 *
 * Chosen by what was measured on an H200, bfloat16, the weights not in L2 (4096 x 4096, in us; the mma.sync tiles were never
 * faster): tokens 1 10.6, 16 10.6, 32 11.1, 64 12.0, 96 11.2, 128 12.0, 256 16.5; from 1024 on, 657 to 709 TFLOP/s.
 */
#include "mm_hopper.h"

#include "tensor_map.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef FN_MM_HOPPER /* tools/build_cuda.py: compute capability 9.0 is among the GPUs that are compiled for */

enum {
    GATE_TOKENS = 32,  /* rows of a up to which mm_gate.cuh is faster, where K is cut */
    GROUP_ROWS = 2048, /* of a, worked on side by side */
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

/* A place in the tables; -1: none; FUSEDNORM_CUDA_PRODUCT or fn_cuda_force_product names it. -2: the environment was not read. */
static atomic_int forced_split = -2;

static fn_status split_from_name(const char *source, const char *name, int *found) {
    char names[24 * FN_MM_SPLIT_KERNELS] = "";
    for (int i = 0; i < FN_MM_SPLIT_KERNELS; i++) {
        const char *known = fn_mm_hopper_bf16.split[i].name;
        if (strcmp(name, known) == 0) {
            *found = i;
            return FN_OK;
        }
        const size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, "%s%s", used ? ", " : "", known);
    }
    return fn_fail(FN_ERROR_RUNTIME, "%s is \"%.40s\": must be one of %s", source, name, names);
}

static fn_status get_forced_split(int *forced) {
    *forced = atomic_load_explicit(&forced_split, memory_order_relaxed);
    if (*forced == -2) {
        const char *name = getenv("FUSEDNORM_CUDA_PRODUCT");
        *forced = -1;
        if (name && *name) FN_TRY(split_from_name("FUSEDNORM_CUDA_PRODUCT", name, forced));
        atomic_store(&forced_split, *forced);
    }
    return FN_OK;
}

fn_status fn_cuda_force_product(const char *name) {
    int found = -2;
    if (name) FN_TRY(split_from_name("the forced product kernel", name, &found));
    atomic_store(&forced_split, found);
    return FN_OK;
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
    int forced;
    return cut->parts == 1 || plan->m > GATE_TOKENS || get_forced_split(&forced) != FN_OK || forced >= 0;
}

/* ---- answers -------------------------------------------------------------------------------------------------------------- */

/* The estimates of all kernels take 0.2 to 0.3 us on the host, so answers are kept: a question and its kernel's place in one word,
 * which threads may read and write as they like. */
enum { KERNEL_BITS = 4, ANSWER_BITS = 8 };
typedef struct {
    _Atomic uint64_t words[2][1 << ANSWER_BITS]; /* of bfloat16, of float16 */
} kept_answers;

/* 0: a question that does not fit, and is not kept. Of M and N one is small. */
typedef struct {
    _Atomic uint64_t *place;
    uint64_t asked;
} question;

static question ask(kept_answers *kept, const fn_mm_plan *plan, int n_bits) {
    enum { M_AND_N_BITS = 34, K_BITS = 20, DEVICE_BITS = 6 };
    _Static_assert(M_AND_N_BITS + K_BITS + DEVICE_BITS + KERNEL_BITS == 64, "");
    _Static_assert(FN_CUDA_MOST_DEVICES <= 1 << DEVICE_BITS, "");
    uint64_t asked = 0;
    if (!(plan->m >> (M_AND_N_BITS - n_bits) || plan->n >> n_bits || plan->k >> K_BITS ||
          plan->device_id >> DEVICE_BITS)) {
        asked = (uint64_t)plan->m << n_bits | (uint64_t)plan->n;
        asked = (asked << K_BITS | (uint64_t)plan->k) << DEVICE_BITS | (uint64_t)plan->device_id;
    }
    const uint64_t at = asked * UINT64_C(0x9e3779b97f4a7c15) >> (64 - ANSWER_BITS);
    return (question){&kept->words[table_of(plan) == &fn_mm_hopper_f16][at], asked};
}

/* -1: not known. */
static int answer_to(question q) {
    const uint64_t word = atomic_load_explicit(q.place, memory_order_relaxed);
    return q.asked && word >> KERNEL_BITS == q.asked ? (int)(word & ((1 << KERNEL_BITS) - 1)) : -1;
}

static void keep(question q, int answer) {
    if (q.asked) atomic_store_explicit(q.place, q.asked << KERNEL_BITS | (uint64_t)answer, memory_order_relaxed);
}

/* ---- launches ----------------------------------------------------------------------------------------------------------- */

static const char name[] = "CUDA product kernel";

static fn_mm_out result_of(const fn_mm_plan *plan) {
    enum { ENGINE_BYTES = 16 }; /* that it writes at once, also where a row ends among them */
    const fn_tensor_map_source out = out_of(plan);
    const bool whole = plan->n * fn_dtypes[plan->out.dtype].bytes % ENGINE_BYTES == 0;
    return (fn_mm_out){.data = plan->out.data,
                       .stride = plan->out.stride[0],
                       .bias = plan->bias.data,
                       .bias_stride = plan->bias.stride[1],
                       .dtype = plan->out.dtype,
                       .bias_dtype = plan->bias.dtype,
                       .rows = (uint32_t)plan->m,
                       .columns = (uint32_t)plan->n,
                       .by_engine = whole && fn_tensor_map_serves(&out)};
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

/* The operands' maps, and that of out where the engine writes it, in boxes of out_box rows of out_bytes. */
static fn_status make_maps(const fn_mm_plan *plan, CUtensorMap *a, int a_box, CUtensorMap *b, int b_box,
                           CUtensorMap *out, int out_box, int out_bytes) {
    const fn_tensor_map_source tokens = tokens_of(plan), weights = weights_of(plan), result = out_of(plan);
    int previous = 0;
    FN_TRY(fn_cuda_enter(plan->device_id, &previous));
    fn_status status = fn_tensor_map(a, &tokens, a_box, FN_ATOM_BYTES);
    if (status == FN_OK) status = fn_tensor_map(b, &weights, b_box, FN_ATOM_BYTES);
    if (status == FN_OK && out) status = fn_tensor_map(out, &result, out_box, out_bytes);
    fn_cuda_leave(plan->device_id, previous);
    return status;
}

static int find_chain(const fn_mm_plan *plan, const fn_cuda_properties *device) {
    static kept_answers kept;
    enum { N_BITS = 24 };
    _Static_assert(FN_MM_DECODE_KERNELS + FN_MM_PREFILL_KERNELS <= 1 << KERNEL_BITS, "");
    const question q = ask(&kept, plan, N_BITS);
    const int known = answer_to(q);
    if (known >= 0) return known;
    const int found = fn_mm_choose_chain(table_of(plan), plan, device->multiprocessors);
    keep(q, found);
    return found;
}

static fn_status run_decode(const fn_mm_plan *plan, const fn_mm_decode_kernel *kernel, fn_cuda_devices *allowed,
                            const fn_cuda_properties *device) {
    const int rows = fn_mm_decode_rows(kernel, plan, device->multiprocessors);
    const int stage = FN_DECODE_BLOCKS * FN_ATOM_BYTES * (rows + kernel->tokens);
    const int barriers = 2 * (int)sizeof(uint64_t), tokens = fn_mm_box(kernel->tokens, plan->m);
    const int fit = (device->shared_bytes - FN_SHARED_ALIGNMENT - FN_DECODE_SLACK) / (stage + barriers);
    fn_mm_decode_args args = {.to = result_of(plan),
                              .k_stages = (uint32_t)fn_divide_up(plan->k, FN_DECODE_BLOCKS * FN_MM_TILE_K),
                              .stages = (uint32_t)(fit < FN_DECODE_MOST_STAGES ? fit : FN_DECODE_MOST_STAGES),
                              .rows = (uint32_t)rows,
                              .stage_bytes = (uint32_t)(FN_DECODE_BLOCKS * FN_ATOM_BYTES * (rows + tokens)),
                              .units_m = (uint32_t)fn_divide_up(plan->m, kernel->tokens * kernel->cluster),
                              .early = plan->weights_are_constant};
    args.units = (uint32_t)fn_divide_up(plan->n, rows) * args.units_m;
    FN_TRY(make_maps(plan, &args.a, tokens, &args.b, rows / kernel->cluster, NULL, 0, 0));
    FN_TRY(fn_cuda_allow_shared(allowed, plan->device_id, kernel->function, device->shared_bytes));
    return launch_units(plan, kernel->function, &args, args.units, kernel->cluster, FN_DECODE_THREADS,
                        device->shared_bytes, device);
}

static fn_status run_prefill(const fn_mm_plan *plan, const fn_mm_prefill_kernel *kernel, fn_cuda_devices *allowed,
                             const fn_cuda_properties *device) {
    fn_mm_prefill_args args = {.to = result_of(plan),
                               .k_blocks = (uint32_t)fn_divide_up(plan->k, FN_MM_TILE_K),
                               .units_n = (uint32_t)fn_divide_up(plan->n, kernel->unit_n),
                               .units_m = (uint32_t)fn_divide_up(plan->m, kernel->unit_m),
                               .group = (uint32_t)fn_divide_up(GROUP_ROWS, kernel->unit_m),
                               .early = plan->weights_are_constant};
    args.units = args.units_m * args.units_n;
    FN_TRY(make_maps(plan, &args.a, kernel->a_box, &args.b, kernel->b_box, args.to.by_engine ? &args.out : NULL,
                     FN_STAGING_ROWS, FN_ATOM_BYTES));
    FN_TRY(fn_cuda_allow_shared(allowed, plan->device_id, kernel->function, device->shared_bytes));
    return launch_units(plan, kernel->function, &args, args.units, kernel->cluster, FN_PREFILL_THREADS,
                        kernel->shared_bytes, device);
}

/* ---- K in parts ---------------------------------------------------------------------------------------------------------- */

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

/* How many clusters the device holds at once; without clusters, blocks. */
static fn_status clusters_at_once(const fn_mm_plan *plan, const fn_mm_split_kernel *kernel, fn_cuda_counts *asked,
                                  const fn_cuda_properties *device, int *clusters) {
    *clusters = device->multiprocessors * kernel->resident;
    if (kernel->cluster == 1) return FN_OK;
    const fn_cuda_launch launch = split_launch(plan, kernel, NULL, 1);
    return fn_cuda_clusters_at_once(asked, &launch, clusters);
}

static fn_status find_split(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_cuda_properties *device,
                            const fn_mm_split_kernel **found) {
    static fn_cuda_counts asked[2][FN_MM_SPLIT_KERNELS];
    static kept_answers kept;
    enum { N_BITS = 10 };
    _Static_assert(FN_MM_GATE_COLUMNS < 1 << N_BITS && FN_MM_SPLIT_KERNELS <= 1 << KERNEL_BITS, "");
    const fn_mm_hopper_kernels *table = table_of(plan);
    int forced, clusters;
    FN_TRY(get_forced_split(&forced));
    if (forced >= 0) {
        *found = &table->split[forced];
        return clusters_at_once(plan, *found, &asked[table == &fn_mm_hopper_f16][forced], device, &clusters);
    }
    const question q = ask(&kept, plan, N_BITS);
    const int known = answer_to(q);
    if (known >= 0) {
        *found = &table->split[known];
        return FN_OK;
    }
    double least = INFINITY;
    *found = NULL;
    for (int i = 0; i < FN_MM_SPLIT_KERNELS; i++) {
        const fn_mm_split_kernel *kernel = &table->split[i];
        FN_TRY(clusters_at_once(plan, kernel, &asked[table == &fn_mm_hopper_f16][i], device, &clusters));
        if (clusters < 1) continue;
        const double time = fn_mm_split_time(kernel, plan, cut, (uint32_t)clusters);
        if (time < least) least = time, *found = kernel;
    }
    FN_REQUIRE(*found, FN_ERROR_RUNTIME, "%s: the device can hold none", name);
    keep(q, (int)(*found - table->split));
    return FN_OK;
}

static fn_status run_split(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_mm_split_kernel *kernel,
                           fn_cuda_devices *allowed, const fn_cuda_properties *device) {
    const int tokens = fn_mm_box(kernel->tokens, plan->m), weights = fn_mm_box(kernel->weights, plan->n);
    fn_mm_split_args args = {.to = result_of(plan),
                             .k_blocks = (uint32_t)fn_divide_up(plan->k, FN_MM_TILE_K),
                             .part_blocks = (uint32_t)cut->part_tiles,
                             .tiles_m = (uint32_t)fn_divide_up(plan->m, kernel->tokens),
                             .tiles_n = (uint32_t)fn_divide_up(plan->n, kernel->weights),
                             .stage_bytes = (uint32_t)(FN_ATOM_BYTES * (tokens + weights)),
                             .early = plan->weights_are_constant};
    args.to.by_engine = args.to.by_engine && kernel->out_tokens;
    FN_TRY(make_maps(plan, &args.a, tokens, &args.b, weights, args.to.by_engine ? &args.out : NULL, kernel->out_tokens,
                     kernel->out_weights * fn_dtypes[plan->out.dtype].bytes));
    FN_TRY(fn_cuda_allow_shared(allowed, plan->device_id, kernel->function, device->shared_bytes));
    fn_cuda_launch launch = split_launch(plan, kernel, &args, (int64_t)args.tiles_m * args.tiles_n);
    /* Blocks of a cluster are neighbours on the device: what two of them read is fetched once. */
    if (kernel->cluster == 1 && launch.blocks % 2 == 0) launch.cluster = 2;
    return fn_cuda_run(name, &launch);
}

/* ---- all ----------------------------------------------------------------------------------------------------------------- */

fn_status fn_mm_run_hopper(const fn_mm_plan *plan, const fn_mm_cut *cut, const fn_cuda_properties *device) {
    enum {
        PREFILL = FN_MM_DECODE_KERNELS,
        SPLIT = PREFILL + FN_MM_PREFILL_KERNELS,
        KERNELS = SPLIT + FN_MM_SPLIT_KERNELS
    };
    static fn_cuda_devices allowed[2][KERNELS];
    const fn_mm_hopper_kernels *table = table_of(plan);
    fn_cuda_devices *const own = allowed[table == &fn_mm_hopper_f16];
    if (cut->parts > 1) {
        const fn_mm_split_kernel *split;
        FN_TRY(find_split(plan, cut, device, &split));
        return run_split(plan, cut, split, &own[SPLIT + (split - table->split)], device);
    }
    const int chain = find_chain(plan, device);
    if (chain < PREFILL) return run_decode(plan, &table->decode[chain], &own[chain], device);
    return run_prefill(plan, &table->prefill[chain - PREFILL], &own[chain], device);
}

fn_status fn_mm_hopper_warmup(void) {
    const fn_mm_hopper_kernels *const tables[] = {&fn_mm_hopper_bf16, &fn_mm_hopper_f16};
    for (int t = 0; t < 2; t++) {
        for (int i = 0; i < FN_MM_DECODE_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->decode[i].function));
        for (int i = 0; i < FN_MM_PREFILL_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->prefill[i].function));
        for (int i = 0; i < FN_MM_SPLIT_KERNELS; i++) FN_TRY(fn_cuda_load(tables[t]->split[i].function));
    }
    return FN_OK;
}

#else

fn_status fn_cuda_force_product(const char *name) {
    FN_REQUIRE(!name, FN_ERROR_RUNTIME, "the forced product kernel is \"%.40s\": built without compute capability 9.0",
               name);
    return FN_OK;
}

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
