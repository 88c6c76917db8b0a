/* mm_split.c: products with K in parts on compute capability 9.0: how long a kernel of mm_split.cuh takes, nearly,
 * which decides which one runs. Moves speed alone.
 */
#include "mm_hopper.h"

/* Nanoseconds, nearly, that `blocks` take side by side, on the `usable` multiprocessors that clusters of them can have;
 * what is loaded for a tile: `loaded` rows. The constants fit what was measured on an H200 (15 kernels, 125 shapes;
 * times within 9 % in the mean): the chosen kernel takes 0.6 % more than the fastest in the mean, 5 to 26 % more at 5
 * of the shapes (the most at 384 x 7168, M 128 and 160, where a kernel takes now 5.4 us and now 6.8). */
static double round_of(const fn_mm_split_kernel *kernel, int loaded, uint32_t part_tiles, uint32_t k_tiles,
                       uint32_t blocks, uint32_t usable) {
    const double start = 1460; /* a launch, and what comes first */
    /* Where two blocks fit on a multiprocessor the next kernel's come early, and are in the way of more than half a
     * device's. */
    const double crowded = kernel->resident > 1 && 2.0 * blocks > 1.1 * usable ? 1.6 : 1;
    /* What a multiprocessor does in a nanosecond: bytes of operands that arrive, bytes of sums that it sends or keeps,
     * products of a weight with a token, FN_MM_TILE_K long; and bytes of operands that leave L2. */
    const double operands = 135, sums = 31.5, products = 42, l2 = 13500;
    const uint32_t parts = FN_MM_GATE_PARTS / (uint32_t)kernel->cluster, each = (blocks + usable - 1) / usable;
    const double tiles = parts * part_tiles < k_tiles ? parts * part_tiles : k_tiles; /* of the busiest block */
    const double cells = (double)kernel->tokens * kernel->weights;
    const double bytes = tiles * FN_ATOM_BYTES * loaded;
    /* Sums that a block sends to others, or keeps for later, in tiles, as fitted. Of 2 parts half of the blocks send
     * both, one while the other is added up; of 8 they go to its own shared memory, which costs little. */
    const double sent = parts == 8 ? 0.65 : parts == 4 ? 1.6 : parts == 2 ? 1.35 : 1;
    double time = each * bytes / operands;
    if (time < blocks * bytes / l2) time = blocks * bytes / l2;
    if (time < each * tiles * cells / products) time = each * tiles * cells / products;
    return start + each * sent * cells * sizeof(float) / sums + crowded * time;
}

double fn_mm_split_time(const fn_mm_split_kernel *kernel, const fn_mm_plan *plan, const fn_mm_cut *cut,
                        uint32_t clusters_at_once) {
    const uint32_t rows = plan->m < INT32_MAX ? (uint32_t)plan->m : INT32_MAX, part = (uint32_t)cut->part_tiles;
    const uint32_t k_tiles = (uint32_t)fn_divide_up(plan->k, FN_MM_TILE_K);
    const int loaded = fn_mm_box(kernel->tokens, plan->m) + fn_mm_box(kernel->weights, plan->n);
    const uint32_t clusters = (uint32_t)(fn_divide_up(rows, kernel->tokens) * fn_divide_up(plan->n, kernel->weights));
    const uint32_t size = (uint32_t)kernel->cluster, usable = clusters_at_once * size / (uint32_t)kernel->resident;
    const uint32_t rounds = clusters / clusters_at_once, rest = clusters % clusters_at_once;
    return (rounds ? rounds * round_of(kernel, loaded, part, k_tiles, clusters_at_once * size, usable) : 0) +
           (rest ? round_of(kernel, loaded, part, k_tiles, rest * size, usable) : 0);
}
