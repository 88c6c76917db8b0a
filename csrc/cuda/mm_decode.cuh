/* mm_decode.cuh: products of few rows, on compute capability 9.0: as fast as the weight can be read.
 *
 * The same chain as mm_wgmma.cuh, the other way round: the weight's rows are the 64 rows of a product, the tokens its columns,
 * so that few tokens cost little. A tile has args.rows of the weight's rows, a multiple of 8 that shares N out evenly among the
 * multiprocessors; the product's other rows come from whatever lies behind them in shared memory, and are dropped.
 *
 * One warp keeps a ring of stages filled, as long as shared memory allows: what is on its way from memory must cover the
 * memory's latency. Four warps multiply. The blocks are persistent. The blocks of a cluster have the same rows of the weight, of
 * which each loads a part, for all, and each its tokens.
 * The first round of the weight may be asked for while the preceding kernel is at work (args.early).
 */
#ifndef FUSEDNORM_MM_DECODE_CUH
#define FUSEDNORM_MM_DECODE_CUH

#include "hopper.cuh"
#include "mm_hopper.h"
#include "mm_store.cuh"

template <int TOKENS_, int CLUSTER_> struct fn_decode_shape {
    static constexpr int TOKENS = TOKENS_, CLUSTER = CLUSTER_;
    static constexpr uint16_t ALL = (1u << CLUSTER) - 1;
};

/* Where a stage's parts begin: the weight's rows, block after block, then the tokens. */
typedef struct {
    uint32_t ring, filled, drained, weight_bytes, stage_bytes;
    uint32_t rank; /* the block's, in the cluster */
} fn_decode_ring;

/* The first row of the weight of a unit's tile, and the first token of this block's. */
FN_DEVICE uint32_t fn_decode_row(const fn_mm_decode_args &args, uint32_t unit) {
    return fn_first_weight(unit / args.units_m, args.rows, args.to);
}

template <typename S>
FN_DEVICE uint32_t fn_decode_token(const fn_mm_decode_args &args, const fn_decode_ring &at, uint32_t unit) {
    return fn_first_token(unit % args.units_m * S::CLUSTER + at.rank, S::TOKENS, args.to);
}

/* A step's part of the weight. */
template <typename S>
FN_DEVICE void fn_decode_load(const fn_mm_decode_args &args, const fn_decode_ring &at, uint32_t stage, uint32_t step,
                              int row, uint64_t once) {
    const uint32_t weight = at.ring + stage * at.stage_bytes, full = at.filled + 8 * stage;
    fn_barrier_expect(full, args.stage_bytes);
#pragma unroll
    for (uint32_t i = 0; i < FN_DECODE_BLOCKS; i++)
        if constexpr (S::CLUSTER > 1) {
            const uint32_t part = args.rows / S::CLUSTER * at.rank;
            fn_box_multicast_hint(weight + i * at.weight_bytes + part * FN_ATOM_BYTES, &args.b,
                                  (int)((step * FN_DECODE_BLOCKS + i) * FN_MM_TILE_K), row + (int)part, full, S::ALL,
                                  once);
        } else {
            fn_box_load_hint(weight + i * at.weight_bytes, &args.b, (int)((step * FN_DECODE_BLOCKS + i) * FN_MM_TILE_K),
                             row, full, once);
        }
}

template <typename S>
FN_DEVICE void fn_decode_produce(const fn_mm_decode_args &args, const fn_decode_ring &at, uint32_t cluster,
                                 uint32_t clusters) {
    const uint64_t once = fn_evict_first();
    uint32_t stage = 0, parity = 1, begun = 0; /* steps whose part of the weight is on its way already */
    if (args.early)
        for (; begun < args.stages && begun < args.k_stages; begun++)
            fn_decode_load<S>(args, at, begun, begun, (int)fn_decode_row(args, cluster), once);
    wait_for_previous();
    for (uint32_t unit = cluster; unit < args.units; unit += clusters) {
        const int token = (int)fn_decode_token<S>(args, at, unit);
        const int row = (int)fn_decode_row(args, unit);
        for (uint32_t step = 0; step < args.k_stages; step++) {
            if (begun) {
                begun--;
            } else {
                fn_barrier_wait(at.drained + 8 * stage, parity);
                fn_decode_load<S>(args, at, stage, step, row, once);
            }
            const uint32_t tokens = at.ring + stage * at.stage_bytes + FN_DECODE_BLOCKS * at.weight_bytes;
            const uint32_t full = at.filled + 8 * stage;
#pragma unroll
            for (uint32_t i = 0; i < FN_DECODE_BLOCKS; i++)
                fn_box_load(tokens + i * S::TOKENS * FN_ATOM_BYTES, &args.a,
                            (int)((step * FN_DECODE_BLOCKS + i) * FN_MM_TILE_K), token, full);
            if (++stage == args.stages) stage = 0, parity ^= 1;
        }
    }
    let_dependents_start();
    if (S::CLUSTER > 1) /* no block leaves while another may still write to it or arrive in it */
        for (uint32_t i = 0; i < args.stages; i++) {
            fn_barrier_wait(at.drained + 8 * stage, parity);
            if (++stage == args.stages) stage = 0, parity ^= 1;
        }
}

/* sums[4j + i]: weight row `row` + 8 * (i / 2), token `token` + 8j + i % 2. Eight lanes write neighbours. */
template <int TOKENS, bool WIDE>
FN_DEVICE void fn_decode_store(const fn_mm_out &to, const float *sums, uint32_t row, uint32_t in_tile, uint32_t rows,
                               uint32_t token) {
    constexpr int bytes = WIDE ? 4 : 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t column = row + half * 8;
        if (in_tile + half * 8 >= rows || column >= to.columns) continue;
        const float bias = to.bias ? fn_mm_bias(to, column) : 0;
        char *there = to.data + (int64_t)token * to.stride + (int64_t)column * bytes;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (token + 8 * j + i >= to.rows) continue;
                float v = without_minus_zero(sums[4 * j + 2 * half + i]);
                if (to.bias) v = fn_add(v, bias);
                char *place = there + (8 * j + i) * to.stride;
                if constexpr (WIDE) *(float *)place = v;
                else *(uint16_t *)place = (uint16_t)fn_pack2(v, v, to.dtype);
            }
    }
}

template <typename S, fn_dtype IN>
FN_DEVICE void fn_decode_consume(const fn_mm_decode_args &args, const fn_decode_ring &at, uint32_t cluster,
                                 uint32_t clusters, int warp) {
    const int lane = threadIdx.x % 32;
    uint32_t stage = 0, parity = 0;
    for (uint32_t unit = cluster; unit < args.units; unit += clusters) {
        float sums[S::TOKENS / 2];
        uint32_t previous = 0;
        for (uint32_t step = 0; step < args.k_stages; step++) {
            fn_barrier_wait(at.filled + 8 * stage, parity);
            const uint32_t weight = at.ring + stage * at.stage_bytes,
                           tokens = weight + FN_DECODE_BLOCKS * at.weight_bytes;
            fn_products_begin();
#pragma unroll
            for (uint32_t i = 0; i < FN_DECODE_BLOCKS; i++) {
                const uint64_t w = fn_tile(weight + i * at.weight_bytes),
                               t = fn_tile(tokens + i * S::TOKENS * FN_ATOM_BYTES);
#pragma unroll
                for (int k = 0; k < FN_MM_TILE_K / FN_MM_STEP; k++)
                    fn_product<IN, S::TOKENS>(sums, w + 2 * k, t + 2 * k, i || k ? 1 : step);
            }
            fn_products_commit();
            fn_products_wait<1>();
            if (step) fn_release<S::CLUSTER>(at.drained + 8 * previous, lane);
            previous = stage;
            if (++stage == args.stages) stage = 0, parity ^= 1;
        }
        fn_products_wait<0>();
        fn_release<S::CLUSTER>(at.drained + 8 * previous, lane);
        fn_keep_sums<S::TOKENS / 2>(sums);
        const uint32_t in_tile = warp * 16 + lane / 4;
        const uint32_t token = fn_decode_token<S>(args, at, unit) + 2 * (lane % 4);
        const uint32_t row = fn_decode_row(args, unit) + in_tile;
        if (args.to.dtype == FN_FLOAT32)
            fn_decode_store<S::TOKENS, true>(args.to, sums, row, in_tile, args.rows, token);
        else fn_decode_store<S::TOKENS, false>(args.to, sums, row, in_tile, args.rows, token);
    }
}

template <typename S, fn_dtype IN>
__global__ void __launch_bounds__(FN_DECODE_THREADS, 1) fn_mm_decode(const __grid_constant__ fn_mm_decode_args args) {
    extern __shared__ char memory[];
    fn_decode_ring at;
    at.ring = (shared_at(memory) + FN_SHARED_ALIGNMENT - 1) & ~(FN_SHARED_ALIGNMENT - 1u);
    at.weight_bytes = args.rows * FN_ATOM_BYTES;
    at.stage_bytes = FN_DECODE_BLOCKS * (at.weight_bytes + S::TOKENS * FN_ATOM_BYTES);
    at.filled = at.ring + args.stages * at.stage_bytes + FN_DECODE_SLACK;
    at.drained = at.filled + 8 * args.stages;
    at.rank = S::CLUSTER > 1 ? fn_cluster_rank() : 0;
    const uint32_t cluster = blockIdx.x / S::CLUSTER, clusters = gridDim.x / S::CLUSTER;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (threadIdx.x == 128) {
        fn_prefetch_map(&args.a);
        fn_prefetch_map(&args.b);
        for (uint32_t i = 0; i < args.stages; i++) {
            fn_barrier_init(at.filled + 8 * i, 1);
            fn_barrier_init(at.drained + 8 * i, 4 * S::CLUSTER);
        }
        fn_barrier_fence();
    }
    if constexpr (S::CLUSTER > 1) fn_cluster_sync();
    else __syncthreads();
    if (warp == 4) {
        if (threadIdx.x == 128) fn_decode_produce<S>(args, at, cluster, clusters);
    } else {
        wait_for_previous();
        fn_decode_consume<S, IN>(args, at, cluster, clusters, warp);
    }
}

#define FN_DECODE(D, TOKENS, CLUSTER) (const void *)fn_mm_decode<fn_decode_shape<TOKENS, CLUSTER>, D>, TOKENS, CLUSTER
#define FN_MM_DECODE(D)                                                                                                \
    {FN_DECODE(D, 8, 1)}, {FN_DECODE(D, 16, 1)}, {FN_DECODE(D, 32, 1)}, {FN_DECODE(D, 64, 1)}, {FN_DECODE(D, 48, 2)},  \
    {                                                                                                                  \
        FN_DECODE(D, 96, 2)                                                                                            \
    }

#endif
