/* mm_chain.c: products of one chain of K on compute capability 9.0: which kernel, and which tile. Moves speed alone.
 *
 * Up to 64 tokens a block has them all, and reads the weight as fast as memory delivers it. Above FEW_TOKENS there is
 * one kernel. In between it counts what the busiest multiprocessor has to do, and an estimate chooses.
 */
#include "mm_hopper.h"

#include <math.h>

enum {
    FEW_TOKENS = 512,      /* rows of a up to which the estimate holds: with more, turns are no measure */
    DECODE_MOST_ROWS = 64, /* of the weights in a tile */
    DECODE_LEAST_ROWS = 16,
    DECODE_ROW_STEP = 8,
};

/* How a kernel shares out a product: the tile of a block, and how often the busiest cluster has one for each of its
 * blocks, with the same weights. */
typedef struct {
    uint32_t tokens, weights, turns;
} shares;

static shares share_out(const fn_mm_plan *plan, int tokens, int weights, int cluster, int multiprocessors) {
    const int64_t units = fn_divide_up(plan->m, tokens * cluster) * fn_divide_up(plan->n, weights);
    return (shares){(uint32_t)tokens, (uint32_t)weights, (uint32_t)fn_divide_up(units, multiprocessors / cluster)};
}

/* Without clusters decode is as fast as the memory, or nearly: the fewest rows of the weights for the busiest
 * multiprocessor; else the least that comes into it; the largest tile of these. */
static shares share_out_decode(const fn_mm_plan *plan, const fn_mm_decode_kernel *kernel, int multiprocessors) {
    const int cluster = kernel->cluster;
    shares best = {0};
    uint64_t least = UINT64_MAX;
    for (int rows = DECODE_MOST_ROWS; rows >= DECODE_LEAST_ROWS; rows -= DECODE_ROW_STEP * cluster) {
        const shares s = share_out(plan, kernel->tokens, rows, cluster, multiprocessors);
        const uint64_t busiest = (uint64_t)s.turns * (s.weights + (cluster > 1 ? s.tokens : 0));
        if (busiest < least) least = busiest, best = s;
    }
    return best;
}

int fn_mm_decode_rows(const fn_mm_decode_kernel *kernel, const fn_mm_plan *plan, int multiprocessors) {
    return (int)share_out_decode(plan, kernel, multiprocessors).weights;
}

/* Nanoseconds, nearly, that the busiest multiprocessor takes for each column of K; memory and L2 set a limit that is
 * the same for all kernels, so they decide nothing. The constants fit what was measured on an H200, 80 to 512 tokens,
 * 4096 x 4096 to 28672 x 8192: at each of 45 shapes the chosen kernel takes at most 2 % more than the fastest. */
static double time_of(const fn_mm_plan *plan, const shares *s) {
    const double arrive = 103;    /* bytes of operands that come into a multiprocessor in a nanosecond */
    const double products = 2500; /* of a weight with a token, in a nanosecond */
    const uint32_t rows = plan->m < s->tokens ? (uint32_t)plan->m : s->tokens; /* that are loaded */
    const double bytes = 2.0 * (rows + s->weights);
    const double cells = s->tokens * (double)(s->weights < 64 ? 64 : s->weights);
    const double come = bytes / arrive, multiply = cells / products;
    return s->turns * (come < multiply ? multiply : come);
}

int fn_mm_choose_chain(const fn_mm_hopper_kernels *table, const fn_mm_plan *plan, int multiprocessors) {
    if (plan->m > FEW_TOKENS) return FN_MM_DECODE_KERNELS;
    int best = 0, i = 0;
    for (; table->decode[i].cluster == 1; i++)
        if (table->decode[i].tokens >= plan->m) return i;
    double least = INFINITY;
    for (; i < FN_MM_DECODE_KERNELS + FN_MM_PREFILL_KERNELS; i++) {
        shares s;
        if (i < FN_MM_DECODE_KERNELS) {
            s = share_out_decode(plan, &table->decode[i], multiprocessors);
        } else {
            const fn_mm_prefill_kernel *kernel = &table->prefill[i - FN_MM_DECODE_KERNELS];
            s = share_out(plan, kernel->unit_m / kernel->cluster, kernel->unit_n, kernel->cluster, multiprocessors);
        }
        const double time = time_of(plan, &s);
        if (time < least) least = time, best = i;
    }
    return best;
}
