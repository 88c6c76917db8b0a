/* threads.h: how many threads a call may use, and the few words of OpenMP that run it on them (or on one, without). */
#ifndef FUSEDNORM_THREADS_H
#define FUSEDNORM_THREADS_H

#include "../fusednorm.h"

/* At most so many for this call; 1 in a forked child. */
int fn_threads_to_use(void);

#if defined(_OPENMP)
#include <omp.h>
#define FN_PRAGMA(text) _Pragma(#text)
#define FN_PARALLEL(threads) FN_PRAGMA(omp parallel num_threads(threads) if (threads > 1))
#define FN_BARRIER FN_PRAGMA(omp barrier)
static inline int fn_thread_number(void) { return omp_get_thread_num(); }
static inline int fn_team_size(void) { return omp_get_num_threads(); }
#else
#define FN_PARALLEL(threads) (void)(threads);
#define FN_BARRIER
static inline int fn_thread_number(void) { return 0; }
static inline int fn_team_size(void) { return 1; }
#endif

#endif
