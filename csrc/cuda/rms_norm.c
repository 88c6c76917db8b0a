/* rms_norm.c: a plan becomes one launch (or a few): which kernel, on how many blocks, with which arguments. */
#include "cuda.h"
#include "launch.h"
#include "schedule.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST_OUTER_BLOCKS = 65535,
    MOST_ROWS_IN_A_LAUNCH = 1 << 27
}; /* gridDim.y; a cluster of 8 a row fits gridDim.x */

/* ---- which kernel --------------------------------------------------------------------------------------------------- */

static const fn_norm_kernels *const tables[] = {&fn_norm_kernels_f32, &fn_norm_kernels_f16, &fn_norm_kernels_bf16,
                                                &fn_norm_kernels_bf16_f32, &fn_norm_kernels_any};

static bool has_dtypes(const fn_norm_plan *plan, fn_dtype dtype, fn_dtype weight) {
    for (int i = 0; i < FN_ROW_OPERANDS; i++)
        if (plan->operand[i].data && plan->operand[i].dtype != dtype) return false;
    return !plan->operand[FN_WEIGHT].data || plan->operand[FN_WEIGHT].dtype == weight;
}

static const fn_norm_kernels *table_for(const fn_norm_plan *plan) {
    const fn_dtype dtype = plan->operand[FN_X].dtype;
    if (dtype == FN_BFLOAT16 && has_dtypes(plan, dtype, FN_BFLOAT16)) return &fn_norm_kernels_bf16;
    if (dtype == FN_BFLOAT16 && has_dtypes(plan, dtype, FN_FLOAT32)) return &fn_norm_kernels_bf16_f32;
    if (dtype == FN_FLOAT16 && has_dtypes(plan, dtype, FN_FLOAT16)) return &fn_norm_kernels_f16;
    if (dtype == FN_FLOAT32 && has_dtypes(plan, dtype, FN_FLOAT32)) return &fn_norm_kernels_f32;
    return &fn_norm_kernels_any;
}

static bool holds(const fn_norm_kernel *kernel, int64_t groups, bool fused, bool clusters) {
    return kernel->fused == fused && (int64_t)kernel->threads * kernel->blocks * kernel->groups >= groups &&
           ((kernel->blocks == 1 && !kernel->early) || clusters);
}

/* Of those with the schedule's threads and blocks the one with the fewest groups a thread; NULL if none holds the row. */
static const fn_norm_kernel *find_kernel(const fn_norm_kernels *table, const fn_norm_schedule *schedule, int64_t groups,
                                         bool fused, bool early, bool clusters) {
    const fn_norm_kernel *best = NULL;
    for (int i = 0; i < table->count; i++) {
        const fn_norm_kernel *kernel = &table->kernels[i];
        if (kernel->threads != schedule->threads || kernel->blocks != schedule->blocks ||
            kernel->rows != schedule->rows || !holds(kernel, groups, fused, clusters) || (kernel->early && !early))
            continue;
        if (!best || kernel->groups < best->groups || (kernel->groups == best->groups && kernel->early)) best = kernel;
    }
    return best;
}

/* For a schedule that the table lacks: as many blocks a row if there is such a kernel, else one, else any number. */
static const fn_norm_kernel *first_that_holds(const fn_norm_kernels *table, int blocks, int64_t groups, bool fused,
                                              bool clusters) {
    const fn_norm_kernel *single = NULL, *any = NULL;
    for (int i = 0; i < table->count; i++) {
        const fn_norm_kernel *kernel = &table->kernels[i];
        if (kernel->early || !holds(kernel, groups, fused, clusters)) continue;
        if (kernel->blocks == blocks) return kernel;
        if (kernel->blocks == 1 && !single) single = kernel;
        if (!any) any = kernel;
    }
    return single ? single : any;
}

/* -1: none; FUSEDNORM_CUDA_SCHEDULE or fn_cuda_force_schedule names it. -2: the environment was not read yet. */
static atomic_int forced_schedule = -2;

static fn_status schedule_from_name(const char *source, const char *name, int *found) {
    for (int i = 0; i < FN_FORCED_SCHEDULES; i++)
        if (strcmp(name, fn_forced_schedules[i].name) == 0) {
            *found = i;
            return FN_OK;
        }
    return fn_fail(FN_ERROR_RUNTIME,
                   "%s is \"%.40s\": must be packed, block64, block128, block256, block512, cluster2, cluster4, "
                   "cluster8 or strided",
                   source, name);
}

static fn_status get_forced_schedule(const fn_forced_schedule **schedule) {
    int forced = atomic_load_explicit(&forced_schedule, memory_order_relaxed);
    if (forced == -2) {
        const char *name = getenv("FUSEDNORM_CUDA_SCHEDULE");
        forced = -1;
        if (name && *name) FN_TRY(schedule_from_name("FUSEDNORM_CUDA_SCHEDULE", name, &forced));
        atomic_store(&forced_schedule, forced);
    }
    *schedule = forced < 0 ? NULL : &fn_forced_schedules[forced];
    return FN_OK;
}

fn_status fn_cuda_force_schedule(const char *name) {
    int found = -2;
    if (name) FN_TRY(schedule_from_name("the forced schedule", name, &found));
    atomic_store(&forced_schedule, found);
    return FN_OK;
}

static const fn_norm_kernel *find_forced(const fn_norm_kernels *table, const fn_forced_schedule *forced, int64_t groups,
                                         bool fused, bool early, bool clusters) {
    const fn_norm_kernel *best = NULL;
    for (int i = 0; i < table->count; i++) {
        const fn_norm_kernel *kernel = &table->kernels[i];
        if (kernel->threads < forced->least_threads || kernel->threads > forced->most_threads ||
            kernel->blocks != forced->blocks || !holds(kernel, groups, fused, clusters) || (kernel->early && !early))
            continue;
        if (!best || kernel->threads * kernel->groups < best->threads * best->groups || kernel->early) best = kernel;
    }
    return best;
}

/* ---- whole groups ---------------------------------------------------------------------------------------------------- */

static bool is_aligned(uint64_t address_or_stride) { return address_or_stride % 16 == 0; }

/* Groups of 8 neighbours at 16-byte alignment, in every row. */
static bool has_whole_groups(const fn_norm_plan *plan, int operand) {
    const fn_operand *o = &plan->operand[operand];
    if (o->column_stride != fn_dtypes[o->dtype].bytes || plan->columns % 8 || !is_aligned((uint64_t)(uintptr_t)o->data))
        return false;
    for (int d = 0; operand < FN_ROW_OPERANDS && d < plan->leading_ndim; d++)
        if (!is_aligned((uint64_t)plan->leading_stride[operand][d])) return false;
    return true;
}

static float or_minus_zero(float weight_offset) { return weight_offset == 0 ? -0.0f : weight_offset; }

/* ---- launches ----------------------------------------------------------------------------------------------------------- */

static const char norm_kernel[] = "CUDA norm kernel";

static fn_status run_strided(const fn_norm_plan *plan, uint32_t whole_groups) {
    fn_norm_strided_args args = {
        .plan = *plan, .weight_offset = or_minus_zero(plan->weight_offset), .whole_groups = whole_groups};
    const fn_cuda_launch launch = {.kernel = fn_norm_strided_kernel,
                                   .args = &args,
                                   .blocks = (unsigned)(plan->rows < INT32_MAX ? plan->rows : INT32_MAX),
                                   .outer_blocks = 1,
                                   .threads = FN_STRIDED_THREADS,
                                   .cluster = 1,
                                   .device = plan->device_id,
                                   .stream = plan->stream};
    return fn_cuda_run(norm_kernel, &launch);
}

static fn_norm_kernel_args common_args(const fn_norm_plan *plan, int64_t groups) {
    fn_norm_kernel_args args;
    args.groups = (int32_t)groups;
    args.columns = (float)plan->columns;
    args.inverse_columns = plan->columns & (plan->columns - 1) ? 0 : 1 / args.columns;
    args.eps = plan->eps;
    args.weight_offset = or_minus_zero(plan->weight_offset);
    args.flags = 0;
    if (plan->operand[FN_WEIGHT].data) args.flags |= FN_NORM_WEIGHT;
    if (plan->cast_x_before_out_mul && plan->operand[FN_X].dtype != FN_FLOAT32) args.flags |= FN_NORM_CAST;
    if (plan->operand[FN_POST].data) args.flags |= FN_NORM_POST;
    if (plan->round_sum == FN_SUM_ROUNDED) args.flags |= FN_NORM_ROUND;
    if (plan->round_sum == FN_SUM_ROUNDED_AFTER_VARIANCE) args.flags |= FN_NORM_ROUND_AFTER;
    for (int i = 0; i < FN_OPERANDS; i++) {
        args.data[i] = plan->operand[i].data;
        args.dtype[i] = plan->operand[i].dtype;
    }
    return args;
}

/* Rows (outer, i): `outer` the first leading dimension where there are two, or the other way round if that needs fewer. */
static fn_status run_kernel(const fn_norm_plan *plan, const fn_norm_kernel *kernel, fn_norm_kernel_args *args) {
    const int inner = plan->leading_ndim - 1, outer = plan->leading_ndim == 2 ? 0 : -1;
    const bool swapped = outer >= 0 && plan->leading_shape[outer] > MOST_OUTER_BLOCKS &&
                         plan->leading_shape[inner] < plan->leading_shape[outer];
    const int along_x = swapped ? outer : inner, along_y = swapped ? inner : outer;
    const int64_t inner_rows = along_x >= 0 ? plan->leading_shape[along_x] : 1;
    const int64_t outer_rows = along_y >= 0 ? plan->leading_shape[along_y] : 1;
    for (int i = 0; i < FN_ROW_OPERANDS; i++) {
        args->stride[i] = along_x >= 0 ? plan->leading_stride[i][along_x] : 0;
        args->outer_stride[i] = along_y >= 0 ? plan->leading_stride[i][along_y] : 0;
    }
    const int rows_in_block = (kernel->threads <= FN_WARP ? FN_PACKED_BLOCK / kernel->threads : 1) * kernel->rows;
    fn_cuda_launch launch = {.kernel = kernel->function,
                             .args = args,
                             .threads = (unsigned)(kernel->threads <= FN_WARP ? FN_PACKED_BLOCK : kernel->threads),
                             .cluster = kernel->blocks,
                             .device = plan->device_id,
                             .stream = plan->stream};
    for (int64_t y = 0; y < outer_rows; y += MOST_OUTER_BLOCKS)
        for (int64_t x = 0; x < inner_rows; x += MOST_ROWS_IN_A_LAUNCH) {
            const int64_t xs = inner_rows - x < MOST_ROWS_IN_A_LAUNCH ? inner_rows - x : MOST_ROWS_IN_A_LAUNCH;
            const int64_t ys = outer_rows - y < MOST_OUTER_BLOCKS ? outer_rows - y : MOST_OUTER_BLOCKS;
            for (int i = 0; (x || y) && i < FN_ROW_OPERANDS; i++)
                if (plan->operand[i].data)
                    args->data[i] = plan->operand[i].data + x * args->stride[i] + y * args->outer_stride[i];
            args->rows = (uint32_t)xs;
            launch.blocks = (unsigned)((xs + rows_in_block - 1) / rows_in_block * kernel->blocks);
            launch.outer_blocks = (unsigned)ys;
            FN_TRY(fn_cuda_run(norm_kernel, &launch));
        }
    return FN_OK;
}

fn_status fn_norm_run_cuda(const fn_norm_plan *plan) {
    uint32_t whole_groups = 0, all = 0;
    for (int i = 0; i < FN_OPERANDS; i++) {
        if (!plan->operand[i].data) continue;
        all |= 1u << i;
        if (has_whole_groups(plan, i)) whole_groups |= 1u << i;
    }
    fn_cuda_properties device;
    FN_TRY(fn_cuda_properties_of(plan->device_id, &device));
    const fn_forced_schedule *forced;
    FN_TRY(get_forced_schedule(&forced));
    if (whole_groups != all || plan->leading_ndim > 2 || (forced && forced->most_threads == 0))
        return run_strided(plan, whole_groups);

    const int64_t groups = plan->columns / 8;
    const bool fused = plan->operand[FN_RESIDUAL].data != NULL;
    const fn_norm_kernels *table = table_for(plan);
    const fn_norm_schedule schedule =
        fn_norm_choose_schedule(plan->rows, groups, fused, device.multiprocessors, device.clusters);
    const fn_norm_kernel *kernel = NULL;
    if (forced) kernel = find_forced(table, forced, groups, fused, plan->weights_are_constant, device.clusters);
    if (!kernel) kernel = find_kernel(table, &schedule, groups, fused, plan->weights_are_constant, device.clusters);
    if (!kernel) kernel = first_that_holds(table, schedule.blocks, groups, fused, device.clusters);
    if (!kernel) return run_strided(plan, whole_groups);
    fn_norm_kernel_args args = common_args(plan, groups);
    if (schedule.weight_prefetch && plan->operand[FN_WEIGHT].data) args.flags |= FN_NORM_WEIGHT_PREFETCH;
    if (schedule.dependents_soon) args.flags |= FN_NORM_DEPENDENTS_SOON;
    return run_kernel(plan, kernel, &args);
}

fn_status fn_norm_warmup(void) {
    for (size_t t = 0; t < sizeof tables / sizeof tables[0]; t++)
        for (int i = 0; i < tables[t]->count; i++) FN_TRY(fn_cuda_load(tables[t]->kernels[i].function));
    return fn_cuda_load(fn_norm_strided_kernel);
}
