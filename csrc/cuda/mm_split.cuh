/* mm_split.cuh: products with few weights, on compute capability 9.0: a cluster for a tile of out, its blocks share the parts of k.
 *
 * A tile's rows are weights and its columns tokens, since only the number of columns may be any multiple of 8; or the other way
 * round (TOKENS_FIRST), for weights whose number is no multiple of 64. A block's warpgroups add up its parts, 64 rows each, from
 * a ring of stages that one thread of a further warp keeps filled.
 * A thread's sums are COLUMNS / 8 units of 4; each unit has a block that owns it, to which all blocks send theirs, so that 32
 * lanes send 512 bytes side by side. What the contract adds first is added before it is sent: a half of the parts where a block
 * has one, a half's first two parts where it has these. When all have come the owner adds them up and writes. A block that has
 * all parts sends nothing; two that read the same tokens are neighbours on the device, so that these come out of L2 once.
 * Where there are many sums the copy engine writes them: of 8192 x 256 it took 2.0 us, the threads' own stores 5.6.
 * Moves: what the rows are once for each COLUMNS columns, what the columns are once for each ROWS rows, the sums once between
 * blocks, out once.
 */
#ifndef FUSEDNORM_MM_SPLIT_CUH
#define FUSEDNORM_MM_SPLIT_CUH

#include "mm_parts.cuh"
#include "mm_split_out.cuh"

/* What the copy engine brings: the block's tile, and its blocks of k, counted from `first`. */
typedef struct {
    int token, weight, first, blocks;
} fn_split_work;

template <typename S>
FN_DEVICE void fn_split_load_weights(const fn_mm_split_args &args, const fn_split_work &work, int block, uint32_t to,
                                     uint32_t filled) {
    fn_barrier_expect(filled, args.stage_bytes);
    fn_box_load(to + (S::TOKENS_FIRST ? S::ROWS_BYTES : 0), &args.b, (work.first + block) * FN_MM_TILE_K, work.weight,
                filled);
}

template <typename S>
FN_DEVICE void fn_split_load_tokens(const fn_mm_split_args &args, const fn_split_work &work, int block, uint32_t to,
                                    uint32_t filled) {
    fn_box_load(to + (S::TOKENS_FIRST ? 0 : S::ROWS_BYTES), &args.a, (work.first + block) * FN_MM_TILE_K, work.token,
                filled);
}

/* The first round of the ring by itself: its addresses are constants, and where k is short there is no other. */
template <typename S>
FN_DEVICE void fn_split_fill(const fn_mm_split_args &args, const fn_split_memory &at, const fn_split_work &work) {
    if (args.early)
#pragma unroll
        for (int i = 0; i < S::FIRST_STAGES; i++)
            if (i < work.blocks)
                fn_split_load_weights<S>(args, work, i, at.ring + i * S::STAGE_BYTES, at.filled + 8 * i);
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < S::FIRST_STAGES; i++) {
        if (i >= work.blocks) break;
        if (!args.early) fn_split_load_weights<S>(args, work, i, at.ring + i * S::STAGE_BYTES, at.filled + 8 * i);
        fn_split_load_tokens<S>(args, work, i, at.ring + i * S::STAGE_BYTES, at.filled + 8 * i);
    }
}

template <typename S>
FN_DEVICE void fn_split_refill(const fn_mm_split_args &args, const fn_split_memory &at, const fn_split_work &work) {
    fn_ring_position now = fn_ring_begin<S>(FN_MM_GATE_PARTS / 2 * (int)args.part_blocks);
    now.block = S::FIRST_STAGES;
    if (now.fewer_stages == S::FIRST_STAGES) now.stages = S::STAGES;
#pragma unroll 1
    while (now.block < work.blocks) {
        const uint32_t to = at.ring + now.stage * S::STAGE_BYTES, filled = at.filled + 8 * now.stage;
        fn_barrier_wait(at.drained + 8 * now.stage, now.parity);
        fn_split_load_weights<S>(args, work, now.block, to, filled);
        fn_split_load_tokens<S>(args, work, now.block, to, filled);
        fn_ring_next<S>(now);
    }
    let_dependents_start();
}

/* Where this thread's own sums are. */
template <typename S> FN_DEVICE uint32_t fn_split_own(const fn_split_memory &at) {
    return at.waiting + threadIdx.x / 32 * S::WARP_OWN + threadIdx.x % 32 * (uint32_t)sizeof(float4);
}

/* Sends a term of each of a thread's outputs, that which is added as number `which`, to the block that owns the output. */
template <typename S>
FN_DEVICE void fn_split_send(const fn_split_memory &at, int which, const float sums[S::COLUMNS / 2]) {
    const uint32_t to = fn_split_own<S>(at) + which * S::OWN_BYTES;
#pragma unroll
    for (int unit = 0; unit < S::UNITS; unit++) {
        const uint32_t place = to + unit % S::OWN * S::UNIT, owner = unit / S::OWN;
        const float *v = sums + 4 * unit;
        fn_send4(fn_address_in_block(place, owner), make_float4(v[0], v[1], v[2], v[3]),
                 fn_address_in_block(at.all_here, owner));
    }
}

/* Adds up this block's parts, up to its block `end` of k, and sends what there is to send. */
template <typename S, fn_dtype IN>
FN_DEVICE void fn_split_consume(const fn_ring &ring, const fn_split_memory &at, int part_blocks, int end, int rank,
                                int lane) {
    constexpr int COUNT = S::COLUMNS / 2;
    constexpr bool PAIR = S::PARTS == 2;
    const bool apart = PAIR && rank % 2; /* the half's other block has what comes before: two parts, added one by one */
    const int which = PAIR ? rank / 2 * 3 + rank % 2 : rank;
    fn_ring_position now = fn_ring_begin<S>(0);
    float sum[COUNT], nothing[COUNT];
    fn_set_to_nothing<COUNT>(nothing);
    if (end <= 0) {
        fn_split_send<S>(at, which, nothing);
        if (apart) fn_split_send<S>(at, which + 1, nothing);
    } else if constexpr (PAIR) {
        const bool both = end > part_blocks;
        fn_sum_part<S, IN>(ring, now, min(end, part_blocks), lane, sum);
        if (apart || !both) fn_split_send<S>(at, which, sum);
        if (both) {
            float second[COUNT];
            fn_sum_part<S, IN>(ring, now, end, lane, second);
            if (!apart) fn_add_to<COUNT>(second, sum);
            fn_split_send<S>(at, which + apart, second);
        } else if (apart) {
            fn_split_send<S>(at, which + 1, nothing);
        }
    } else {
        if constexpr (S::PARTS == 1) fn_sum_part<S, IN>(ring, now, end, lane, sum);
        else fn_sum_half<S, IN>(ring, now, part_blocks, part_blocks, end, lane, sum);
        fn_split_send<S>(at, which, sum);
    }
}

/* What an owner does: adds up what has come, and writes it. */
template <typename S>
FN_DEVICE void fn_split_finish(const fn_mm_split_args &args, const fn_split_memory &at, int rank, uint32_t token,
                               uint32_t weight) {
    const int first = rank * S::OWN, units = S::UNITS % S::OWN ? min(S::OWN, S::UNITS - first) : S::OWN;
    float sums[4 * S::OWN];
    /* No block leaves before it has all, so none writes to one that has gone. */
    fn_barrier_wait_for_cluster(at.all_here, 0);
#pragma unroll
    for (int unit = 0; unit < S::OWN; unit++) {
        if (unit >= units) break;
        float4 sum[S::SUMS];
#pragma unroll
        for (int i = 0; i < S::SUMS; i++) sum[i] = load_floats(fn_split_own<S>(at) + unit * S::UNIT + i * S::OWN_BYTES);
        const float4 all = fold_parts<S::SUMS>(sum);
        sums[4 * unit] = all.x, sums[4 * unit + 1] = all.y, sums[4 * unit + 2] = all.z, sums[4 * unit + 3] = all.w;
    }
    fn_split_write<S>(args, at, sums, units, token + (S::TOKENS_FIRST ? 0 : 8 * first),
                      weight + (S::TOKENS_FIRST ? 8 * first : 0));
}

/* A block that has all parts: the first half waits in shared memory, where this thread alone finds it. */
template <typename S, fn_dtype IN>
FN_DEVICE void fn_split_alone(const fn_mm_split_args &args, const fn_ring &ring, const fn_split_memory &at, int end,
                              int lane, uint32_t token, uint32_t weight) {
    const int part_blocks = (int)args.part_blocks, half_end = FN_MM_GATE_PARTS / 2 * part_blocks;
    const uint32_t waiting = fn_split_own<S>(at);
    fn_ring_position now = fn_ring_begin<S>(half_end);
    float half[S::COLUMNS / 2];
    fn_sum_half<S, IN>(ring, now, part_blocks, part_blocks, end, lane, half);
    if (end > half_end) {
        /* All warpgroups are done with the stages that lay there. */
#pragma unroll
        for (int stage = S::STAGES; stage < S::FIRST_STAGES; stage++)
            fn_barrier_wait(ring.drained + 8 * stage, (now.fewer_stages / S::FIRST_STAGES - 1) & 1);
#pragma unroll
        for (int unit = 0; unit < S::UNITS; unit++) {
            const float *v = half + 4 * unit;
            store_floats(waiting + unit * S::UNIT, make_float4(v[0], v[1], v[2], v[3]));
        }
        fn_sum_half<S, IN>(ring, now, part_blocks, half_end + part_blocks, end, lane, half);
#pragma unroll
        for (int unit = 0; unit < S::UNITS; unit++) {
            float *v = half + 4 * unit;
            const float4 first = load_floats(waiting + unit * S::UNIT);
            v[0] = fn_add(first.x, v[0]), v[1] = fn_add(first.y, v[1]);
            v[2] = fn_add(first.z, v[2]), v[3] = fn_add(first.w, v[3]);
        }
    }
    fn_split_write<S>(args, at, half, S::UNITS, token, weight);
}

template <typename S, fn_dtype IN>
__global__ void __launch_bounds__(S::THREADS, S::RESIDENT) fn_mm_split(const __grid_constant__ fn_mm_split_args args) {
    extern __shared__ char memory[];
    const uint32_t ring = (shared_at(memory) + FN_SHARED_ALIGNMENT - 1) & ~(FN_SHARED_ALIGNMENT - 1u);
    const uint32_t filled = ring + S::BARRIERS, tile = blockIdx.x / S::BLOCKS;
    const int rank = S::BLOCKS > 1 ? (int)fn_cluster_rank() : 0;
    const fn_split_memory at = {ring, ring + S::WAITING, filled, filled + 8 * S::FIRST_STAGES,
                                filled + 16 * S::FIRST_STAGES};
    const uint32_t tile_m = S::SHARE_TOKENS ? tile / args.tiles_n : tile % args.tiles_m;
    const uint32_t tile_n = S::SHARE_TOKENS ? tile % args.tiles_n : tile / args.tiles_m;
    const int token = (int)fn_first_token(tile_m, S::TOKENS, args.to);
    const int weight = (int)fn_first_weight(tile_n, S::WEIGHTS, args.to);
    const int first = rank * (int)args.part_blocks * S::PARTS;
    const int blocks = min((int)args.part_blocks * S::PARTS, (int)args.k_blocks - first);
    const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    if (thread == S::CONSUMERS) {
        fn_prefetch_map(&args.a);
        fn_prefetch_map(&args.b);
        if (S::BY_ENGINE && args.to.by_engine) fn_prefetch_map(&args.out);
        for (int i = 0; i < S::FIRST_STAGES; i++) {
            fn_barrier_init(at.filled + 8 * i, 1);
            fn_barrier_init(at.drained + 8 * i, 4 * S::GROUPS);
        }
        fn_barrier_init(at.all_here, 1);
        fn_barrier_fence();
        const int units = max(min(S::OWN, S::UNITS - rank * S::OWN), 0);
        if (S::BLOCKS > 1) fn_barrier_expect(at.all_here, units * S::SUMS * (S::CONSUMERS / 32 * S::UNIT));
    }
    __syncthreads();
    if (S::BLOCKS > 1) fn_cluster_arrive_relaxed(); /* a block is written to once it has begun */
    if (warp >= S::CONSUMERS / 32) {
        if constexpr (S::MANY_REGISTERS) fn_registers_down<S::PRODUCER_REGISTERS>();
        const fn_split_work work = {token, weight, first, blocks};
        if (thread == S::CONSUMERS) fn_split_fill<S>(args, at, work);
        __syncwarp();
        if (S::BLOCKS > 1) fn_cluster_wait();
        if (thread == S::CONSUMERS) fn_split_refill<S>(args, at, work);
        return;
    }
    if constexpr (S::MANY_REGISTERS) fn_registers_up<S::REGISTERS>();
    if (S::BLOCKS > 1) fn_cluster_wait(); /* while the first loads are on their way */
    wait_for_previous();
    const fn_ring view = {fn_tile(ring + warp / 4 * 64 * FN_ATOM_BYTES), fn_tile(ring + S::ROWS_BYTES), at.filled,
                          at.drained};
    const uint32_t first_token = (uint32_t)token + (S::TOKENS_FIRST ? warp * 16 : 0);
    const uint32_t first_weight = (uint32_t)weight + (S::TOKENS_FIRST ? 0 : warp / 4 * 64);
    if constexpr (S::BLOCKS == 1) {
        fn_split_alone<S, IN>(args, view, at, blocks, lane, first_token, first_weight);
    } else {
        fn_split_consume<S, IN>(view, at, (int)args.part_blocks, blocks, rank, lane);
        if (rank * S::OWN < S::UNITS) fn_split_finish<S>(args, at, rank, first_token, first_weight);
    }
}

/* Weights x tokens, and the blocks that share k. Each is the fastest somewhere. */
using fn_split_64x16_by8 = fn_split_shape<1, 16, 8, 8, 2>;
using fn_split_64x32_by8 = fn_split_shape<1, 32, 7, 8, 2>;
using fn_split_48x64_by8 = fn_split_shape<1, 48, 6, 8, 2, true>;
using fn_split_64x64_by8 = fn_split_shape<1, 64, 5, 8, 2>;
using fn_split_128x64_by8 = fn_split_shape<2, 64, 3, 8, 2>;
using fn_split_128x128_by8 = fn_split_shape<2, 128, 5, 8, 1>;
using fn_split_128x72_by4 = fn_split_shape<2, 72, 6, 4, 1>;
using fn_split_80x128_by4 = fn_split_shape<2, 80, 5, 4, 1, true>;
using fn_split_128x64_by2 = fn_split_shape<2, 64, 7, 2, 1>;
using fn_split_96x64_by2 = fn_split_shape<1, 96, 8, 2, 1, true>;
using fn_split_96x64_by1 = fn_split_shape<1, 96, 9, 1, 1, true>;
using fn_split_64x128_by1 = fn_split_shape<2, 64, 8, 1, 1, true, 9>;
using fn_split_80x128_by1 = fn_split_shape<2, 80, 7, 1, 1, true, 8>;
using fn_split_96x128_by1 = fn_split_shape<2, 96, 6, 1, 1, true, 8>;
using fn_split_128x128_by1 = fn_split_shape<2, 128, 5, 1, 1, true, 7>;

#define FN_SPLIT(D, S)                                                                                                 \
    &#S[sizeof "fn_split_" - 1], (const void *)fn_mm_split<S, D>, S::TOKENS, S::WEIGHTS, S::THREADS, S::BLOCKS,        \
        S::RESIDENT, S::SHARED, S::BY_ENGINE ? S::OUT_TOKENS : 0, S::OUT_WEIGHTS
#define FN_MM_SPLIT(D)                                                                                                 \
    {FN_SPLIT(D, fn_split_64x16_by8)}, {FN_SPLIT(D, fn_split_64x32_by8)}, {FN_SPLIT(D, fn_split_48x64_by8)},           \
        {FN_SPLIT(D, fn_split_64x64_by8)}, {FN_SPLIT(D, fn_split_128x64_by8)}, {FN_SPLIT(D, fn_split_128x128_by8)},    \
        {FN_SPLIT(D, fn_split_128x72_by4)}, {FN_SPLIT(D, fn_split_80x128_by4)}, {FN_SPLIT(D, fn_split_128x64_by2)},    \
        {FN_SPLIT(D, fn_split_96x64_by2)}, {FN_SPLIT(D, fn_split_96x64_by1)}, {FN_SPLIT(D, fn_split_64x128_by1)},      \
        {FN_SPLIT(D, fn_split_80x128_by1)}, {FN_SPLIT(D, fn_split_96x128_by1)}, {                                      \
        FN_SPLIT(D, fn_split_128x128_by1)                                                                              \
    }

#endif
