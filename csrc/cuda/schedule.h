/* schedule.h: how a norm is laid over a device. It moves speed alone: every schedule gives the same bits. */
#ifndef FUSEDNORM_SCHEDULE_H
#define FUSEDNORM_SCHEDULE_H

#include "../norm_plan.h"

typedef struct {
    int threads;          /* a row, a power of two; up to 32, several rows share a block. 0: the strided kernel */
    int blocks;           /* a row, a power of two; more than 1 is a cluster */
    int rows;             /* that a thread works on */
    bool weight_prefetch; /* FN_NORM_WEIGHT_PREFETCH */
    bool dependents_soon; /* FN_NORM_DEPENDENTS_SOON */
} fn_norm_schedule;

/* The fastest known for `rows` rows of `groups` groups of 8 elements, on a device of `multiprocessors` that has clusters or
 * not. Threads, blocks and rows are a wish: the kernel with the fewest groups a thread that can hold the row serves it. */
fn_norm_schedule fn_norm_choose_schedule(int64_t rows, int64_t groups, bool fused, int multiprocessors, bool clusters);

/* A forced schedule: what its name asks of a kernel. */
typedef struct {
    const char *name;
    int least_threads, most_threads; /* a row; 0: the strided kernel */
    int blocks;
} fn_forced_schedule;

enum { FN_FORCED_SCHEDULES = 9 };
extern const fn_forced_schedule fn_forced_schedules[FN_FORCED_SCHEDULES];

#endif
