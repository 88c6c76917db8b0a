/* mm_split.cuh: products with few weights, on compute capability 9.0: a cluster for a tile of out, its blocks share the parts of k.
 *
 * Where out has few tiles, k is what there is to share out. A block's warpgroups add up its parts: 64 tokens each, from a ring of
 * stages that one thread of a further warp keeps filled. A thread's sums are BN / 8 units of 4; each unit has a block that owns
 * it, to which all blocks send theirs, so that 32 lanes send 512 bytes side by side. What the contract adds first is added before
 * it is sent: a half of the parts where a block has one, a half's first two parts where it has these. When all have come the
 * owner adds them up and writes.
 * Moves: the weights once for each BM tokens, the tokens once for each BN weights, the sums once between blocks, out once.
 */
#ifndef FUSEDNORM_MM_SPLIT_CUH
#define FUSEDNORM_MM_SPLIT_CUH

#include "mm_parts.cuh"

/* BLOCKS of a cluster share the parts of k; RESIDENT blocks have room on a multiprocessor. */
template <int GROUPS_, int BN_, int STAGES_, int BLOCKS_, int RESIDENT_> struct fn_split_shape {
    static constexpr int GROUPS = GROUPS_, BN = BN_, STAGES = STAGES_, BLOCKS = BLOCKS_, RESIDENT = RESIDENT_;
    static constexpr int SHARERS = 1, BM = 64 * GROUPS, PARTS = FN_MM_GATE_PARTS / BLOCKS;
    /* More than all threads could have: then the producer is a warpgroup, which gives its own. */
    static constexpr bool MANY_REGISTERS = PARTS > 1;
    static constexpr int CONSUMERS = FN_WARPGROUP * GROUPS, THREADS = CONSUMERS + (MANY_REGISTERS ? FN_WARPGROUP : 32);
    static constexpr int A_BYTES = BM * FN_ATOM_BYTES, STAGE_BYTES = A_BYTES + BN * FN_ATOM_BYTES;
    static constexpr int UNITS = BN / 8, OWN = UNITS > BLOCKS ? UNITS / BLOCKS : 1, OWNERS = UNITS / OWN;
    static constexpr int SUMS = BLOCKS == 4 ? 6 : BLOCKS;              /* that an owner receives for each output */
    static constexpr int SENT = OWN * CONSUMERS * (int)sizeof(float4); /* bytes of one, for all outputs of an owner */
    static constexpr int RECEIVED = STAGES * STAGE_BYTES, BARRIERS = RECEIVED + SUMS * SENT;
    static constexpr int SHARED = BARRIERS + (2 * STAGES + 1) * 8 + FN_SHARED_ALIGNMENT;
    static_assert(UNITS % OWN == 0 && SHARED <= 232448 / RESIDENT, "");
    static_assert(FN_MM_GATE_PARTS == 8 && (BLOCKS == 8 || BLOCKS == 4 || BLOCKS == 2), "");
};

/* Where a block's things lie in its shared memory. */
typedef struct {
    uint32_t ring, received, filled, drained, all_here;
} fn_split_memory;

template <typename S>
FN_DEVICE void fn_split_produce(const fn_mm_split_args &args, const fn_split_memory &at, int first, int blocks, int row,
                                int column) {
    const auto load_weights = [&](int block) {
        const uint32_t stage = block % S::STAGES, full = at.filled + 8 * stage;
        fn_barrier_expect(full, S::STAGE_BYTES);
        fn_box_load(at.ring + stage * S::STAGE_BYTES + S::A_BYTES, &args.b, (first + block) * FN_MM_TILE_K, column,
                    full);
    };
    const int early = args.early ? min(blocks, S::STAGES) : 0;
    for (int block = 0; block < early; block++) load_weights(block);
    wait_for_previous();
    for (int block = 0; block < blocks; block++) {
        const uint32_t stage = block % S::STAGES;
        if (block >= S::STAGES) fn_barrier_wait(at.drained + 8 * stage, (block / S::STAGES - 1) & 1);
        if (block >= early) load_weights(block);
        fn_box_load(at.ring + stage * S::STAGE_BYTES, &args.a, (first + block) * FN_MM_TILE_K, row,
                    at.filled + 8 * stage);
    }
    let_dependents_start();
}

/* One of a thread's sums of all its outputs, the one that is added as number `which`, to the outputs' owners. */
template <typename S> FN_DEVICE void fn_split_send(const fn_split_memory &at, int which, const float sums[S::BN / 2]) {
    const uint32_t to = at.received + which * S::SENT + threadIdx.x * (uint32_t)sizeof(float4);
#pragma unroll
    for (int unit = 0; unit < S::UNITS; unit++) {
        const uint32_t place = to + unit % S::OWN * S::CONSUMERS * (uint32_t)sizeof(float4), owner = unit / S::OWN;
        const float *v = sums + 4 * unit;
        fn_send4(fn_address_in_block(place, owner), make_float4(v[0], v[1], v[2], v[3]),
                 fn_address_in_block(at.all_here, owner));
    }
}

/* Adds up this block's parts, up to its block `end` of k, and sends what there is to send. */
template <typename S, fn_dtype IN>
FN_DEVICE void fn_split_consume(const fn_split_memory &at, int part_blocks, int end, int rank, int group, int lane) {
    constexpr int COUNT = S::BN / 2;
    const fn_ring ring = fn_ring_of<S>(at.ring, at.filled, at.drained, group);
    fn_ring_position now = {0, 0, 0, 0};
    float sum[COUNT];
    if constexpr (S::PARTS == 2) {
        float first[COUNT];
        fn_sum_part<S, IN>(ring, now, min(end, part_blocks), lane, first);
        fn_cluster_wait();
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
        fn_cluster_wait();
        fn_split_send<S>(at, rank, sum);
    }
}

/* out(row, column), out(row, column + 1) = round(low + bias), round(high + bias); column is even. */
FN_DEVICE void fn_store_pair(const fn_mm_out &to, bool in_pairs, uint32_t row, uint32_t column, float low, float high) {
    if (row >= to.rows || column >= to.columns) return;
    char *const there = to.data + (int64_t)row * to.stride + (int64_t)column * (to.dtype == FN_FLOAT32 ? 4 : 2);
    low = without_minus_zero(low);
    high = without_minus_zero(high);
    if (to.bias) {
        low = fn_add(low, fn_mm_bias(to, column));
        high = fn_add(high, fn_mm_bias(to, column + 1));
    }
    if (to.dtype == FN_FLOAT32) {
        if (in_pairs && column + 1 < to.columns) {
            *(float2 *)there = make_float2(low, high);
            return;
        }
        *(float *)there = low;
        if (column + 1 < to.columns) *(float *)(there + 4) = high;
    } else {
        const uint32_t both = fn_pack2(low, high, to.dtype);
        if (in_pairs && column + 1 < to.columns) {
            *(uint32_t *)there = both;
            return;
        }
        *(uint16_t *)there = (uint16_t)both;
        if (column + 1 < to.columns) *(uint16_t *)(there + 2) = (uint16_t)(both >> 16);
    }
}

template <typename S, fn_dtype IN>
__global__ void __launch_bounds__(S::THREADS, S::RESIDENT) fn_mm_split(const __grid_constant__ fn_mm_split_args args) {
    extern __shared__ char memory[];
    const uint32_t ring = (shared_at(memory) + FN_SHARED_ALIGNMENT - 1) & ~(FN_SHARED_ALIGNMENT - 1u);
    const uint32_t filled = ring + S::BARRIERS, rank = fn_cluster_rank(), tile = blockIdx.x / S::BLOCKS;
    const fn_split_memory at = {ring, ring + S::RECEIVED, filled, filled + 8 * S::STAGES, filled + 16 * S::STAGES};
    const int row = (int)(tile % args.tiles_m) * S::BM, column = (int)(tile / args.tiles_m) * S::BN;
    const int first = (int)(rank * args.part_blocks) * S::PARTS;
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
        fn_barrier_expect(at.all_here, rank < S::OWNERS ? S::SUMS * S::SENT : 0);
    }
    __syncthreads();
    fn_cluster_arrive_relaxed(); /* a block is written to once it has begun */
    if (warp >= S::CONSUMERS / 32) {
        if constexpr (S::MANY_REGISTERS) fn_registers_down<24>();
        if (thread == S::CONSUMERS) fn_split_produce<S>(args, at, first, blocks, row, column);
        __syncwarp();
        fn_cluster_wait();
        return;
    }
    if constexpr (S::MANY_REGISTERS) fn_registers_up<240>();
    wait_for_previous();
    fn_split_consume<S, IN>(at, (int)args.part_blocks, blocks, (int)rank, warp / 4, lane);
    if (rank >= S::OWNERS) return;
    /* No block leaves before it has all, so none writes to one that has gone. */
    fn_barrier_wait_for_cluster(at.all_here, 0);
    const bool in_pairs =
        ((uint64_t)args.to.data | (uint64_t)args.to.stride) % (args.to.dtype == FN_FLOAT32 ? 8 : 4) == 0;
#pragma unroll
    for (int own = 0; own < S::OWN; own++) {
        const uint32_t from = at.received + (own * S::CONSUMERS + thread) * (uint32_t)sizeof(float4);
        float4 sum[S::SUMS];
#pragma unroll
        for (int i = 0; i < S::SUMS; i++) sum[i] = load_floats(from + i * S::SENT);
        const float4 v = fold_parts<S::SUMS>(sum);
        const uint32_t r = row + warp * 16 + lane / 4, c = column + (rank * S::OWN + own) * 8 + 2 * (lane % 4);
        fn_store_pair(args.to, in_pairs, r, c, v.x, v.y);
        fn_store_pair(args.to, in_pairs, r + 8, c, v.z, v.w);
    }
}

using fn_split_64x16 = fn_split_shape<1, 16, 8, 8, 2>;
using fn_split_64x32 = fn_split_shape<1, 32, 7, 8, 2>;
using fn_split_64x64 = fn_split_shape<1, 64, 5, 8, 2>;
using fn_split_128x64 = fn_split_shape<2, 64, 3, 8, 2>;
using fn_split_128x128 = fn_split_shape<2, 128, 5, 8, 1>;
using fn_split_128x64_4 = fn_split_shape<2, 64, 7, 4, 1>;
using fn_split_128x128_4 = fn_split_shape<2, 128, 4, 4, 1>;
using fn_split_128x64_2 = fn_split_shape<2, 64, 7, 2, 1>;
using fn_split_128x128_2 = fn_split_shape<2, 128, 5, 2, 1>;

#define FN_MM_SPLIT(D, S) (const void *)fn_mm_split<S, D>, S::BM, S::BN, S::THREADS, S::BLOCKS, S::RESIDENT, S::SHARED

#endif
