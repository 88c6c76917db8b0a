/* mm_fma_sums.cuh: whose outputs are whose, and what becomes of their lanes, for mm_fma.cu and mm_fma_many_sm90a.cu.
 *
 * The contract (csrc/cpu/mm_dtype_scalar.c) has 16 lanes for each output, so a warp holds 16 numbers for each: lane
 * pair p of 8 (lanes 2p and 2p + 1) belongs to the threads with threadIdx / 4 % 8 = p, the 4 threads of a pair have
 * different outputs. A thread adds up ROWS_OWN x COLUMNS_OWN outputs, 2 lanes each; at a chunk's end the pairs
 * exchange what they have, so that each is left with the sums of an eighth of the outputs.
 *
 * The blocks of a cluster may share a tile: they take turns at the chunks, whose sums are then added in order.
 */
#ifndef FUSEDNORM_MM_FMA_SUMS_CUH
#define FUSEDNORM_MM_FMA_SUMS_CUH

#include "cluster.cuh"
#include "element.cuh"
#include "launch.h"
#include "mm_fma.h"

enum { FN_FMA_PAIRS = 8 };

/* ---- where a thread's outputs are -------------------------------------------------------------------------------- */

/* OWN rows (or columns) in each of PLACES threads, SIDE_BY_SIDE of them next to each other. */
template <int OWN, int PLACES, int SIDE_BY_SIDE> struct fn_mm_share {
    static constexpr int NEIGHBOURS = SIDE_BY_SIDE, ALL = OWN * PLACES;
    static_assert(OWN % SIDE_BY_SIDE == 0, "");
    FN_DEVICE constexpr int part_of(int i) { return i / NEIGHBOURS * NEIGHBOURS * PLACES + i % NEIGHBOURS; }
    FN_DEVICE constexpr int part_of_place(int place) { return place * NEIGHBOURS; }
};

/* Where a block works: the first row and column of its tile. Tiles that are at work together share operands: a panel of
 * row tiles goes through the columns. */
struct fn_fma_tile {
    int64_t row, column;
};

template <int ROWS, int COLUMNS> FN_DEVICE fn_fma_tile fn_fma_tile_at(const fn_fma_out &to, uint32_t tile) {
    const uint32_t panel_tiles = to.panel * to.column_tiles, panel = tile / panel_tiles, in_panel = tile % panel_tiles;
    const uint32_t panel_rows = min(to.panel, to.row_tiles - panel * to.panel);
    return {(int64_t)(panel * to.panel + in_panel % panel_rows) * ROWS, (int64_t)(in_panel / panel_rows) * COLUMNS};
}

/* ---- the fold ---------------------------------------------------------------------------------------------------- */

/* One halving: lane l and lane l + DISTANCE * 2 are in threads DISTANCE * 4 apart. COUNT outputs become half as many,
 * as long as there are two. */
template <int COUNT, int DISTANCE, int ROOM> FN_DEVICE void fold_pairs(float (&v)[ROOM][2], int pair) {
    const bool high = pair & DISTANCE;
#pragma unroll
    for (int o = 0; o < (COUNT + 1) / 2; o++)
#pragma unroll
        for (int g = 0; g < 2; g++) {
            const float low_half = v[o][g], high_half = v[COUNT > 1 ? o + COUNT / 2 : o][g];
            const float kept = high ? high_half : low_half, sent = high ? low_half : high_half;
            v[o][g] = fn_add(kept, __shfl_xor_sync(0xffffffffu, sent, DISTANCE * 4));
        }
}

/* ---- a block's outputs ------------------------------------------------------------------------------------------- */

template <int ROW_WARPS, int COLUMN_WARPS, typename ROW_SHARE, int ROWS_OWN, typename COLUMN_SHARE, int COLUMNS_OWN>
struct fn_fma_outputs {
    static constexpr int WARPS = ROW_WARPS * COLUMN_WARPS, THREADS = WARPS * FN_WARP;
    static constexpr int ROWS = ROW_WARPS * ROW_SHARE::ALL, COLUMNS = COLUMN_WARPS * COLUMN_SHARE::ALL;
    static constexpr int OUTPUTS = ROWS_OWN * COLUMNS_OWN, SUMS = OUTPUTS > FN_FMA_PAIRS ? OUTPUTS / FN_FMA_PAIRS : 1;
    static constexpr int NEIGHBOURS = COLUMN_SHARE::NEIGHBOURS;
    static_assert(OUTPUTS >= FN_FMA_PAIRS ? OUTPUTS % FN_FMA_PAIRS == 0 : OUTPUTS == 4, "the fold of pairs");
    static_assert(SUMS <= FN_MM_FMA_MOST_BLOCKS, "a cluster's exchange");
    static constexpr bool IN_GROUPS = SUMS == FN_GROUP && COLUMNS_OWN == FN_GROUP; /* a thread's sums are of one row */

    /* In shared memory: what the blocks of a cluster send each other. A thread gets from the threads with its number, a
     * warp waits at a barrier of its own. Two rooms take turns: who sends for the second time after this one has had
     * what this warp sent in between, after it had read the room. */
    struct mail {
        float room[2][FN_MM_FMA_MOST_BLOCKS][THREADS];
        uint64_t all_here[2][WARPS];
    };

    /* By one thread; before any block sends, all must know of it. */
    FN_DEVICE void open_mail(mail &here) {
        for (int i = 0; i < 2 * WARPS; i++) fn_barrier_init(shared_at(&here.all_here[i / WARPS][i % WARPS]), 1);
    }

    /* sum[e] = the chunk's sum of this thread's output e. The lanes start again. */
    FN_DEVICE void fold(float (&lane)[OUTPUTS][2], int pair, float (&sum)[SUMS]) {
        fold_pairs<OUTPUTS, 4>(lane, pair);
        fold_pairs<(OUTPUTS + 1) / 2, 2>(lane, pair);
        fold_pairs<(OUTPUTS + 3) / 4, 1>(lane, pair);
#pragma unroll
        for (int e = 0; e < SUMS; e++) sum[e] = fn_add(lane[e][0], lane[e][1]);
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) lane[o][0] = lane[o][1] = 0;
    }

    /* Adds a round's chunks, one from each block: to total[i], the sum that is output i * blocks + rank of the
     * thread's. `turn` counts the rounds of all tiles. A block that has no chunk, or nothing to send to another, sends
     * whatever it has: so that none is two turns ahead. */
    FN_DEVICE void exchange(const fn_fma_out &to, mail &here, const float (&sum)[SUMS], int rank, int64_t round,
                            uint32_t turn, float (&total)[SUMS]) {
        const int blocks = 1 << to.cluster_bits, own = (SUMS + blocks - 1) >> to.cluster_bits, thread = threadIdx.x;
        const int64_t chunks = (to.k - round + FN_MM_CHUNK - 1) / FN_MM_CHUNK;
        const uint32_t barrier = shared_at(&here.all_here[turn % 2][thread / FN_WARP]);
        float(&room)[FN_MM_FMA_MOST_BLOCKS][THREADS] = here.room[turn % 2];
#pragma unroll
        for (int e = 0; e < FN_MM_FMA_MOST_BLOCKS; e++) {
            if (e >= SUMS && e >= blocks) break;
            const uint32_t owner = e & (blocks - 1),
                           there = shared_at(&room[rank * own + (e >> to.cluster_bits)][thread]);
            fn_send(fn_address_in_block(there, owner), sum[e < SUMS ? e : 0], fn_address_in_block(barrier, owner));
        }
        if (thread % FN_WARP == 0) fn_barrier_expect(barrier, blocks * own * FN_WARP * (int)sizeof(float));
        fn_barrier_wait_for_cluster(barrier, turn / 2 % 2);
#pragma unroll
        for (int i = 0; i < (SUMS + 1) / 2; i++) {
            if (i >= own) break;
            if (round == 0) total[i] = room[i][thread];
            for (int block = round == 0; block < blocks && block < chunks; block++)
                total[i] = fn_add(total[i], room[block * own + i][thread]);
        }
    }

    /* Adds the bias, rounds, writes. (first_row, first_column): this thread's first output;
     * `here`: a room that nobody sends to. */
    FN_DEVICE void finish(const fn_fma_out &to, float (&here)[FN_MM_FMA_MOST_BLOCKS][THREADS], int64_t first_row,
                          int64_t first_column, int pair, int rank, const float (&total)[SUMS]) {
        const int blocks = 1 << to.cluster_bits, first = pair * OUTPUTS / FN_FMA_PAIRS, thread = threadIdx.x;
        if (OUTPUTS < FN_FMA_PAIRS && pair % (FN_FMA_PAIRS / OUTPUTS)) return; /* others have the same sums */
        const int64_t whole_row = first_row + ROW_SHARE::part_of(first / COLUMNS_OWN);
        const bool whole = IN_GROUPS && to.whole_groups && blocks == 1 && whole_row < to.rows &&
                           first_column + COLUMN_SHARE::part_of(FN_GROUP - 1) < to.columns;
        /* By way of shared memory, so that one copy of the code does for all. */
#pragma unroll
        for (int e = 0; e < SUMS; e++) here[e][thread] = total[e];
#pragma unroll 1
        for (int e = blocks == 1 ? 0 : rank, i = 0; e < SUMS; e += blocks, i++) {
            const int64_t row = first_row + ROW_SHARE::part_of((first + e) / COLUMNS_OWN);
            const int64_t column = first_column + COLUMN_SHARE::part_of((first + e) % COLUMNS_OWN);
            if (row >= to.rows || column >= to.columns) continue;
            float v = here[i][thread];
            if (to.bias)
                v = fn_add(v,
                           load_element(to.bias + row * to.bias_stride[0] + column * to.bias_stride[1], to.bias_dtype));
            if (whole) here[i][thread] = v;
            else store_element(to.out + row * to.out_stride[0] + column * to.out_stride[1], v, to.out_dtype);
        }
        if constexpr (IN_GROUPS) {
            float group[FN_GROUP];
            if (!whole) return;
#pragma unroll
            for (int e = 0; e < FN_GROUP; e++) group[e] = here[e][thread];
            char *const at = to.out + whole_row * to.out_stride[0] + first_column * to.out_stride[1];
            const fn_raw<FN_ANY> raw = fn_narrow<FN_ANY>(group, to.out_dtype);
            if constexpr (NEIGHBOURS == FN_GROUP) {
                fn_store<FN_ANY>(at, raw, to.out_dtype);
            } else {
                static_assert(NEIGHBOURS == FN_GROUP / 2, "");
                char *const further = at + COLUMN_SHARE::part_of(NEIGHBOURS) * to.out_stride[1];
                if (to.out_dtype == FN_FLOAT32) {
                    *(uint4 *)at = raw.v[0];
                    *(uint4 *)further = raw.v[1];
                } else {
                    *(uint2 *)at = make_uint2(raw.v[0].x, raw.v[0].y);
                    *(uint2 *)further = make_uint2(raw.v[0].z, raw.v[0].w);
                }
            }
        }
    }
};

#endif
