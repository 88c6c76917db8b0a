/* schedule.c: the policy of (rows, row length), as a table of what was measured to be fastest.
 *
 * What decides: a block that has little to do is dominated by the latency of its loads and of the fold, so few long rows are
 * cut into clusters until a thread holds one group or two. Many rows fill the memory system whatever the schedule, if each
 * block brings at least 4 KiB (blocks start at about one a nanosecond) and few enough registers for several to be in flight.
 * The next kernel's blocks take registers and shared memory from the waiting ones: let in soon, they help where a kernel is too
 * short to fill the device, 10 to 15 % up to thousands of short rows, and harm where its loads still queue.
 * Measured in bf16 on an H200 of 132 multiprocessors; numbers of rows scale with the multiprocessors.
 */
#include "schedule.h"

#include <stddef.h>

enum { PLAIN = 1, FUSED = 2, BOTH = PLAIN | FUSED, ANY_ROWS = 0x7fffffff };

/* The first that fits is taken. Above each part, the longest row that it is for. SOON: the next kernel's blocks are let in
 * after the loads, not after the reduction. */
enum { LATE, SOON };
/* clang-format off */
static const struct {
    int most_groups, most_rows, operations;
    int threads, blocks, rows, dependents;
} rules[] = {
    /* 256 elements: a row is a part of a warp; with a residual the loads in flight suffice with one row a thread */
    {    8,    16384, PLAIN,   8, 1, 2, SOON},
    {    8, ANY_ROWS, PLAIN,   8, 1, 2, LATE},
    {    8,    16384, FUSED,   8, 1, 1, SOON},
    {    8, ANY_ROWS, FUSED,   8, 1, 1, LATE},
    {   16,    16384, PLAIN,  16, 1, 2, SOON},
    {   16, ANY_ROWS, PLAIN,  16, 1, 2, LATE},
    {   16,    16384, FUSED,  16, 1, 1, SOON},
    {   16, ANY_ROWS, FUSED,  16, 1, 1, LATE},
    {   32,    16384, PLAIN,  32, 1, 2, SOON},
    {   32, ANY_ROWS, PLAIN,  32, 1, 2, LATE},
    {   32,    16384, FUSED,  32, 1, 1, SOON},
    {   32, ANY_ROWS, FUSED,  32, 1, 1, LATE},
    /* 512 */
    {   64,      512,  BOTH, 128, 1, 1, SOON},
    {   64,     2048, PLAIN, 128, 1, 1, SOON},
    {   64,     2048, FUSED, 128, 1, 1, LATE},
    {   64, ANY_ROWS,  BOTH,  32, 1, 1, LATE},
    /* 768 */
    {   96,      512,  BOTH, 128, 1, 1, SOON},
    {   96,     2048, PLAIN, 128, 1, 1, SOON},
    {   96,     2048, FUSED, 128, 1, 1, LATE},
    {   96, ANY_ROWS, PLAIN,  64, 1, 2, LATE},
    /* 1024 */
    {  128,      512,  BOTH, 128, 1, 1, SOON},
    {  128,     2048, PLAIN, 128, 1, 1, SOON},
    {  128,     2048, FUSED, 128, 1, 1, LATE},
    {  128, ANY_ROWS, PLAIN, 128, 1, 2, LATE},
    {  128, ANY_ROWS, FUSED, 128, 1, 1, LATE},
    /* 1536 */
    {  192,      512,  BOTH, 128, 1, 1, SOON},
    {  192,     4096, PLAIN, 128, 1, 1, SOON},
    {  192,     4096, FUSED, 128, 1, 1, LATE},
    {  192, ANY_ROWS, PLAIN,  64, 1, 1, LATE},
    /* 2048 */
    {  256,       66, FUSED, 256, 1, 1, SOON},
    {  256,      512, FUSED, 128, 1, 1, SOON},
    {  256,     1024, PLAIN, 256, 1, 1, SOON},
    {  256,     4096, PLAIN, 128, 1, 1, SOON},
    {  256, ANY_ROWS,  BOTH, 128, 1, 1, LATE},
    /* 3072 */
    {  384,     4096, PLAIN, 128, 1, 1, SOON},
    {  384, ANY_ROWS,  BOTH, 128, 1, 1, LATE},
    /* 4096 */
    {  512,       16, FUSED, 128, 4, 1, SOON},
    {  512,       66, PLAIN, 256, 1, 1, SOON},
    {  512,      384,  BOTH, 256, 1, 1, LATE},
    {  512,     1536, PLAIN, 128, 1, 1, SOON},
    {  448, ANY_ROWS,  BOTH, 128, 1, 1, LATE},
    {  512,      768, FUSED, 128, 1, 1, LATE},
    {  512,     4096, PLAIN, 256, 1, 1, SOON},
    {  512, ANY_ROWS, PLAIN, 256, 1, 1, LATE},
    {  512, ANY_ROWS, FUSED,  64, 1, 1, LATE},
    /* 5120 */
    {  640,       16,  BOTH, 256, 4, 1, SOON},
    {  640,       66, FUSED, 256, 2, 1, SOON},
    {  640,      264,  BOTH, 256, 1, 1, LATE},
    {  640,     4096, PLAIN, 128, 1, 1, SOON},
    {  640, ANY_ROWS, PLAIN, 128, 1, 1, LATE},
    /* 8192 */
    { 1024,       16,  BOTH, 256, 4, 1, SOON},
    { 1024,       40, FUSED, 256, 4, 1, SOON},
    { 1024,       66, FUSED, 256, 2, 1, SOON},
    {  896,      264,  BOTH, 256, 1, 1, LATE},
    { 1024,       66, PLAIN, 256, 2, 1, SOON},
    { 1024,      264,  BOTH, 256, 1, 1, SOON},
    { 1024,     4096, PLAIN, 256, 1, 1, SOON},
    {  768, ANY_ROWS,  BOTH, 256, 1, 1, LATE},
    {  896,     1024, FUSED, 256, 1, 1, LATE},
    {  896, ANY_ROWS, FUSED, 128, 1, 1, LATE},
    { 1024,     4096, FUSED, 128, 1, 1, LATE},
    { 1024, ANY_ROWS, FUSED, 512, 1, 1, LATE},
    { 1024, ANY_ROWS, PLAIN, 256, 1, 1, LATE},
    /* 12288 */
    { 1536,       16, FUSED, 128, 8, 1, SOON},
    { 1536,       66, FUSED, 256, 4, 1, SOON},
    { 1536,       16, PLAIN, 256, 4, 1, SOON},
    { 1536,       66, PLAIN, 256, 2, 1, SOON},
    { 1536,      150, PLAIN, 256, 4, 1, SOON},
    { 1536,      264, FUSED, 512, 1, 1, SOON},
    { 1536,     2048, FUSED, 256, 1, 1, LATE},
    { 1536, ANY_ROWS, FUSED, 512, 1, 1, LATE},
    { 1536, ANY_ROWS, PLAIN, 256, 1, 1, LATE},
    /* 16384 */
    { 2048,       40, FUSED, 128, 8, 1, SOON},
    { 2048,      150,  BOTH, 256, 4, 1, SOON},
    { 2048, ANY_ROWS,  BOTH, 256, 1, 1, LATE},
    /* 28672 */
    { 3584,       66,  BOTH, 256, 8, 1, SOON},
    { 3584, ANY_ROWS,  BOTH, 512, 1, 1, LATE},
    /* 131072 */
    {16384, ANY_ROWS,  BOTH, 256, 8, 1, SOON},
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
                                  .dependents_soon = rules[i].dependents == SOON};
    }
    return (fn_norm_schedule){.threads = 0};
}

const fn_forced_schedule fn_forced_schedules[FN_FORCED_SCHEDULES] = {
    {"packed", 1, 32, 1},      {"block64", 64, 64, 1},    {"block128", 128, 128, 1},
    {"block256", 256, 256, 1}, {"block512", 512, 512, 1}, {"cluster2", 64, 512, 2},
    {"cluster4", 64, 512, 4},  {"cluster8", 64, 512, 8},  {"strided", 0, 0, 1},
};
