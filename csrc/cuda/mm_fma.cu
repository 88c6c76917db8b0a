/* mm_fma.cu: the product by fused multiply-adds, for any dtypes, strides and alignments, with the bits of the CPU's.
 *
 * The contract (csrc/cpu/mm_dtype_scalar.c) has 16 lanes for each output, so a warp holds 16 numbers for each: lane
 * pair p of 8 (lanes 2p and 2p + 1) belongs to the threads with threadIdx / 4 % 8 = p, the 4 threads of a pair have
 * different outputs. A thread adds up ROWS_OWN x COLUMNS_OWN outputs, 2 lanes each; at a chunk's end the pairs
 * exchange what they have, so that each is left with the sums of an eighth of the outputs.
 *
 * The 2 lanes are neighbours along k: operands lie in shared memory as in memory, and rows of fp32 are copied there
 * asynchronously, STAGES - 1 tiles ahead. Others pass through registers, one tile ahead, and are widened on the way.
 *
 * The blocks of a cluster may share a tile: they take turns at the chunks, whose sums are then added in order.
 */
#include "mm_fma.cuh"

enum { PAIRS = 8 };

/* ---- where a thread's outputs are -------------------------------------------------------------------------------- */

/* OWN rows (or columns) in each of PLACES threads, NEIGHBOURS of them side by side. */
template <int OWN, int PLACES> struct fn_mm_share {
    static constexpr int NEIGHBOURS = PLACES == 2 && OWN == 4 ? 2 : OWN;
    static constexpr int ALL = OWN * PLACES;
    FN_DEVICE constexpr int part_of(int i) { return i / NEIGHBOURS * NEIGHBOURS * PLACES + i % NEIGHBOURS; }
    FN_DEVICE constexpr int part_of_place(int place) { return place * NEIGHBOURS; }
};

/* One operand's elements of a thread, in a tile with rows of K elements. */
template <int OWN, int PLACES, int K> struct fn_mm_reader {
    typedef fn_mm_share<OWN, PLACES> share;
    uint32_t offset; /* of lanes 2p and 2p + 1, first step, first row */

    FN_MEMBER void start(int first_row, int place, int pair) {
        const int row = first_row + share::part_of_place(place);
        offset = row * K * 4 + ((pair * 8) ^ (fn_swizzle(row) * 16));
    }

    /* Where a thread's rows are in a tile: the swizzle of a row and of the second of two steps change bits 5 and 6. */
    struct cursor {
        const char *at[4];
        FN_MEMBER float2 read(int i, int s) const {
            const int row = share::part_of(i), v = fn_swizzle(row) / 2 ^ s % 2 * 2;
            return *(const float2 *)(at[v] + row * K * 4 + s / 2 * 128);
        }
    };

    FN_MEMBER cursor in(const char *memory, uint32_t tile) const {
        const uint32_t first = tile + offset;
        return {{memory + first, memory + (first ^ 32), memory + (first ^ 64), memory + (first ^ 96)}};
    }
};

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

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

template <int ROW_WARPS, int COLUMN_WARPS, int ROW_PLACES, int ROWS_OWN, int COLUMNS_OWN, int K, int STAGES,
          int RESIDENT_BLOCKS>
struct fn_mm_fma {
    static constexpr int COLUMN_PLACES = 4 / ROW_PLACES, THREADS = ROW_WARPS * COLUMN_WARPS * FN_WARP;
    typedef fn_mm_share<ROWS_OWN, ROW_PLACES> row_share;
    typedef fn_mm_share<COLUMNS_OWN, COLUMN_PLACES> column_share;
    static constexpr int ROWS = ROW_WARPS * row_share::ALL, COLUMNS = COLUMN_WARPS * column_share::ALL;
    typedef fn_mm_source<ROWS, K, THREADS> row_source;
    typedef fn_mm_source<COLUMNS, K, THREADS> column_source;
    typedef fn_mm_reader<ROWS_OWN, ROW_PLACES, K> row_reader;
    typedef fn_mm_reader<COLUMNS_OWN, COLUMN_PLACES, K> column_reader;
    static constexpr int STAGE = row_source::BYTES + column_source::BYTES, STEPS = K / FN_MM_LANES, TILE_K = K;
    static constexpr int RESIDENT = RESIDENT_BLOCKS;
    static constexpr int OUTPUTS = ROWS_OWN * COLUMNS_OWN, SUMS = OUTPUTS > PAIRS ? OUTPUTS / PAIRS : 1;
    static_assert(OUTPUTS >= PAIRS ? OUTPUTS % PAIRS == 0 : OUTPUTS == 4, "the fold of pairs");
    static_assert(SUMS <= FN_MM_FMA_MOST_BLOCKS, "a cluster's exchange");

    struct memory {
        char stage[STAGES * STAGE];
        float received[FN_MM_FMA_MOST_BLOCKS][THREADS];
    };

    FN_DEVICE void add_tile(const typename row_reader::cursor &rows, const typename column_reader::cursor &columns,
                            float (&lane)[OUTPUTS][2]) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            float2 a[ROWS_OWN];
#pragma unroll
            for (int i = 0; i < ROWS_OWN; i++) a[i] = rows.read(i, s);
#pragma unroll
            for (int j = 0; j < COLUMNS_OWN; j++) {
                const float2 b = columns.read(j, s);
#pragma unroll
                for (int i = 0; i < ROWS_OWN; i++) {
                    float(&acc)[2] = lane[i * COLUMNS_OWN + j];
                    acc[0] = fn_fma(a[i].x, b.x, acc[0]);
                    acc[1] = fn_fma(a[i].y, b.y, acc[1]);
                }
            }
        }
    }

    /* The contract pads a chunk with +0 to a whole step, which turns a lane of -0 to +0. The steps of a tile beyond
     * that must change nothing: they add -0 * +0 = -0. */
    FN_DEVICE void blank_steps(char *tile, int first_k) {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * K; i += THREADS)
            if (i % K >= first_k) *(float *)(tile + fn_mm_offset<K>({i / K, i % K})) = -0.0f;
        __syncthreads();
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

    FN_DEVICE int stage_after(int stage) { return stage == (STAGES - 1) * STAGE ? 0 : stage + STAGE; }

    /* Adds a round's chunks, one from each block: to total[i], the sum that is output i * blocks + rank of the
     * thread's. */
    FN_DEVICE void exchange(const fn_mm_fma_args &a, memory &shared, const float (&sum)[SUMS], int rank, int64_t round,
                            float (&total)[SUMS]) {
        const int blocks = 1 << a.cluster_bits, own = (SUMS + blocks - 1) >> a.cluster_bits, thread = threadIdx.x;
        const int64_t chunks = (a.k - round + FN_MM_CHUNK - 1) / FN_MM_CHUNK;
        fn_cluster_wait(); /* all have started, and read what they were sent before */
#pragma unroll
        for (int e = 0; e < SUMS; e++)
            if (rank < chunks)
                fn_put_in_block(shared_at(&shared.received[rank * own + (e >> a.cluster_bits)][thread]),
                                e & (blocks - 1), sum[e]);
        fn_cluster_arrive();
        fn_cluster_wait();
#pragma unroll
        for (int i = 0; i < (SUMS + 1) / 2; i++) {
            if (i >= own) break;
            if (round == 0) total[i] = shared.received[i][thread];
            for (int block = round == 0; block < blocks && block < chunks; block++)
                total[i] = fn_add(total[i], shared.received[block * own + i][thread]);
        }
        if (chunks > blocks) fn_cluster_arrive();
    }

    /* Adds the bias, rounds, writes. */
    FN_DEVICE void finish(const fn_mm_fma_args &a, memory &shared, int64_t first_row, int64_t first_column, int pair,
                          int rank, const float (&total)[SUMS]) {
        const int blocks = 1 << a.cluster_bits, first = pair * OUTPUTS / PAIRS, thread = threadIdx.x;
        if (OUTPUTS < PAIRS && pair % (PAIRS / OUTPUTS)) return; /* others have the same sums */
        const int64_t whole_row = first_row + row_share::part_of(first / COLUMNS_OWN);
        const bool whole = SUMS == FN_GROUP && COLUMNS_OWN == FN_GROUP && a.whole_groups && blocks == 1 &&
                           whole_row < a.rows.rows && first_column + FN_GROUP <= a.columns.rows;
        /* By way of shared memory, so that one copy of the code does for all. */
#pragma unroll
        for (int e = 0; e < SUMS; e++) shared.received[e][thread] = total[e];
#pragma unroll 1
        for (int e = blocks == 1 ? 0 : rank, i = 0; e < SUMS; e += blocks, i++) {
            const int64_t row = first_row + row_share::part_of((first + e) / COLUMNS_OWN);
            const int64_t column = first_column + column_share::part_of((first + e) % COLUMNS_OWN);
            if (row >= a.rows.rows || column >= a.columns.rows) continue;
            float v = shared.received[i][thread];
            if (a.bias)
                v = fn_add(v, load_element(a.bias + row * a.bias_stride[0] + column * a.bias_stride[1], a.bias_dtype));
            if (whole) shared.received[i][thread] = v;
            else store_element(a.out + row * a.out_stride[0] + column * a.out_stride[1], v, a.out_dtype);
        }
        if constexpr (SUMS == FN_GROUP && COLUMNS_OWN == FN_GROUP) {
            float group[FN_GROUP];
            if (!whole) return;
#pragma unroll
            for (int e = 0; e < FN_GROUP; e++) group[e] = shared.received[e][thread];
            fn_store<FN_ANY>(a.out + whole_row * a.out_stride[0] + first_column * a.out_stride[1],
                             fn_narrow<FN_ANY>(group, a.out_dtype), a.out_dtype);
        }
    }

    FN_DEVICE void run(const fn_mm_fma_args &a, memory &shared) {
        const int thread = threadIdx.x, warp = thread / FN_WARP, pair = thread / 4 % PAIRS;
        const int cluster = 1 << a.cluster_bits;
        const int row_place = thread % 4 / COLUMN_PLACES, column_place = thread % COLUMN_PLACES;
        const int warp_row = warp / COLUMN_WARPS * row_share::ALL;
        const int warp_column = warp % COLUMN_WARPS * column_share::ALL;
        const uint32_t tile = blockIdx.x >> a.cluster_bits;
        const int rank = (int)blockIdx.x & (cluster - 1);
        /* Tiles that are at work together share operands: a panel of row tiles goes through the columns. */
        const uint32_t panel_tiles = a.panel * a.column_tiles;
        const uint32_t panel = tile / panel_tiles, in_panel = tile % panel_tiles;
        const uint32_t panel_rows = min(a.panel, a.row_tiles - panel * a.panel);
        const int64_t first_row = (int64_t)(panel * a.panel + in_panel % panel_rows) * ROWS;
        const int64_t first_column = (int64_t)(in_panel / panel_rows) * COLUMNS;
        const int64_t first_k = (int64_t)rank * FN_MM_CHUNK;

        row_source row_side;
        column_source column_side;
        row_side.start(a.rows, first_row, first_k, a.k);
        column_side.start(a.columns, first_column, first_k, a.k);
        row_reader rows;
        column_reader columns;
        rows.start(warp_row, row_place, pair);
        columns.start(warp_column, column_place, pair);
        float lane[OUTPUTS][2], sum[SUMS], total[SUMS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) lane[o][0] = lane[o][1] = 0;
#pragma unroll
        for (int e = 0; e < SUMS; e++) sum[e] = total[e] = 0;
        const bool holds = a.rows.access == FN_MM_HELD || a.columns.access == FN_MM_HELD;
        int stage = 0, ahead = STAGES; /* of the tile to be added up now: where it lies, and how far off it still is */
        int tiles = 0, blank = 0; /* of the chunk; where in its last tile the steps begin that there are not, 0: none */
        const auto begin_chunk = [&](int64_t round) {
            const int64_t left = a.k - round - first_k;
            const int count = (int)max((int64_t)0, min(left, (int64_t)FN_MM_CHUNK));
            const int steps = (count + FN_MM_LANES - 1) / FN_MM_LANES;
            tiles = (steps + STEPS - 1) / STEPS;
            blank = steps % STEPS * FN_MM_LANES;
        };
        begin_chunk(0);

        if (cluster > 1) fn_cluster_arrive(); /* it has started: others may write here */
        wait_for_previous();
        for (int64_t round = 0; round < a.k;) {
            wait_for_copies<STAGES - 2>();
            __syncthreads(); /* the tile is there, and the one before it has been used */
            row_side.copy(a.rows, shared.stage + stage);
            column_side.copy(a.columns, shared.stage + stage + row_source::BYTES);
            close_copies();
            stage = stage_after(stage); /* before, it was the one that is free */
            if (ahead > 0) ahead--;
            if (holds) {
                char *const next_stage = shared.stage + stage_after(stage);
                if (ahead <= 1) {
                    row_side.put(a.rows, next_stage);
                    column_side.put(a.columns, next_stage + row_source::BYTES);
                }
                if (ahead <= 2) {
                    row_side.fetch(a.rows);
                    column_side.fetch(a.columns);
                }
            }
            if (ahead > 0) continue;
            if (tiles > 0) {
                if (--tiles == 0 && blank) blank_steps(shared.stage + stage, blank);
                add_tile(rows.in(shared.stage, stage), columns.in(shared.stage, stage + row_source::BYTES), lane);
                if (tiles > 0) continue;
                fold(lane, pair, sum);
            }
            if (cluster > 1) exchange(a, shared, sum, rank, round, total);
            else
#pragma unroll
                for (int e = 0; e < SUMS; e++) total[e] = round == 0 ? sum[e] : fn_add(total[e], sum[e]);
            round += (int64_t)cluster * FN_MM_CHUNK;
            begin_chunk(round);
        }
        wait_for_copies<0>(); /* of nothing, into what would soon be another block's */
        let_dependents_start();
        finish(a, shared, first_row + warp_row + row_share::part_of_place(row_place),
               first_column + warp_column + column_share::part_of_place(column_place), pair, rank, total);
    }
};

template <typename FMA>
static __global__ void __launch_bounds__(FMA::THREADS, FMA::RESIDENT) mm_fma(const __grid_constant__ fn_mm_fma_args a) {
    extern __shared__ __align__(128) char shared[];
    FMA::run(a, *(typename FMA::memory *)shared);
}

/* On an H200 (us, 4096 x 4096, M = 1, 16, 256): 20.8, 41.3, 287. With half the k in a tile 22.1, 45.3, 369. Half the outputs of a
 * thread, and twice the threads: 336 of the last. */
typedef fn_mm_fma<1, 4, 1, 4, 1, 256, 4, 2> few_rows;  /* 4 x 16 */
typedef fn_mm_fma<2, 2, 2, 4, 4, 128, 4, 3> some_rows; /* 16 x 16 */
typedef fn_mm_fma<2, 4, 2, 8, 8, 64, 3, 1> many_rows;  /* 32 x 64 */

#define FN_MM_FMA_KERNEL(FMA)                                                                                          \
    (const void *)mm_fma<FMA>, FMA::ROWS, FMA::COLUMNS, FMA::TILE_K, FMA::THREADS, FMA::RESIDENT,                      \
        (int)sizeof(typename FMA::memory)

extern const fn_mm_fma_kernel fn_mm_fma_kernels[FN_MM_FMA_KERNELS] = {
    {FN_MM_FMA_KERNEL(few_rows)}, {FN_MM_FMA_KERNEL(some_rows)}, {FN_MM_FMA_KERNEL(many_rows)}};
