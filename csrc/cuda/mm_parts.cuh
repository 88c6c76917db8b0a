/* mm_parts.cuh: the sums of mm_tensor.h's cut of k, in registers, on compute capability 9.0: chunks, one chain of products each;
 * parts, whose chunks are added in order; halves, whose parts are.
 *
 * A warpgroup has 64 rows of its block's tile, and all of its columns. A thread holds COLUMNS / 2 sums of the chunk at work, as
 * many of its part, and as many of the half.
 */
#ifndef FUSEDNORM_MM_PARTS_CUH
#define FUSEDNORM_MM_PARTS_CUH

#include "hopper.cuh"
#include "mm_hopper.h"
#include "mm_store.cuh"

/* A warpgroup's view of the ring of stages. */
typedef struct {
    uint64_t rows, columns; /* as tiles of the first stage */
    uint32_t filled, drained;
} fn_ring;

typedef struct {
    int block; /* of k, counted from the first of this block's */
    uint32_t stage, parity;
    uint32_t stages;  /* of this round */
    int fewer_stages; /* the block of k from which on a round has STAGES: where one begins */
} fn_ring_position;

/* The ring has FIRST_STAGES as long as whole rounds of them fit into `blocks` blocks of k, then STAGES. */
template <typename S> FN_DEVICE fn_ring_position fn_ring_begin(int blocks) {
    return {0, 0, 0, S::FIRST_STAGES, blocks / S::FIRST_STAGES * S::FIRST_STAGES};
}

template <typename S> FN_DEVICE void fn_ring_next(fn_ring_position &now) {
    now.block++;
    const uint32_t stages = S::FIRST_STAGES == S::STAGES ? S::STAGES : now.stages;
    if (++now.stage < stages) return;
    now.stage = 0;
    now.parity ^= 1;
    if (now.block >= now.fewer_stages) now.stages = S::STAGES;
}

/* -0, to which everything may be added and is left as it was. */
template <int COUNT> FN_DEVICE void fn_set_to_nothing(float sums[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[i] = -0.0f;
}

template <int COUNT> FN_DEVICE void fn_add_to(float total[COUNT], const float sums[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) total[i] = fn_add(total[i], sums[i]);
}

/* Begins the products of the next block of k, into sums that go on or start anew. */
template <typename S, fn_dtype IN>
FN_DEVICE void fn_multiply(const fn_ring &ring, const fn_ring_position &now, float chunk[S::COLUMNS / 2],
                           uint32_t go_on) {
    const uint32_t stage = now.stage * (S::STAGE_BYTES >> 4);
    fn_barrier_wait(ring.filled + 8 * now.stage, now.parity);
    fn_products_begin();
#pragma unroll
    for (int k = 0; k < FN_MM_TILE_K / FN_MM_STEP; k++)
        fn_product<IN, S::COLUMNS>(chunk, ring.rows + stage + 2 * k, ring.columns + stage + 2 * k, k ? 1 : go_on);
    fn_products_commit();
}

/* The sums of the next chunk, of at least one block of k, which ends at block `end` or earlier. A stage is free when its products
 * are done.
 *
 * ptxas has each product waited for by itself where it cannot see that nothing else touches the sums between the first and the
 * last (its remark C7514): hence no loop of products that may have no turn, here and below, and no sums that come from products or
 * from elsewhere. */
template <typename S, fn_dtype IN>
FN_DEVICE void fn_sum_chunk(const fn_ring &ring, fn_ring_position &now, int end, int lane,
                            float chunk[S::COLUMNS / 2]) {
    const int chunk_end = min(end, now.block + FN_MM_GATE_CHUNK / FN_MM_TILE_K);
    uint32_t go_on = 0, last = 0;
    do {
        fn_multiply<S, IN>(ring, now, chunk, go_on);
        fn_products_wait<S::QUEUE>();
        if (lane == 0 && (go_on || !S::QUEUE)) fn_barrier_arrive(ring.drained + 8 * (S::QUEUE ? last : now.stage));
        last = now.stage;
        fn_ring_next<S>(now);
        go_on = 1;
    } while (now.block < chunk_end);
    if constexpr (S::QUEUE) {
        fn_products_wait<0>();
        if (lane == 0) fn_barrier_arrive(ring.drained + 8 * last);
    }
    fn_keep_sums<S::COLUMNS / 2>(chunk);
}

/* sum = that of the k up to block `end`, the rest of a part and at least one block: its chunks' sums, added up. The first ones are
 * the products' own: on an H200 4096 x 256 x 7168 took 29.9 us where they were added to nothing, 28.3 so, 27.6 with the queue. */
template <typename S, fn_dtype IN>
FN_DEVICE void fn_sum_part(const fn_ring &ring, fn_ring_position &now, int end, int lane, float sum[S::COLUMNS / 2]) {
    constexpr int COUNT = S::COLUMNS / 2;
    fn_sum_chunk<S, IN>(ring, now, end, lane, sum);
    while (now.block < end) {
        float chunk[COUNT];
        fn_sum_chunk<S, IN>(ring, now, end, lane, chunk);
        fn_add_to<COUNT>(sum, chunk);
    }
}

/* total = the sum of half of the parts, of part_blocks each, the next of which ends at block `part_end`, the last at `end`; at
 * least one block. */
template <typename S, fn_dtype IN>
FN_DEVICE void fn_sum_half(const fn_ring &ring, fn_ring_position &now, int part_blocks, int part_end, int end, int lane,
                           float total[S::COLUMNS / 2]) {
    constexpr int COUNT = S::COLUMNS / 2;
    fn_sum_part<S, IN>(ring, now, min(end, part_end), lane, total);
#pragma unroll 1
    for (int part = 1; part < FN_MM_GATE_PARTS / 2; part++) {
        float sum[COUNT];
        if (now.block >= end) break;
        part_end += part_blocks;
        fn_sum_part<S, IN>(ring, now, min(end, part_end), lane, sum);
        fn_add_to<COUNT>(total, sum);
    }
}

#endif
