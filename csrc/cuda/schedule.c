/* schedule.c: the policy of (rows, row length), as a table of what was measured to be fastest.
 *
 * What decides: a block that has little to do is dominated by the latency of its loads and of the fold, so few long rows are
 * cut into clusters until a thread holds one group or two. Many rows fill the memory system whatever the schedule, if each
 * block brings at least 4 KiB (blocks start at about one a nanosecond) and few enough registers for several to be in flight.
 * Measured in bf16 on an H200 of 132 multiprocessors; numbers of rows scale with the multiprocessors.
 */
#include "schedule.h"

#include <stddef.h>

enum { PLAIN = 1, FUSED = 2, BOTH = PLAIN | FUSED, ANY_ROWS = 0x7fffffff };

/* The first that fits is taken. Above each part, the longest row that it is for. */
/* clang-format off */
static const struct {
    int most_groups, most_rows, operations;
    int threads, blocks, rows;
} rules[] = {
    /* 256 elements: a row is a part of a warp; with a residual the loads in flight suffice with one row a thread */
    {    8, ANY_ROWS, PLAIN,   8, 1, 2},
    {    8, ANY_ROWS, FUSED,   8, 1, 1},
    {   16, ANY_ROWS, PLAIN,  16, 1, 2},
    {   16, ANY_ROWS, FUSED,  16, 1, 1},
    {   32, ANY_ROWS, PLAIN,  32, 1, 2},
    {   32, ANY_ROWS, FUSED,  32, 1, 1},
    /* 512 */
    {   64,     2048,  BOTH, 128, 1, 1},
    {   64, ANY_ROWS,  BOTH,  32, 1, 1},
    /* 768 */
    {   96,     2048,  BOTH, 128, 1, 1},
    {   96, ANY_ROWS, PLAIN,  64, 1, 2},
    /* 1024 */
    {  128,     2048,  BOTH, 128, 1, 1},
    {  128, ANY_ROWS, PLAIN, 128, 1, 2},
    {  128, ANY_ROWS, FUSED, 128, 1, 1},
    /* 1536 */
    {  192,     4096,  BOTH, 128, 1, 1},
    {  192, ANY_ROWS, PLAIN,  64, 1, 1},
    /* 2048 */
    {  256,      512, FUSED, 256, 1, 1},
    {  256, ANY_ROWS,  BOTH, 128, 1, 1},
    /* 3072 */
    {  384,       16,  BOTH, 128, 4, 1},
    {  384,       66, FUSED, 256, 2, 1},
    {  384,      264,  BOTH, 256, 1, 1},
    {  384, ANY_ROWS,  BOTH, 128, 1, 1},
    /* 4096 */
    {  512,       16, PLAIN, 128, 4, 1},
    {  512,       66, FUSED, 256, 2, 1},
    {  512,      384,  BOTH, 256, 1, 1},
    {  448, ANY_ROWS,  BOTH, 128, 1, 1},
    {  512,      768, FUSED, 128, 1, 1},
    {  512,      768, PLAIN, 256, 1, 1},
    {  512,     1536, PLAIN, 128, 1, 1},
    {  512, ANY_ROWS, PLAIN, 256, 1, 1},
    {  512, ANY_ROWS, FUSED,  64, 1, 1},
    /* 5120 */
    {  640,       16,  BOTH, 256, 4, 1},
    {  640,       66, FUSED, 256, 2, 1},
    {  640,      264,  BOTH, 256, 1, 1},
    {  640, ANY_ROWS, PLAIN, 128, 1, 1},
    /* 8192 */
    { 1024,       16,  BOTH, 256, 4, 1},
    { 1024,       40, FUSED, 256, 4, 1},
    { 1024,       66,  BOTH, 256, 2, 1},
    {  768, ANY_ROWS,  BOTH, 256, 1, 1},
    { 1024,      264, FUSED, 256, 1, 1},
    {  896, ANY_ROWS, FUSED, 128, 1, 1},
    { 1024,     4096, FUSED, 128, 1, 1},
    { 1024, ANY_ROWS, FUSED, 512, 1, 1},
    { 1024, ANY_ROWS, PLAIN, 256, 1, 1},
    /* 12288 */
    { 1536,       16, FUSED, 128, 8, 1},
    { 1536,       66, FUSED, 256, 4, 1},
    { 1536,       16, PLAIN, 256, 4, 1},
    { 1536,      150, PLAIN, 256, 2, 1},
    { 1536,     2048, FUSED, 256, 1, 1},
    { 1536, ANY_ROWS, FUSED, 512, 1, 1},
    { 1536, ANY_ROWS, PLAIN, 256, 1, 1},
    /* 16384 */
    { 2048,       40, FUSED, 128, 8, 1},
    { 2048,      150,  BOTH, 256, 4, 1},
    { 2048, ANY_ROWS,  BOTH, 256, 1, 1},
    /* 28672 */
    { 3584,       66,  BOTH, 256, 8, 1},
    { 3584, ANY_ROWS,  BOTH, 512, 1, 1},
    /* 131072 */
    {16384, ANY_ROWS,  BOTH, 256, 8, 1},
};
/* clang-format on */

fn_norm_schedule fn_norm_choose_schedule(int64_t rows, int64_t groups, bool fused, int multiprocessors, bool clusters) {
    const double scaled = (double)rows * 132 / multiprocessors;
    const int operation = fused ? FUSED : PLAIN;
    for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++) {
        if (groups > rules[i].most_groups || (rules[i].most_rows != ANY_ROWS && scaled > rules[i].most_rows) ||
            !(rules[i].operations & operation) || (rules[i].blocks > 1 && !clusters))
            continue;
        return (fn_norm_schedule){.threads = rules[i].threads,
                                  .blocks = rules[i].blocks,
                                  .rows = rules[i].rows,
                                  .weight_prefetch = scaled <= 32,
                                  .dependents_soon = rules[i].blocks > 1 || scaled <= 16};
    }
    return (fn_norm_schedule){.threads = 0};
}

const fn_forced_schedule fn_forced_schedules[FN_FORCED_SCHEDULES] = {
    {"packed", 1, 32, 1},      {"block64", 64, 64, 1},    {"block128", 128, 128, 1},
    {"block256", 256, 256, 1}, {"block512", 512, 512, 1}, {"cluster2", 64, 512, 2},
    {"cluster4", 64, 512, 4},  {"cluster8", 64, 512, 8},  {"strided", 0, 0, 1},
};
