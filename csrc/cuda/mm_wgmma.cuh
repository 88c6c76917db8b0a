/* mm_wgmma.cuh: products of more than a few rows, on compute capability 9.0.
 *
 * Every element of the result is one chain: 16 columns of K at a time, ascending, from +0, in the tensor core's sums. Then + bias;
 * then one rounding. No block splits K, so no bit depends on the tile. Here `a` is the tokens, b the weights: N rows along k.
 *
 * A block is three warpgroups: one thread of the first keeps a ring of stages filled (64 columns of a's rows and of b's rows,
 * by the copy engine), two consume them, in turns, a tile each, so that one multiplies while the other writes. The blocks are
 * persistent: the ring runs on into the next tile. The blocks of a cluster have the same rows of b: each loads a part, for all.
 *
 * The first round of the weight may be asked for while the preceding kernel is at work (args.early).
 *
 * A sum's way out: registers, 16 rows of 128 bytes of shared memory that belong to the warp, the copy engine.
 */
#ifndef FUSEDNORM_MM_WGMMA_CUH
#define FUSEDNORM_MM_WGMMA_CUH

#include "hopper.cuh"
#include "mm_hopper.h"
#include "mm_store.cuh"

/* A consumer's sums are 64 * BLOCKS_M x BN. */
template <int BLOCKS_M, int BN_, int STAGES_, int BUFFERS_, int CLUSTER_> struct fn_mm_shape {
    static constexpr int MB = BLOCKS_M, BN = BN_, STAGES = STAGES_, BUFFERS = BUFFERS_, CLUSTER = CLUSTER_;
    static constexpr int BM = 64 * MB;
    static constexpr int A_BYTES = BM * FN_ATOM_BYTES, B_BYTES = BN * FN_ATOM_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr int A_BOX = BM, B_BOX = BN / CLUSTER; /* rows of one load */
    static constexpr int UNIT_M = BM * CLUSTER, UNIT_N = BN;
    static constexpr int STAGING = STAGES * STAGE_BYTES;
    static constexpr int BARRIERS = STAGING + 8 * BUFFERS * FN_STAGING_BYTES;
    static constexpr int SHARED = BARRIERS + 2 * STAGES * 8 + FN_SHARED_ALIGNMENT;
    static constexpr int RELEASES = CLUSTER * 4; /* warps that must be done with a stage */
    static_assert(CLUSTER > 1 && A_BOX <= 256 && B_BOX <= 256 && A_BOX % 8 == 0 && B_BOX % 8 == 0 && SHARED <= 232448,
                  "");
};

/* Which rows of a and of b a unit's tile in this block has. Units follow each other along b within a group of a's rows. */
template <typename S>
FN_DEVICE void fn_mm_place(const fn_mm_prefill_args &args, uint32_t unit, uint32_t rank, int *row, int *column) {
    const uint32_t whole = args.group * args.units_n, first = unit / whole * args.group, in_group = unit % whole;
    const uint32_t high = min(args.units_m - first, args.group);
    const uint32_t m = first + in_group % high, n = in_group / high;
    *row = (int)fn_first_token(m * S::CLUSTER + rank, S::BM, args.to);
    *column = (int)fn_first_weight(n, S::UNIT_N, args.to);
}

/* A stage's bytes are announced, and this block's part of b is on its way. */
template <typename S>
FN_DEVICE void fn_mm_load_b(const fn_mm_prefill_args &args, uint32_t stage_at, uint32_t full, uint32_t block,
                            int column, uint32_t rank) {
    constexpr uint16_t all = (1u << S::CLUSTER) - 1;
    fn_barrier_expect(full, S::STAGE_BYTES);
    fn_box_multicast(stage_at + S::A_BYTES + rank * S::B_BOX * FN_ATOM_BYTES, &args.b, (int)(block * FN_MM_TILE_K),
                     column + (int)rank * S::B_BOX, full, all);
}

template <typename S>
FN_DEVICE void fn_mm_produce(const fn_mm_prefill_args &args, uint32_t ring, uint32_t filled, uint32_t drained,
                             uint32_t rank, uint32_t cluster, uint32_t clusters) {
    uint32_t stage = 0, parity = 1; /* the first round waits for nobody */
    uint32_t begun = 0;             /* blocks whose part of b is on its way already */
    int row, column;
    if (args.early) {
        fn_mm_place<S>(args, cluster, rank, &row, &column);
        for (; begun < S::STAGES && begun < args.k_blocks; begun++)
            fn_mm_load_b<S>(args, ring + begun * S::STAGE_BYTES, filled + 8 * begun, begun, column, rank);
    }
    wait_for_previous();
    for (uint32_t unit = cluster; unit < args.units; unit += clusters) {
        fn_mm_place<S>(args, unit, rank, &row, &column);
        for (uint32_t block = 0; block < args.k_blocks; block++) {
            const uint32_t to = ring + stage * S::STAGE_BYTES, full = filled + 8 * stage;
            if (begun) {
                begun--;
            } else {
                fn_barrier_wait(drained + 8 * stage, parity);
                fn_mm_load_b<S>(args, to, full, block, column, rank);
            }
            fn_box_load(to, &args.a, (int)(block * FN_MM_TILE_K), row, full);
            if (++stage == S::STAGES) stage = 0, parity ^= 1;
        }
    }
    let_dependents_start();
    for (int i = 0; i < S::STAGES; i++) { /* no block leaves while another may still write to it or arrive in it */
        fn_barrier_wait(drained + 8 * stage, parity);
        if (++stage == S::STAGES) stage = 0, parity ^= 1;
    }
}

/* A warp's sums, 16 rows from `row` on. */
template <typename S>
FN_DEVICE void fn_mm_write(const fn_mm_prefill_args &args, float sums[S::BN / 2], int row, int column,
                           fn_staging *staging, int lane) {
    fn_keep_sums<S::BN / 2>(sums);
#pragma unroll
    for (int i = 0; i < S::BN / 2; i++) sums[i] = without_minus_zero(sums[i]);
    if (args.to.dtype == FN_FLOAT32)
        fn_store_sums<S::BN, S::BUFFERS, true>(&args.out, args.to, sums, row, column, staging, lane);
    else fn_store_sums<S::BN, S::BUFFERS, false>(&args.out, args.to, sums, row, column, staging, lane);
}

/* The consumers in turns. */
template <typename S, fn_dtype IN>
FN_DEVICE void fn_mm_consume(const fn_mm_prefill_args &args, uint32_t ring, uint32_t filled, uint32_t drained,
                             uint32_t rank, uint32_t cluster, uint32_t clusters, int group, int warp) {
    const int lane = threadIdx.x % 32;
    const uint64_t a_tile = fn_tile(ring), b_tile = fn_tile(ring + S::A_BYTES);
    fn_staging staging = {ring + S::STAGING + (group * 4 + warp) * S::BUFFERS * FN_STAGING_BYTES, 0};
    uint32_t turn = 0;
    for (uint32_t unit = cluster; unit < args.units; unit += clusters, turn++) {
        if ((turn & 1) != (uint32_t)group) continue;
        /* Not before the other consumer has seen all of its stages filled. A barrier tells only a phase from the one before it,
         * so whoever came earlier would take an earlier round of the ring for its own. */
        if (turn) fn_threads_wait(1 + group, 2 * FN_WARPGROUP);
        const uint32_t before = turn * args.k_blocks;
        uint32_t stage = before % S::STAGES, parity = before / S::STAGES & 1, previous = 0;
        float sums[S::MB][S::BN / 2];
        for (uint32_t block = 0; block < args.k_blocks; block++) {
            fn_barrier_wait(filled + 8 * stage, parity);
            const uint64_t a = a_tile + stage * (S::STAGE_BYTES >> 4), b = b_tile + stage * (S::STAGE_BYTES >> 4);
            fn_products_begin();
#pragma unroll
            for (int k = 0; k < FN_MM_TILE_K / FN_MM_STEP; k++)
#pragma unroll
                for (int m = 0; m < S::MB; m++)
                    fn_product<IN, S::BN>(sums[m], a + 2 * k + m * (64 * FN_ATOM_BYTES >> 4), b + 2 * k,
                                          k ? 1 : block); /* 0: the sums start anew */
            fn_products_commit();
            fn_products_wait<1>();
            if (block) fn_release<S::CLUSTER>(drained + 8 * previous, lane);
            previous = stage;
            if (++stage == S::STAGES) stage = 0, parity ^= 1;
        }
        if (unit + clusters < args.units) fn_threads_pass(1 + (group ^ 1), 2 * FN_WARPGROUP);
        fn_products_wait<0>();
        fn_release<S::CLUSTER>(drained + 8 * previous, lane);
        int row, column;
        fn_mm_place<S>(args, unit, rank, &row, &column);
#pragma unroll
        for (int m = 0; m < S::MB; m++) fn_mm_write<S>(args, sums[m], row + m * 64 + warp * 16, column, &staging, lane);
    }
    fn_stores_read<0>();
}

template <typename S, fn_dtype IN>
__global__ void __launch_bounds__(FN_PREFILL_THREADS, 1)
    fn_mm_prefill(const __grid_constant__ fn_mm_prefill_args args) {
    extern __shared__ char memory[];
    const uint32_t ring = (shared_at(memory) + FN_SHARED_ALIGNMENT - 1) & ~(FN_SHARED_ALIGNMENT - 1u);
    const uint32_t filled = ring + S::BARRIERS, drained = filled + 8 * S::STAGES;
    const uint32_t rank = fn_cluster_rank();
    const uint32_t cluster = blockIdx.x / S::CLUSTER, clusters = gridDim.x / S::CLUSTER;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); /* known to be the same in all lanes */
    if (threadIdx.x == 0) {
        fn_prefetch_map(&args.a);
        fn_prefetch_map(&args.b);
        if (args.to.by_engine) fn_prefetch_map(&args.out);
        for (int i = 0; i < S::STAGES; i++) {
            fn_barrier_init(filled + 8 * i, 1);
            fn_barrier_init(drained + 8 * i, S::RELEASES);
        }
        fn_barrier_fence();
    }
    fn_cluster_sync();
    if (warp < 4) {
        fn_registers_down<24>();
        if (threadIdx.x == 0) fn_mm_produce<S>(args, ring, filled, drained, rank, cluster, clusters);
    } else {
        fn_registers_up<240>();
        wait_for_previous();
        const int group = warp / 4 - 1, own = warp % 4;
        fn_mm_consume<S, IN>(args, ring, filled, drained, rank, cluster, clusters, group, own);
    }
}

/* 128 x 128 in turns, two blocks with the same rows of b: 657 to 709 TFLOP/s on an H200 at 4096 x 4096 to 28672 x 8192 and
 * 1024 to 8192 tokens; tiles of 128 x 256 or 256 x 128 reached no more than 9 % more, and lost as much elsewhere.
 * For few tokens, where it counts what comes into a multiprocessor: a cluster has 256 rows of a, or 128, and so many of b's that N
 * is shared out evenly. */
using fn_prefill_128 = fn_mm_shape<2, 128, 5, 4, 2>;
using fn_prefill_160 = fn_mm_shape<2, 160, 5, 2, 2>;
using fn_prefill_64x64 = fn_mm_shape<1, 64, 12, 2, 2>;
using fn_prefill_64x96 = fn_mm_shape<1, 96, 9, 2, 2>;
using fn_prefill_64x128 = fn_mm_shape<1, 128, 8, 2, 2>;
using fn_prefill_64x160 = fn_mm_shape<1, 160, 6, 2, 2>;
using fn_prefill_64x192 = fn_mm_shape<1, 192, 6, 2, 2>;
using fn_prefill_64x224 = fn_mm_shape<1, 224, 5, 2, 2>;

#define FN_PREFILL(D, S)                                                                                               \
    (const void *)fn_mm_prefill<S, D>, S::UNIT_M, S::UNIT_N, S::A_BOX, S::B_BOX, S::SHARED, S::CLUSTER
#define FN_MM_PREFILL(D)                                                                                               \
    {FN_PREFILL(D, fn_prefill_128)}, {FN_PREFILL(D, fn_prefill_160)}, {FN_PREFILL(D, fn_prefill_64x64)},               \
        {FN_PREFILL(D, fn_prefill_64x96)}, {FN_PREFILL(D, fn_prefill_64x128)}, {FN_PREFILL(D, fn_prefill_64x160)},     \
        {FN_PREFILL(D, fn_prefill_64x192)}, {                                                                          \
        FN_PREFILL(D, fn_prefill_64x224)                                                                               \
    }

#endif
