/* mm_split.cuh: products with few weights, on compute capability 9.0: a cluster for a tile of out, its blocks share the parts of k.
 *
 * A tile's rows are weights and its columns tokens, since only the number of columns may be any multiple of 8; or the other way
 * round (TOKENS_FIRST), for weights whose number is no multiple of 64. A block's warpgroups add up its parts, 64 rows each, from
 * a ring of stages that one thread of a further warp keeps filled.
 * A thread's sums are COLUMNS / 8 units of 4; each unit has a block that owns it, to which all blocks send theirs, so that 32
 * lanes send 512 bytes side by side. What the contract adds first is added before it is sent: a half of the parts where a block
 * has one, a half's first two parts where it has these. When all have come the owner adds them up and writes. A block that has
 * all parts sends nothing.
 * Moves: what the rows are once for each COLUMNS columns, what the columns are once for each ROWS rows, the sums once between
 * blocks, out once.
 */
#ifndef FUSEDNORM_MM_SPLIT_CUH
#define FUSEDNORM_MM_SPLIT_CUH

#include "mm_parts.cuh"

/* BLOCKS of a cluster share the parts of k; RESIDENT blocks have room on a multiprocessor. */
template <int GROUPS_, int COLUMNS_, int STAGES_, int BLOCKS_, int RESIDENT_, bool TOKENS_FIRST_ = false>
struct fn_split_shape {
    static constexpr int GROUPS = GROUPS_, COLUMNS = COLUMNS_, STAGES = STAGES_, BLOCKS = BLOCKS_, RESIDENT = RESIDENT_;
    static constexpr bool TOKENS_FIRST = TOKENS_FIRST_;
    static constexpr int ROWS = 64 * GROUPS, PARTS = FN_MM_GATE_PARTS / BLOCKS;
    static constexpr int TOKENS = TOKENS_FIRST ? ROWS : COLUMNS, WEIGHTS = TOKENS_FIRST ? COLUMNS : ROWS;
    /* More registers than all threads could have: then the producer is a warpgroup, which gives its own. */
    static constexpr bool MANY_REGISTERS = PARTS > 1 && RESIDENT == 1;
    static constexpr int REGISTERS = GROUPS == 3 ? 160 : 240, PRODUCER_REGISTERS = 24;
    static constexpr int CONSUMERS = FN_WARPGROUP * GROUPS, THREADS = CONSUMERS + (MANY_REGISTERS ? FN_WARPGROUP : 32);
    static constexpr int ROWS_BYTES = ROWS * FN_ATOM_BYTES, STAGE_BYTES = ROWS_BYTES + COLUMNS * FN_ATOM_BYTES;
    static constexpr int UNITS = COLUMNS / 8, UNIT = CONSUMERS * (int)sizeof(float4); /* bytes of one, of all threads */
    static constexpr int OWN = (UNITS + BLOCKS - 1) / BLOCKS; /* units; the last owner may have fewer */
    /* Behind the ring: sums that an owner receives, SUMS for each output; or the first half of the parts. */
    static constexpr int SUMS = BLOCKS == 4 ? 6 : BLOCKS, SENT = OWN * UNIT;
    static constexpr int RECEIVED = STAGES * STAGE_BYTES, BARRIERS = RECEIVED + SUMS * SENT;
    static constexpr int SHARED = BARRIERS + (2 * STAGES + 1) * 8 + FN_SHARED_ALIGNMENT;
    static_assert(COLUMNS % 8 == 0 && SHARED + 1024 <= 233472 / RESIDENT, ""); /* each block costs 1024 more */
    static_assert(!MANY_REGISTERS ||
                      CONSUMERS * REGISTERS + FN_WARPGROUP * PRODUCER_REGISTERS <= THREADS * (65536 / THREADS / 8 * 8),
                  ""); /* what the launch gives */
    static_assert(FN_MM_GATE_PARTS == 8 && PARTS * BLOCKS == FN_MM_GATE_PARTS, "");
};

/* Where a block's things lie in its shared memory. */
typedef struct {
    uint32_t ring, received, filled, drained, all_here;
} fn_split_memory;

/* What the copy engine brings: the block's tile, and its blocks of k, counted from `first`. */
typedef struct {
    int token, weight, first, blocks;
} fn_split_work;

template <typename S>
FN_DEVICE void fn_split_load_weights(const fn_mm_split_args &args, const fn_split_work &work, int block, uint32_t to,
                                     uint32_t filled) {
    fn_barrier_expect(filled, S::STAGE_BYTES);
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
        for (int i = 0; i < S::STAGES; i++)
            if (i < work.blocks)
                fn_split_load_weights<S>(args, work, i, at.ring + i * S::STAGE_BYTES, at.filled + 8 * i);
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < S::STAGES; i++) {
        if (i >= work.blocks) break;
        if (!args.early) fn_split_load_weights<S>(args, work, i, at.ring + i * S::STAGE_BYTES, at.filled + 8 * i);
        fn_split_load_tokens<S>(args, work, i, at.ring + i * S::STAGE_BYTES, at.filled + 8 * i);
    }
}

template <typename S>
FN_DEVICE void fn_split_refill(const fn_mm_split_args &args, const fn_split_memory &at, const fn_split_work &work) {
    uint32_t stage = 0, parity = 0;
#pragma unroll 1
    for (int block = S::STAGES; block < work.blocks; block++) {
        const uint32_t to = at.ring + stage * S::STAGE_BYTES, filled = at.filled + 8 * stage;
        fn_barrier_wait(at.drained + 8 * stage, parity);
        fn_split_load_weights<S>(args, work, block, to, filled);
        fn_split_load_tokens<S>(args, work, block, to, filled);
        if (++stage == S::STAGES) stage = 0, parity ^= 1;
    }
    let_dependents_start();
}

/* Sends a term of each of a thread's outputs, that which is added as number `which`, to the block that owns the output. */
template <typename S>
FN_DEVICE void fn_split_send(const fn_split_memory &at, int which, const float sums[S::COLUMNS / 2]) {
    const uint32_t to = at.received + which * S::SENT + threadIdx.x * (uint32_t)sizeof(float4);
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
    fn_ring_position now = {0, 0, 0, 0};
    float sum[COUNT];
    if constexpr (S::PARTS == 2) {
        float first[COUNT];
        fn_sum_part<S, IN>(ring, now, min(end, part_blocks), lane, first);
        if (rank % 2) { /* the half's other block has what comes before: these are added one by one */
            fn_split_send<S>(at, rank / 2 * 3 + 1, first);
            fn_set_to_nothing<COUNT>(first);
        }
        fn_sum_part<S, IN>(ring, now, end, lane, sum);
#pragma unroll
        for (int i = 0; i < COUNT; i++) sum[i] = fn_add(first[i], sum[i]);
        fn_split_send<S>(at, rank / 2 * 3 + rank % 2 * 2, sum);
    } else {
        if constexpr (S::PARTS == 1) fn_sum_part<S, IN>(ring, now, end, lane, sum);
        else fn_sum_half<S, IN>(ring, now, part_blocks, part_blocks, end, lane, sum);
        fn_split_send<S>(at, rank, sum);
    }
}

/* out(token, weight), out(token, weight + 1) = round(low + bias), round(high + bias); weight is even. */
FN_DEVICE void fn_store_pair(const fn_mm_out &to, bool in_pairs, uint32_t token, uint32_t weight, float low,
                             float high) {
    if (token >= to.rows || weight >= to.columns) return;
    char *const there = to.data + (int64_t)token * to.stride + (int64_t)weight * (to.dtype == FN_FLOAT32 ? 4 : 2);
    low = without_minus_zero(low);
    high = without_minus_zero(high);
    if (to.bias) {
        low = fn_add(low, fn_mm_bias(to, weight));
        high = fn_add(high, fn_mm_bias(to, weight + 1));
    }
    if (to.dtype == FN_FLOAT32) {
        if (in_pairs && weight + 1 < to.columns) {
            *(float2 *)there = make_float2(low, high);
            return;
        }
        *(float *)there = low;
        if (weight + 1 < to.columns) *(float *)(there + 4) = high;
    } else {
        const uint32_t both = fn_pack2(low, high, to.dtype);
        if (in_pairs && weight + 1 < to.columns) {
            *(uint32_t *)there = both;
            return;
        }
        *(uint16_t *)there = (uint16_t)both;
        if (weight + 1 < to.columns) *(uint16_t *)(there + 2) = (uint16_t)(both >> 16);
    }
}

/* A unit: rows `row` and `row` + 8, columns `column` and `column` + 1. Where the rows are weights, lanes l and l ^ 4 have weights
 * w and w + 1 of tokens t and t + 1: they swap, so that one has both weights of t and the other both of t + 1. */
template <typename S>
FN_DEVICE void fn_store_unit(const fn_mm_out &to, bool in_pairs, uint32_t row, uint32_t column, float4 v) {
    if constexpr (S::TOKENS_FIRST) {
        fn_store_pair(to, in_pairs, row, column, v.x, v.y);
        fn_store_pair(to, in_pairs, row + 8, column, v.z, v.w);
    } else {
        const bool odd = row & 1;
        const float near = __shfl_xor_sync(0xffffffffu, odd ? v.x : v.y, 4);
        const float far = __shfl_xor_sync(0xffffffffu, odd ? v.z : v.w, 4);
        const uint32_t token = column + odd, weight = row - odd;
        fn_store_pair(to, in_pairs, token, weight, odd ? near : v.x, odd ? v.y : near);
        fn_store_pair(to, in_pairs, token, weight + 8, odd ? far : v.z, odd ? v.w : far);
    }
}

/* What an owner does: adds up what has come, and writes it. */
template <typename S>
FN_DEVICE void fn_split_finish(const fn_mm_out &to, const fn_split_memory &at, int rank, bool in_pairs, uint32_t row,
                               uint32_t column) {
    /* No block leaves before it has all, so none writes to one that has gone. */
    fn_barrier_wait_for_cluster(at.all_here, 0);
#pragma unroll
    for (int own = 0; own < S::OWN; own++) {
        const int unit = rank * S::OWN + own;
        if (unit >= S::UNITS) return;
        const uint32_t from = at.received + own * S::UNIT + threadIdx.x * (uint32_t)sizeof(float4);
        float4 sum[S::SUMS];
#pragma unroll
        for (int i = 0; i < S::SUMS; i++) sum[i] = load_floats(from + i * S::SENT);
        fn_store_unit<S>(to, in_pairs, row, column + unit * 8, fold_parts<S::SUMS>(sum));
    }
}

/* A block that has all parts: the first half waits in shared memory, each unit where its thread finds it. */
template <typename S, fn_dtype IN>
FN_DEVICE void fn_split_alone(const fn_mm_out &to, const fn_ring &ring, const fn_split_memory &at, int part_blocks,
                              int end, int lane, bool in_pairs, uint32_t row, uint32_t column) {
    const uint32_t waiting = at.received + threadIdx.x * (uint32_t)sizeof(float4);
    fn_ring_position now = {0, 0, 0, 0};
    float half[S::COLUMNS / 2];
    fn_sum_half<S, IN>(ring, now, part_blocks, part_blocks, end, lane, half);
#pragma unroll
    for (int unit = 0; unit < S::UNITS; unit++) {
        const float *v = half + 4 * unit;
        store_floats(waiting + unit * S::UNIT, make_float4(v[0], v[1], v[2], v[3]));
    }
    fn_sum_half<S, IN>(ring, now, part_blocks, (FN_MM_GATE_PARTS / 2 + 1) * part_blocks, end, lane, half);
#pragma unroll
    for (int unit = 0; unit < S::UNITS; unit++) {
        const float *v = half + 4 * unit;
        const float4 both[2] = {load_floats(waiting + unit * S::UNIT), make_float4(v[0], v[1], v[2], v[3])};
        fn_store_unit<S>(to, in_pairs, row, column + unit * 8, fold_parts<2>(both));
    }
}

template <typename S, fn_dtype IN>
__global__ void __launch_bounds__(S::THREADS, S::RESIDENT) fn_mm_split(const __grid_constant__ fn_mm_split_args args) {
    extern __shared__ char memory[];
    const uint32_t ring = (shared_at(memory) + FN_SHARED_ALIGNMENT - 1) & ~(FN_SHARED_ALIGNMENT - 1u);
    const uint32_t filled = ring + S::BARRIERS, tile = blockIdx.x / S::BLOCKS;
    const int rank = S::BLOCKS > 1 ? (int)fn_cluster_rank() : 0;
    const fn_split_memory at = {ring, ring + S::RECEIVED, filled, filled + 8 * S::STAGES, filled + 16 * S::STAGES};
    const int token = (int)(tile % args.tiles_m) * S::TOKENS, weight = (int)(tile / args.tiles_m) * S::WEIGHTS;
    const int first = rank * (int)args.part_blocks * S::PARTS;
    const int blocks = min((int)args.part_blocks * S::PARTS, (int)args.k_blocks - first);
    const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    if (thread == S::CONSUMERS) {
        fn_prefetch_map(&args.a);
        fn_prefetch_map(&args.b);
        for (int i = 0; i < S::STAGES; i++) {
            fn_barrier_init(at.filled + 8 * i, 1);
            fn_barrier_init(at.drained + 8 * i, 4 * S::GROUPS);
        }
        fn_barrier_init(at.all_here, 1);
        fn_barrier_fence();
        const int units = max(min(S::OWN, S::UNITS - rank * S::OWN), 0);
        if (S::BLOCKS > 1) fn_barrier_expect(at.all_here, units * S::SUMS * S::UNIT);
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
    const fn_ring own = {fn_tile(ring + warp / 4 * 64 * FN_ATOM_BYTES), fn_tile(ring + S::ROWS_BYTES), at.filled,
                         at.drained};
    const uint32_t row = (S::TOKENS_FIRST ? token : weight) + warp * 16 + lane / 4;
    const uint32_t column = (S::TOKENS_FIRST ? weight : token) + 2 * (lane % 4);
    const bool in_pairs =
        ((uint64_t)args.to.data | (uint64_t)args.to.stride) % (args.to.dtype == FN_FLOAT32 ? 8 : 4) == 0;
    if constexpr (S::BLOCKS == 1) {
        fn_split_alone<S, IN>(args.to, own, at, (int)args.part_blocks, blocks, lane, in_pairs, row, column);
    } else {
        fn_split_consume<S, IN>(own, at, (int)args.part_blocks, blocks, rank, lane);
        if (rank * S::OWN < S::UNITS) fn_split_finish<S>(args.to, at, rank, in_pairs, row, column);
    }
}

/* Weights x tokens, and the blocks that share k. Each is the fastest somewhere. */
using fn_split_64x16_by8 = fn_split_shape<1, 16, 8, 8, 2>;
using fn_split_64x32_by8 = fn_split_shape<1, 32, 7, 8, 2>;
using fn_split_64x64_by8 = fn_split_shape<1, 64, 5, 8, 2>;
using fn_split_128x64_by8 = fn_split_shape<2, 64, 3, 8, 2>;
using fn_split_128x128_by8 = fn_split_shape<2, 128, 5, 8, 1>;
using fn_split_128x72_by4 = fn_split_shape<2, 72, 6, 4, 1>;
using fn_split_80x128_by4 = fn_split_shape<2, 80, 5, 4, 1, true>;
using fn_split_128x64_by2 = fn_split_shape<2, 64, 7, 2, 1>;
using fn_split_192x64_by2 = fn_split_shape<3, 64, 5, 2, 1>;
using fn_split_80x128_by2 = fn_split_shape<2, 80, 7, 2, 1, true>;
using fn_split_64x64_by1 = fn_split_shape<1, 64, 5, 1, 2>;
using fn_split_128x64_by1 = fn_split_shape<2, 64, 8, 1, 1>;
using fn_split_192x64_by1 = fn_split_shape<3, 64, 5, 1, 1>;
using fn_split_128x128_by1 = fn_split_shape<2, 128, 5, 1, 1>;
using fn_split_80x128_by1 = fn_split_shape<2, 80, 6, 1, 1, true>;

#define FN_SPLIT(D, S)                                                                                                 \
    (const void *)fn_mm_split<S, D>, S::TOKENS, S::WEIGHTS, S::THREADS, S::BLOCKS, S::RESIDENT, S::SHARED
#define FN_MM_SPLIT(D)                                                                                                 \
    {FN_SPLIT(D, fn_split_64x16_by8)}, {FN_SPLIT(D, fn_split_64x32_by8)}, {FN_SPLIT(D, fn_split_64x64_by8)},           \
        {FN_SPLIT(D, fn_split_128x64_by8)}, {FN_SPLIT(D, fn_split_128x128_by8)}, {FN_SPLIT(D, fn_split_128x72_by4)},   \
        {FN_SPLIT(D, fn_split_80x128_by4)}, {FN_SPLIT(D, fn_split_128x64_by2)}, {FN_SPLIT(D, fn_split_192x64_by2)},    \
        {FN_SPLIT(D, fn_split_80x128_by2)}, {FN_SPLIT(D, fn_split_64x64_by1)}, {FN_SPLIT(D, fn_split_128x64_by1)},     \
        {FN_SPLIT(D, fn_split_192x64_by1)}, {FN_SPLIT(D, fn_split_128x128_by1)}, {                                     \
        FN_SPLIT(D, fn_split_80x128_by1)                                                                               \
    }

#endif
