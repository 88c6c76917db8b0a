/* dispatch.c: from an operation and a device to the code that runs it, and from a name to a CPU path.
 *
 * A new operation is a row of `runners` and an entry point below; a new CPU path is a row of `paths` and one in the
 * operation's table of kernels under cpu/; a new device is a column of `runners`.
 */
#include "cpu/cpu.h"
#include "cpu/features.h"
#include "fp_environment.h"
#include "mm_check.h"
#include "norm_check.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#define FN_DTYPE_ROW(symbol, text, size, code, epsilon) [symbol] = {text, size, code, epsilon},
const fn_dtype_info fn_dtypes[FN_DTYPE_COUNT] = {FN_FOR_EACH_DTYPE(FN_DTYPE_ROW)};
#undef FN_DTYPE_ROW

/* ---- CPU paths ------------------------------------------------------------------------------------------------------ */

static const char *const path_names[] = {
    [FN_PATH_SCALAR] = "scalar",           [FN_PATH_AVX2] = "avx2", [FN_PATH_AVX512] = "avx512",
    [FN_PATH_AVX512_BF16] = "avx512_bf16", [FN_PATH_NEON] = "neon",
};
_Static_assert(sizeof path_names / sizeof path_names[0] == FN_PATH_COUNT, "every path has a name");

/* Best first. */
static const fn_path preference[] = {FN_PATH_AVX512_BF16, FN_PATH_AVX512, FN_PATH_AVX2, FN_PATH_NEON, FN_PATH_SCALAR};
_Static_assert(sizeof preference / sizeof preference[0] == FN_PATH_COUNT, "every path has a rank");

const char *fn_path_name(fn_path path) { return path_names[path]; }
bool fn_path_is_built(fn_path path) { return fn_norm_paths[path] != NULL; }
bool fn_path_is_available(fn_path path) { return fn_path_is_built(path) && fn_cpu_supports(path); }

/* -1 until the first operation asks. Threads that race for it find the same answer. */
static atomic_int current_path = -1;

static fn_status path_from_name(const char *source, const char *name, fn_path *path) {
    char available[64] = "";
    for (int candidate = 0; candidate < FN_PATH_COUNT; candidate++) {
        if (!fn_path_is_available((fn_path)candidate)) continue;
        if (strcmp(name, path_names[candidate]) == 0) {
            *path = (fn_path)candidate;
            return FN_OK;
        }
        const size_t used = strlen(available);
        snprintf(available + used, sizeof available - used, "%s%s", used ? ", " : "", path_names[candidate]);
    }
    return fn_fail(FN_ERROR_RUNTIME, "%s is \"%.40s\", which this machine cannot run: available are %s", source, name,
                   available);
}

fn_status fn_cpu_force_path(const char *name) {
    fn_path path = FN_PATH_SCALAR;
    if (name) FN_TRY(path_from_name("the forced path", name, &path));
    atomic_store(&current_path, name ? (int)path : -1);
    return FN_OK;
}

fn_status fn_cpu_path(fn_path *path) {
    const int known = atomic_load_explicit(&current_path, memory_order_relaxed);
    if (known >= 0) {
        *path = (fn_path)known;
        return FN_OK;
    }
    const char *wanted = getenv("FUSEDNORM_CPU");
    if (wanted && *wanted) FN_TRY(path_from_name("FUSEDNORM_CPU", wanted, path));
    else
        for (int rank = FN_PATH_COUNT - 1; rank >= 0; rank--)
            if (fn_path_is_available(preference[rank])) *path = preference[rank];
    atomic_store(&current_path, (int)*path);
    return FN_OK;
}

/* ---- operations ----------------------------------------------------------------------------------------------------- */

typedef enum { FN_OPERATION_NORM, FN_OPERATION_MM, FN_OPERATION_COUNT } fn_operation;
typedef fn_status (*fn_runner)(const void *plan);

static fn_status norm_on_cpu(const void *plan) { return fn_norm_run_cpu(plan); }
static fn_status norm_on_cuda(const void *plan) { return fn_norm_run_cuda(plan); }
static fn_status mm_on_cpu(const void *plan) { return fn_mm_run_cpu(plan); }
static fn_status mm_on_cuda(const void *plan) { return fn_mm_run_cuda(plan); }

/* By DLPack's device numbers. */
static const fn_runner runners[][FN_CUDA + 1] = {
    [FN_OPERATION_NORM] = {[FN_CPU] = norm_on_cpu, [FN_CUDA] = norm_on_cuda},
    [FN_OPERATION_MM] = {[FN_CPU] = mm_on_cpu, [FN_CUDA] = mm_on_cuda},
};
_Static_assert(sizeof runners / sizeof runners[0] == FN_OPERATION_COUNT, "every operation has a row");

fn_status fn_norm(const fn_norm_args *args) {
    fn_norm_plan plan;
    const fn_fp_environment saved = fn_fp_enter();
    fn_status status = fn_norm_check(args, &plan);
    if (status == FN_OK && plan.rows > 0) status = runners[FN_OPERATION_NORM][args->x->device_type](&plan);
    fn_fp_leave(saved);
    return status;
}

fn_status fn_mm(const fn_mm_args *args) {
    fn_mm_plan plan;
    const fn_fp_environment saved = fn_fp_enter();
    fn_status status = fn_mm_check(args, &plan);
    if (status == FN_OK && plan.m > 0 && plan.n > 0) status = runners[FN_OPERATION_MM][args->a->device_type](&plan);
    fn_fp_leave(saved);
    return status;
}
