/* mm_fma.cu: the product by fused multiply-adds, for any dtypes, strides and alignments, with the bits of the CPU's.
 *
 * The 2 lanes of a thread (mm_fma_sums.cuh) are neighbours along k: operands lie in shared memory as in memory, and rows
 * of fp32 are copied there asynchronously, STAGES - 1 tiles ahead. Others pass through registers, one tile ahead, and are
 * widened on the way.
 */
#include "mm_fma.cuh"
#include "mm_fma_sums.cuh"

/* ---- where a thread's operands are ------------------------------------------------------------------------------- */

template <int OWN, int PLACES> using fn_mm_share_of = fn_mm_share<OWN, PLACES, PLACES == 2 && OWN == 4 ? 2 : OWN>;

/* One operand's elements of a thread, in a tile with rows of K elements. */
template <int OWN, int PLACES, int K> struct fn_mm_reader {
    typedef fn_mm_share_of<OWN, PLACES> share;
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

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

template <int ROW_WARPS, int COLUMN_WARPS, int ROW_PLACES, int ROWS_OWN, int COLUMNS_OWN, int K, int STAGES,
          int RESIDENT_BLOCKS>
struct fn_mm_fma {
    static constexpr int COLUMN_PLACES = 4 / ROW_PLACES;
    typedef fn_mm_share_of<ROWS_OWN, ROW_PLACES> row_share;
    typedef fn_mm_share_of<COLUMNS_OWN, COLUMN_PLACES> column_share;
    typedef fn_fma_outputs<ROW_WARPS, COLUMN_WARPS, row_share, ROWS_OWN, column_share, COLUMNS_OWN> outputs;
    static constexpr int THREADS = outputs::THREADS, ROWS = outputs::ROWS, COLUMNS = outputs::COLUMNS;
    typedef fn_mm_source<ROWS, K, THREADS> row_source;
    typedef fn_mm_source<COLUMNS, K, THREADS> column_source;
    typedef fn_mm_reader<ROWS_OWN, ROW_PLACES, K> row_reader;
    typedef fn_mm_reader<COLUMNS_OWN, COLUMN_PLACES, K> column_reader;
    static constexpr int STAGE = row_source::BYTES + column_source::BYTES, STEPS = K / FN_MM_LANES, TILE_K = K;
    static constexpr int RESIDENT = RESIDENT_BLOCKS;
    static constexpr int OUTPUTS = outputs::OUTPUTS, SUMS = outputs::SUMS;

    struct memory {
        char stage[STAGES * STAGE];
        typename outputs::mail mail;
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

    FN_DEVICE int stage_after(int stage) { return stage == (STAGES - 1) * STAGE ? 0 : stage + STAGE; }

    FN_DEVICE void run(const fn_mm_fma_args &a, memory &shared) {
        const int thread = threadIdx.x, warp = thread / FN_WARP, pair = thread / 4 % FN_FMA_PAIRS;
        const int cluster = 1 << a.to.cluster_bits;
        const int row_place = thread % 4 / COLUMN_PLACES, column_place = thread % COLUMN_PLACES;
        const int warp_row = warp / COLUMN_WARPS * row_share::ALL;
        const int warp_column = warp % COLUMN_WARPS * column_share::ALL;
        const int rank = (int)blockIdx.x & (cluster - 1);
        const fn_fma_tile first = fn_fma_tile_at<ROWS, COLUMNS>(a.to, blockIdx.x >> a.to.cluster_bits);
        const int64_t first_k = (int64_t)rank * FN_MM_CHUNK;

        row_source row_side;
        column_source column_side;
        row_side.start(a.rows, first.row, first_k, a.to.k);
        column_side.start(a.columns, first.column, first_k, a.to.k);
        row_reader rows;
        column_reader columns;
        rows.start(warp_row, row_place, pair);
        columns.start(warp_column, column_place, pair);
        float lane[OUTPUTS][2], sum[SUMS], total[SUMS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) lane[o][0] = lane[o][1] = 0;
#pragma unroll
        for (int e = 0; e < SUMS; e++) sum[e] = total[e] = 0;
        uint32_t turn = 0;
        const bool holds = a.rows.access == FN_MM_HELD || a.columns.access == FN_MM_HELD;
        int stage = 0, ahead = STAGES; /* of the tile to be added up now: where it lies, and how far off it still is */
        int tiles = 0, blank = 0; /* of the chunk; where in its last tile the steps begin that there are not, 0: none */
        const auto begin_chunk = [&](int64_t round) {
            const int64_t left = a.to.k - round - first_k;
            const int count = (int)max((int64_t)0, min(left, (int64_t)FN_MM_CHUNK));
            const int steps = (count + FN_MM_LANES - 1) / FN_MM_LANES;
            tiles = (steps + STEPS - 1) / STEPS;
            blank = steps % STEPS * FN_MM_LANES;
        };
        begin_chunk(0);

        if (cluster > 1) {
            if (thread == 0) {
                outputs::open_mail(shared.mail);
                fn_barrier_fence();
            }
            __syncthreads();
            fn_cluster_arrive(); /* others may send */
        }
        wait_for_previous();
        for (int64_t round = 0; round < a.to.k;) {
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
                outputs::fold(lane, pair, sum);
            }
            if (cluster > 1) {
                if (round == 0) fn_cluster_wait();
                outputs::exchange(a.to, shared.mail, sum, rank, round, turn++, total);
            } else {
#pragma unroll
                for (int e = 0; e < SUMS; e++) total[e] = round == 0 ? sum[e] : fn_add(total[e], sum[e]);
            }
            round += (int64_t)cluster * FN_MM_CHUNK;
            begin_chunk(round);
        }
        wait_for_copies<0>(); /* of nothing, into what would soon be another block's */
        let_dependents_start();
#if __CUDA_ARCH__ >= 1000 /* whose code has no register left to keep it in */
        const fn_fma_tile at = fn_fma_tile_at<ROWS, COLUMNS>(a.to, blockIdx.x >> a.to.cluster_bits);
#else
        const fn_fma_tile at = first;
#endif
        outputs::finish(a.to, shared.mail.room[(turn + 1) % 2], at.row + warp_row + row_share::part_of_place(row_place),
                        at.column + warp_column + column_share::part_of_place(column_place), pair, rank, total);
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
