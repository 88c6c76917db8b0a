/* mm_split_out.cuh: the shape of a kernel of mm_split.cuh, and its sums' way out: by the copy engine, in boxes that are
 * put together in shared memory, or by the threads, in pairs where out allows it.
 */
#ifndef FUSEDNORM_MM_SPLIT_OUT_CUH
#define FUSEDNORM_MM_SPLIT_OUT_CUH

#include "mm_parts.cuh"

/* BLOCKS of a cluster share the parts of k; RESIDENT blocks have room on a multiprocessor. A block that has all parts
 * has sums waiting only when half of k is done: until then their place belongs to the ring, which has FIRST_STAGES. */
template <int GROUPS_, int COLUMNS_, int STAGES_, int BLOCKS_, int RESIDENT_, bool TOKENS_FIRST_ = false,
          int FIRST_STAGES_ = STAGES_>
struct fn_split_shape {
    static constexpr int GROUPS = GROUPS_, COLUMNS = COLUMNS_, STAGES = STAGES_, BLOCKS = BLOCKS_, RESIDENT = RESIDENT_;
    static constexpr bool TOKENS_FIRST = TOKENS_FIRST_;
    static constexpr int FIRST_STAGES = FIRST_STAGES_;
    /* Blocks that run side by side read the same tokens; else the same weights. */
    static constexpr bool SHARE_TOKENS = TOKENS_FIRST && BLOCKS < 4;
    static constexpr int ROWS = 64 * GROUPS, PARTS = FN_MM_GATE_PARTS / BLOCKS;
    static constexpr int TOKENS = TOKENS_FIRST ? ROWS : COLUMNS, WEIGHTS = TOKENS_FIRST ? COLUMNS : ROWS;
    /* With two warpgroups more registers than all threads could have: the producer is a warpgroup, too, and gives its own. */
    static constexpr bool MANY_REGISTERS = PARTS > 1 && RESIDENT == 1;
    static constexpr int REGISTERS = 240, PRODUCER_REGISTERS = 24;
    static constexpr int CONSUMERS = FN_WARPGROUP * GROUPS, THREADS = CONSUMERS + (MANY_REGISTERS ? FN_WARPGROUP : 32);
    /* A warpgroup queues the next block's products while the last one's are at work, where the ring can spare a stage. */
    static constexpr bool QUEUE = STAGES > 3;
    static constexpr int ROWS_BYTES = ROWS * FN_ATOM_BYTES, STAGE_BYTES = ROWS_BYTES + COLUMNS * FN_ATOM_BYTES;
    static constexpr int UNITS = COLUMNS / 8, UNIT = 32 * (int)sizeof(float4); /* bytes of one, of a warp */
    static constexpr int OWN = (UNITS + BLOCKS - 1) / BLOCKS; /* units; the last owner may have fewer */
    static constexpr int WARP_OWN = OWN * UNIT, OWN_BYTES = CONSUMERS / 32 * WARP_OWN;
    /* Behind the ring: sums that an owner receives, SUMS for each output; or the first half of the parts. */
    static constexpr int SUMS = BLOCKS == 4 ? 6 : BLOCKS, WAITING = STAGES * STAGE_BYTES;
    static constexpr int FIRST_RING = FIRST_STAGES * STAGE_BYTES, LATER = WAITING + SUMS * OWN_BYTES;
    static constexpr int BARRIERS = FIRST_RING > LATER ? FIRST_RING : LATER;
    static constexpr int SHARED = BARRIERS + (2 * FIRST_STAGES + 1) * 8 + FN_SHARED_ALIGNMENT;
    static_assert(COLUMNS % 8 == 0 && SHARED + 1024 <= 233472 / RESIDENT, ""); /* each block costs 1024 more */
    static_assert(!MANY_REGISTERS ||
                      CONSUMERS * REGISTERS + FN_WARPGROUP * PRODUCER_REGISTERS <= THREADS * (65536 / THREADS / 8 * 8),
                  ""); /* what the launch gives */
    static_assert(FN_MM_GATE_PARTS == 8 && PARTS * BLOCKS == FN_MM_GATE_PARTS, "");
    /* The copy engine writes boxes of out: of a warp's 16 tokens, or of a warpgroup's 64 weights. Where an owner has
     * few sums it is sooner done without the engine. */
    static constexpr bool BY_ENGINE = BLOCKS < 8;
    static constexpr int OUT_TOKENS = TOKENS_FIRST ? 16 : 8 * OWN;
    static constexpr int OUT_WEIGHTS = !TOKENS_FIRST || OWN % 4 == 0 ? 32 : OWN % 2 == 0 ? 16 : 8;
    static_assert(!BY_ENGINE || UNITS % OWN * 8 % (TOKENS_FIRST ? OUT_WEIGHTS : OUT_TOKENS) == 0, "");
    static_assert(FIRST_STAGES == STAGES || (BLOCKS == 1 && GROUPS > 1), "");
    static_assert(FIRST_STAGES <= FN_MM_GATE_PARTS / 2 * (FN_MM_GATE_CHUNK / FN_MM_TILE_K),
                  ""); /* one round at least */
};

/* Where a block's things lie in its shared memory. */
typedef struct {
    uint32_t ring, waiting, filled, drained, all_here;
} fn_split_memory;

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

/* A unit: rows `row` and `row` + 8, columns `column` and `column` + 1. Where the rows are weights, lanes l and l ^ 4
 * have weights w and w + 1 of tokens t and t + 1: they swap, so that one has both weights of t and the other both of t
 * + 1. */
template <typename S>
FN_DEVICE void fn_store_unit(const fn_mm_out &to, bool in_pairs, uint32_t row, uint32_t column, const float v[4]) {
    if constexpr (S::TOKENS_FIRST) {
        fn_store_pair(to, in_pairs, row, column, v[0], v[1]);
        fn_store_pair(to, in_pairs, row + 8, column, v[2], v[3]);
    } else {
        const bool odd = row & 1;
        const float near = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 4);
        const float far = __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 4);
        const uint32_t token = column + odd, weight = row - odd;
        fn_store_pair(to, in_pairs, token, weight, odd ? near : v[0], odd ? v[1] : near);
        fn_store_pair(to, in_pairs, token, weight + 8, odd ? far : v[2], odd ? v[3] : far);
    }
}

/* Where boxes of out have an element, in bytes: rows of weights, swizzled as the copy engine does it for such rows. */
template <typename S, bool WIDE> FN_DEVICE uint32_t fn_split_place(uint32_t token, uint32_t weight) {
    constexpr uint32_t bytes = WIDE ? 4 : 2, row = S::OUT_WEIGHTS * bytes;
    const uint32_t at = token * row + weight % S::OUT_WEIGHTS * bytes;
    return weight / S::OUT_WEIGHTS * (S::OUT_TOKENS * row) + (at ^ (at >> 3 & (row - 1) & 0x70));
}

/* Finishes the sums of the first `units`, and puts them into boxes. */
template <typename S, bool WIDE>
FN_DEVICE void fn_split_stage(const fn_mm_out &to, uint32_t boxes, const float sums[4 * S::OWN], int units,
                              uint32_t row, uint32_t column, uint32_t first_weight) {
    const auto put = [&](uint32_t token, uint32_t weight, float v) {
        const uint32_t there = boxes + fn_split_place<S, WIDE>(token, weight);
        if constexpr (WIDE) fn_put(there, v);
        else fn_put_half(there, (uint16_t)fn_pack2(v, 0, to.dtype));
    };
    const auto put_pair = [&](uint32_t token, uint32_t weight, float low, float high) {
        const uint32_t there = boxes + fn_split_place<S, WIDE>(token, weight);
        if constexpr (WIDE) fn_put2(there, low, high);
        else fn_put(there, __uint_as_float(fn_pack2(low, high, to.dtype)));
    };
    float bias[4] = {};
#pragma unroll
    for (int unit = 0; unit < S::OWN; unit++, column += 8) {
        if (unit >= units) break;
        if (to.bias && (S::TOKENS_FIRST || unit == 0)) {
            const uint32_t weight = first_weight + (S::TOKENS_FIRST ? column : row);
            bias[0] = fn_mm_bias(to, weight), bias[1] = S::TOKENS_FIRST ? fn_mm_bias(to, weight + 1) : bias[0];
            bias[2] = S::TOKENS_FIRST ? bias[0] : fn_mm_bias(to, weight + 8),
            bias[3] = S::TOKENS_FIRST ? bias[1] : bias[2];
        }
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i] = without_minus_zero(sums[4 * unit + i]);
            if (to.bias) v[i] = fn_add(v[i], bias[i]);
        }
        if constexpr (S::TOKENS_FIRST) {
            put_pair(row, column, v[0], v[1]);
            put_pair(row + 8, column, v[2], v[3]);
        } else {
            put(column, row, v[0]);
            put(column + 1, row, v[1]);
            put(column, row + 8, v[2]);
            put(column + 1, row + 8, v[3]);
        }
    }
}

/* Writes the first `units` of the sums that this thread owns; (token, weight) is the first of its warp's, or of its
 * warpgroup's. To the engine they go through the place where what they were added up from has been. */
template <typename S>
FN_DEVICE void fn_split_write(const fn_mm_split_args &args, const fn_split_memory &at, const float sums[4 * S::OWN],
                              int units, uint32_t token, uint32_t weight) {
    constexpr int SHARERS = S::TOKENS_FIRST ? 32 : FN_WARPGROUP;
    const fn_mm_out &to = args.to;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t row = lane / 4 + (S::TOKENS_FIRST ? 0 : warp % 4 * 16), column = 2 * (lane % 4);
    if (S::BY_ENGINE && to.by_engine) {
        const auto all_are_here = [&] {
            if (S::TOKENS_FIRST) __syncwarp();
            else fn_threads_wait(1 + warp / 4, FN_WARPGROUP);
        };
        const uint32_t boxes = at.waiting + threadIdx.x / SHARERS * (SHARERS / 32) * S::WARP_OWN;
        const bool wide = to.dtype == FN_FLOAT32;
        all_are_here(); /* none still reads what lay there */
        if (wide) fn_split_stage<S, true>(to, boxes, sums, units, row, column, weight);
        else fn_split_stage<S, false>(to, boxes, sums, units, row, column, weight);
        fn_fence_for_engine();
        all_are_here();
        const uint32_t weights = S::TOKENS_FIRST ? 8 * units : 64, box = threadIdx.x % SHARERS;
        if (box * S::OUT_WEIGHTS < weights && weight + box * S::OUT_WEIGHTS < to.columns && token < to.rows) {
            fn_box_store(&args.out, (int)(weight + box * S::OUT_WEIGHTS), (int)token,
                         boxes + box * (S::OUT_TOKENS * S::OUT_WEIGHTS * (wide ? 4 : 2)));
            fn_stores_commit();
            fn_stores_read<0>();
        }
    } else {
        const bool in_pairs = ((uint64_t)to.data | (uint64_t)to.stride) % (to.dtype == FN_FLOAT32 ? 8 : 4) == 0;
        const uint32_t first_row = row + (S::TOKENS_FIRST ? token : weight);
        const uint32_t first_column = column + (S::TOKENS_FIRST ? weight : token);
#pragma unroll
        for (int unit = 0; unit < S::OWN; unit++)
            if (unit < units) fn_store_unit<S>(to, in_pairs, first_row, first_column + 8 * unit, sums + 4 * unit);
    }
}

#endif
