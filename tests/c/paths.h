/* paths.h: what norm_paths.c and mm_paths.c share: the CPU paths of this machine, the counts of what was compared, and
 * calls in other floating-point environments.
 */
#ifndef PATHS_H
#define PATHS_H

#include "check.h"
#include "fp_modes.h"
#include "fusednorm.h"

static const char *program;
static fn_path paths[FN_PATH_COUNT];
static int path_count;
static int64_t elements; /* results compared, of all paths */
static int64_t calls;
static uint64_t seed;

static void require_ok(fn_status status) {
    if (status != FN_OK) CHECK_FAIL("status %d: %s", (int)status, fn_error_text());
}

static void find_paths(const char *program_name, uint64_t program_seed) {
    program = program_name;
    seed = program_seed;
    printf("%s: paths", program);
    for (int path = 0; path < FN_PATH_COUNT; path++) {
        if (!fn_path_is_available((fn_path)path)) continue;
        paths[path_count++] = (fn_path)path;
        printf(" %s", fn_path_name((fn_path)path));
    }
    printf(", threading %s, seed %llu\n", fn_cpu_threading(), (unsigned long long)seed);
}

/* What has come since the last report. */
static void report(const char *what, double start) {
    static int64_t reported_elements, reported_calls;
    printf("%s: %s: %lld calls, %lld elements, %.1f s\n", program, what, (long long)(calls - reported_calls),
           (long long)(elements - reported_elements), check_seconds() - start);
    fflush(stdout);
    reported_elements = elements;
    reported_calls = calls;
}

static void report_all(double start) {
    printf("%s: %lld calls, %lld elements on each path: all as the contract says, %.1f s\n", program, (long long)calls,
           (long long)(elements / path_count), check_seconds() - start);
}

/* ---- other floating-point environments --------------------------------------------------------------------------- */

/* The caller, and the threads that an OpenMP runtime keeps for it and gives to every library that asks. */
#if defined(_OPENMP)
enum { POOL_THREADS = 4 };
#else
enum { POOL_THREADS = 1 };
#endif

static const int rounding_modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
static uint64_t entered[POOL_THREADS]; /* control words */

static void enter_environment(int rounding_mode, bool flush_to_zero) {
    OPENMP(omp parallel for schedule(static) num_threads(POOL_THREADS))
    for (int thread = 0; thread < POOL_THREADS; thread++) {
        set_environment(rounding_mode, flush_to_zero);
        entered[thread] = control_word();
    }
}

/* Back to the usual one, which checks need; the call on `path` between the two must have left every control word. */
static void leave_environment(const char *path) {
    uint64_t left[POOL_THREADS] = {0};
    OPENMP(omp parallel for schedule(static) num_threads(POOL_THREADS))
    for (int thread = 0; thread < POOL_THREADS; thread++) {
        left[thread] = control_word();
        set_environment(FE_TONEAREST, false);
    }
    for (int thread = 0; thread < POOL_THREADS; thread++)
        if (entered[thread] != left[thread])
            CHECK_FAIL("%s: the control word of thread %d was %#llx before and is %#llx after the call", path, thread,
                       (unsigned long long)entered[thread], (unsigned long long)left[thread]);
}

#endif
