#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>

static atomic_int chosen; /* 0: OpenMP's own default */
static atomic_bool forked;

/* The child of a fork has none of the parent's pool threads, and an OpenMP runtime that once had a pool waits for them
 * for ever. Another library may have started that pool, so every forked child stays on its own thread. */
static void in_child(void) { atomic_store(&forked, true); }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

int fn_get_num_threads(void) {
    const int threads = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (threads > 0) return threads;
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

fn_status fn_set_num_threads(int threads) {
    FN_REQUIRE(threads >= 1, FN_ERROR_VALUE, "set_num_threads: n is %d: n must be at least 1", threads);
    atomic_store(&chosen, threads);
    return FN_OK;
}

int fn_threads_to_use(void) { return atomic_load_explicit(&forked, memory_order_relaxed) ? 1 : fn_get_num_threads(); }

const char *fn_cpu_threading(void) {
#if defined(_OPENMP)
    return "openmp";
#else
    return "none";
#endif
}
