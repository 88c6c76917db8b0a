/* rms_norm.c: runs a norm's plan on the CPU: which path, how many threads, who does what. None of it moves a bit.
 *
 * Many rows: each thread takes a run of rows. Few long rows: the threads share each row, which the three steps of a
 * fn_norm_kernels allow: group sums side by side, one fold, then the rest side by side.
 */
#include "cpu.h"
#include "features.h"
#include "threads.h"

#include <stdlib.h>

/* Below this many elements a thread is not worth waking: about 5 us of work. */
#define ELEMENTS_PER_THREAD ((int64_t)1 << 15)
/* A row is shared out when there are too few rows to balance and each thread's part is at least this long. */
#define COLUMNS_PER_THREAD ((int64_t)1 << 14)
/* Group sums on the stack: 16 KiB, rows of up to 32768 columns. */
#define STACK_SUMS 4096

static int64_t sums_needed(int64_t columns) {
    return (columns + FN_COLUMN_QUANTUM - 1) / FN_COLUMN_QUANTUM * (FN_COLUMN_QUANTUM / 8);
}

/* Beyond a core's own cache, rows are asked for ahead of their turn. Outputs that will not be in the last-level cache
 * anyway are written past it, which saves reading their lines first. */
#define PREFETCH_BYTES ((int64_t)1 << 20)

static int choose_hints(const fn_norm_plan *plan) {
    int64_t row_bytes = 0;
    for (int operand = 0; operand < FN_ROW_OPERANDS; operand++)
        if (plan->operand[operand].data) row_bytes += plan->columns * fn_dtypes[plan->operand[operand].dtype].bytes;
    static int64_t cache_bytes; /* racing threads write the same number */
    int64_t known = __atomic_load_n(&cache_bytes, __ATOMIC_RELAXED);
    if (!known) {
        known = fn_last_level_cache_bytes();
        __atomic_store_n(&cache_bytes, known, __ATOMIC_RELAXED);
    }
    return (plan->rows > known / row_bytes ? FN_STREAM : 0) |
           (plan->rows > PREFETCH_BYTES / row_bytes ? FN_PREFETCH : 0);
}

static void finish_streaming(int hints) {
#if defined(FN_X86)
    if (hints & FN_STREAM) _mm_sfence();
#else
    (void)hints;
#endif
}

static fn_status run_rows(const fn_norm_kernels *kernels, const fn_norm_plan *plan, int threads, int hints) {
    const int64_t needed = sums_needed(plan->columns);
    float *heap = NULL;
    if (needed > STACK_SUMS) {
        heap = malloc((size_t)needed * (size_t)threads * sizeof(float));
        FN_REQUIRE(heap, FN_ERROR_MEMORY, "no memory for the group sums of rows of %lld elements",
                   (long long)plan->columns);
    }
    FN_PARALLEL(threads) {
        const int thread = fn_thread_number(), team = fn_team_size();
        const fn_fp_environment saved = fn_fp_enter();
        float stack[STACK_SUMS];
        kernels->rows(plan, plan->rows * thread / team, plan->rows * (thread + 1) / team, hints,
                      heap ? heap + needed * thread : stack);
        finish_streaming(hints);
        fn_fp_leave(saved);
    }
    free(heap);
    return FN_OK;
}

static fn_status run_shared_rows(const fn_norm_kernels *kernels, const fn_norm_plan *plan, int threads, int hints) {
    float *sums = malloc((size_t)sums_needed(plan->columns) * sizeof(float));
    FN_REQUIRE(sums, FN_ERROR_MEMORY, "no memory for the group sums of rows of %lld elements",
               (long long)plan->columns);
    const int64_t quanta = (plan->columns + FN_COLUMN_QUANTUM - 1) / FN_COLUMN_QUANTUM;
    float r = 0;
    FN_PARALLEL(threads) {
        const int64_t thread = fn_thread_number(), team = fn_team_size();
        const int64_t begin = quanta * thread / team * FN_COLUMN_QUANTUM;
        const int64_t part_end = quanta * (thread + 1) / team * FN_COLUMN_QUANTUM;
        const int64_t end = part_end < plan->columns ? part_end : plan->columns;
        const fn_fp_environment saved = fn_fp_enter();
        fn_walk walk;
        fn_walk_to(plan, 0, &walk);
        for (int64_t number = 0; number < plan->rows; number++, fn_walk_on(plan, &walk)) {
            kernels->sum_groups(plan, &walk.row, begin, end, sums);
            FN_BARRIER
            if (thread == 0) r = fn_norm_scale(kernels->fold(sums, plan->columns), plan);
            FN_BARRIER
            kernels->finish(plan, &walk.row, begin, end, r, hints);
        }
        finish_streaming(hints);
        fn_fp_leave(saved);
    }
    free(sums);
    return FN_OK;
}

fn_status fn_norm_run_cpu(const fn_norm_plan *plan) {
    fn_path path;
    FN_TRY(fn_cpu_path(&path));
    const fn_norm_kernels *kernels = fn_norm_paths[path];
    const int64_t elements = plan->rows * plan->columns;
    if (elements < 2 * ELEMENTS_PER_THREAD && sums_needed(plan->columns) <= STACK_SUMS) {
        float sums[STACK_SUMS];
        kernels->rows(plan, 0, plan->rows, 0, sums);
        return FN_OK;
    }
    const int hints = choose_hints(plan);
    int64_t threads = fn_threads_to_use();
    if (threads > elements / ELEMENTS_PER_THREAD) threads = elements / ELEMENTS_PER_THREAD;
    if (threads < 1) threads = 1;
    if (threads > 1 && plan->rows < 8 * threads && plan->columns / threads >= COLUMNS_PER_THREAD)
        return run_shared_rows(kernels, plan, (int)threads, hints);
    if (threads > plan->rows) threads = plan->rows;
    return run_rows(kernels, plan, (int)threads, hints);
}

const fn_norm_kernels *const fn_norm_paths[FN_PATH_COUNT] = {
    [FN_PATH_SCALAR] = &fn_norm_scalar,
#if defined(FN_X86)
    [FN_PATH_AVX2] = &fn_norm_avx2,
    [FN_PATH_AVX512] = &fn_norm_avx512,
#if defined(FN_AVX512_BF16)
    [FN_PATH_AVX512_BF16] = &fn_norm_avx512, /* whose conversion to bfloat16 would lose subnormals */
#endif
#elif defined(FN_ARM64)
    [FN_PATH_NEON] = &fn_norm_neon,
#endif
};
