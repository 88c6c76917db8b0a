/* mm_fma_many_sm90a.cu: the product by fused multiply-adds for many rows, on compute capability 9.0: operands side by side along
 * k, columns in fp32, rows in fp32 or 16 bits. The bits are those of mm_fma.cu.
 *
 * A warp that multiplies does little else: the copy engine brings boxes of 128 bytes a row, swizzled, into a ring of stages,
 * and a thread of a warpgroup of its own asks for them. A thread has 8 x 8 outputs and 2 lanes of each (mm_fma_sums.cuh): 16
 * reads of shared memory serve 128 multiply-adds.
 */
#include "hopper.cuh"
#include "mm_fma_sums.cuh"

static_assert(FN_FMA_MANY_K == 64 && FN_MM_LANES == 16, "4 steps; fn_fma_operand");

enum { FN_FMA_STEPS = FN_FMA_MANY_K / FN_MM_LANES, FN_FMA_OWN = 8, FN_FMA_PLACES = 2, FN_FMA_SIDE_BY_SIDE = 4 };
enum { FN_SUPPLIERS = 128 }; /* threads: a warpgroup, which gives its registers to the others */
typedef fn_mm_share<FN_FMA_OWN, FN_FMA_PLACES, FN_FMA_SIDE_BY_SIDE> fn_fma_share;

/* ---- a thread's elements of a stage ------------------------------------------------------------------------------ */

/* Rows of an operand in a stage. The engine has put unit u of 16 bytes of a box's row at u ^ row % 8. A thread's rows are
 * place * 4 + q, q < 4, and 8 further: bit 2 of their swizzle is the place, the others are q, which is known when this is
 * compiled. So the two places read different halves of 128 bytes, and no bank is met twice. */
template <fn_dtype D, int ROWS> struct fn_fma_operand {
    static constexpr bool WIDE = D == FN_FLOAT32;
    static constexpr int BOXES = WIDE ? 2 : 1, BOX_BYTES = ROWS * 128, BYTES = BOXES * BOX_BYTES;
    static constexpr int ADDRESSES = WIDE ? 4 : 2;

    uint32_t first[ADDRESSES]; /* in the first stage, of lanes 2 * pair and 2 * pair + 1 */

    FN_MEMBER void start(uint32_t stage, int row, int place, int pair) {
#pragma unroll
        for (int v = 0; v < ADDRESSES; v++) {
            const uint32_t unit = WIDE ? pair / 2 ^ v : pair / 4 ^ v, in_unit = WIDE ? pair % 2 * 8 : pair % 4 * 4;
            first[v] = stage + (row + place * FN_FMA_SIDE_BY_SIDE) * 128 + place * 64 + unit * 16 + in_unit;
        }
    }

    struct view {
        uint32_t at[2][ADDRESSES]; /* by bit 2 of a unit */

        FN_MEMBER float2 read(int i, int s) const {
            const int q = i % FN_FMA_SIDE_BY_SIDE, row = fn_fma_share::part_of(i);
            if constexpr (WIDE) {
                return load_two(at[s % 2][q] + s / 2 * BOX_BYTES + row * 128);
            } else {
                const uint32_t both = load_word(at[s / 2][q % 2] + (s % 2 ^ q / 2) * 32 + row * 128);
                float2 v;
                if constexpr (D == FN_BFLOAT16) fn_unpack2_bf16(both, &v.x, &v.y);
                else fn_unpack2_f16(both, &v.x, &v.y);
                return v;
            }
        }
    };

    FN_MEMBER view in(uint32_t stage) const {
        view found;
#pragma unroll
        for (int v = 0; v < ADDRESSES; v++) {
            found.at[0][v] = stage + first[v];
            found.at[1][v] = (stage + first[v]) ^ 64;
        }
        return found;
    }

    FN_DEVICE void load(uint32_t to, const CUtensorMap *map, int k, int row, uint32_t barrier) {
#pragma unroll
        for (int box = 0; box < BOXES; box++) fn_box_load(to + box * BOX_BYTES, map, k + box * (128 / 4), row, barrier);
    }
};

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

template <fn_dtype ROW_DTYPE, int ROW_WARPS, int COLUMN_WARPS, int STAGES_, int RESIDENT_BLOCKS> struct fn_fma_many {
    typedef fn_fma_outputs<ROW_WARPS, COLUMN_WARPS, fn_fma_share, FN_FMA_OWN, fn_fma_share, FN_FMA_OWN> outputs;
    static constexpr int ROWS = outputs::ROWS, COLUMNS = outputs::COLUMNS, WARPS = outputs::WARPS;
    static constexpr int THREADS = outputs::THREADS + FN_SUPPLIERS, STAGES = STAGES_, RESIDENT = RESIDENT_BLOCKS;
    static constexpr int REGISTERS = RESIDENT == 1 ? 240 : 232, SUPPLIER_REGISTERS = 24;
    static_assert((outputs::THREADS * REGISTERS + FN_SUPPLIERS * SUPPLIER_REGISTERS) * RESIDENT <= 65536, "");
    typedef fn_fma_operand<ROW_DTYPE, ROWS> row_operand;
    typedef fn_fma_operand<FN_FLOAT32, COLUMNS> column_operand;
    static constexpr int STAGE = row_operand::BYTES + column_operand::BYTES;

    struct memory {
        char stage[STAGES * STAGE];
        typename outputs::mail mail;
        uint64_t filled[STAGES], drained[STAGES];
    };
    static constexpr int SHARED = sizeof(memory) + 1024; /* the swizzle is by address: stages begin at multiples */
    static_assert(STAGE % 1024 == 0, "");

    struct position {
        uint32_t stage, parity;
        FN_MEMBER void next(void) {
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    };

    /* Asks for all tiles and chunks of this block. */
    FN_DEVICE void supply(const fn_fma_many_args &a, memory &shared, int rank, uint32_t tile, uint32_t stride) {
        position now = {0, 1};
        for (; tile < a.tiles; tile += stride) {
            const fn_fma_tile at = fn_fma_tile_at<ROWS, COLUMNS>(a.to, tile);
            for (int64_t chunk = (int64_t)rank * FN_MM_CHUNK; chunk < a.to.k;
                 chunk += (int64_t)FN_MM_CHUNK << a.to.cluster_bits) {
                const int end = (int)min(a.to.k, chunk + FN_MM_CHUNK);
#pragma unroll 1
                for (int k = (int)chunk; k < end; k += FN_FMA_MANY_K, now.next()) {
                    const uint32_t filled = shared_at(&shared.filled[now.stage]);
                    const uint32_t to = shared_at(shared.stage) + now.stage * STAGE;
                    fn_barrier_await(shared_at(&shared.drained[now.stage]), now.parity);
                    fn_barrier_expect(filled, STAGE);
                    row_operand::load(to, &a.rows, k, (int)at.row, filled);
                    column_operand::load(to + row_operand::BYTES, &a.columns, k, (int)at.column, filled);
                }
            }
        }
        let_dependents_start();
    }

    FN_DEVICE void add_step(const typename row_operand::view &rows, const typename column_operand::view &columns, int s,
                            float (&lane)[outputs::OUTPUTS][2]) {
        float2 a[FN_FMA_OWN];
#pragma unroll
        for (int i = 0; i < FN_FMA_OWN; i++) a[i] = rows.read(i, s);
            /* There and back, so that one operand stays where j changes: 112 of 896 multiply-adds then need a bank of registers
         * twice, 147 in one direction. */
#pragma unroll
        for (int j = 0; j < FN_FMA_OWN; j++) {
            const float2 b = columns.read(j, s);
#pragma unroll
            for (int n = 0; n < FN_FMA_OWN; n++) {
                const int i = j % 2 ? FN_FMA_OWN - 1 - n : n;
                float(&acc)[2] = lane[i * FN_FMA_OWN + j];
                acc[0] = fn_fma(a[i].x, b.x, acc[0]);
                acc[1] = fn_fma(a[i].y, b.y, acc[1]);
            }
        }
    }

    /* A stage's first `steps` steps. */
    FN_DEVICE void add_stage(const typename row_operand::view &rows, const typename column_operand::view &columns,
                             int steps, float (&lane)[outputs::OUTPUTS][2]) {
        if (steps >= FN_FMA_STEPS) {
#pragma unroll
            for (int s = 0; s < FN_FMA_STEPS; s++) add_step(rows, columns, s, lane);
        } else { /* those beyond the padded K would turn a lane of -0 to +0 */
            add_step(rows, columns, 0, lane);
            if (steps > 1) add_step(rows, columns, 1, lane);
            if (steps > 2) add_step(rows, columns, 2, lane);
        }
    }

    FN_DEVICE void multiply(const fn_fma_many_args &a, memory &shared, int warp, int rank, uint32_t first_tile,
                            uint32_t stride) {
        const int thread = threadIdx.x, pair = thread / 4 % FN_FMA_PAIRS, cluster = 1 << a.to.cluster_bits;
        const int row_place = thread % 4 / FN_FMA_PLACES, column_place = thread % FN_FMA_PLACES;
        const int warp_row = warp / COLUMN_WARPS * fn_fma_share::ALL;
        const int warp_column = warp % COLUMN_WARPS * fn_fma_share::ALL;
        row_operand rows;
        column_operand columns;
        rows.start(shared_at(shared.stage), warp_row, row_place, pair);
        columns.start(shared_at(shared.stage) + row_operand::BYTES, warp_column, column_place, pair);
        float lane[outputs::OUTPUTS][2], sum[outputs::SUMS], total[outputs::SUMS];
#pragma unroll
        for (int o = 0; o < outputs::OUTPUTS; o++) lane[o][0] = lane[o][1] = 0;
#pragma unroll
        for (int e = 0; e < outputs::SUMS; e++) sum[e] = total[e] = 0;
        position now = {0, 0};
        uint32_t turn = 0;

        for (uint32_t tile = first_tile; tile < a.tiles; tile += stride) {
            for (int64_t round = 0; round < a.to.k; round += (int64_t)cluster * FN_MM_CHUNK) {
                const int64_t left = a.to.k - round - (int64_t)rank * FN_MM_CHUNK;
                if (left > 0) {
                    int steps = ((int)min(left, (int64_t)FN_MM_CHUNK) + FN_MM_LANES - 1) / FN_MM_LANES;
#pragma unroll 1
                    for (; steps > 0; steps -= FN_FMA_STEPS, now.next()) {
                        fn_barrier_wait(shared_at(&shared.filled[now.stage]), now.parity);
                        add_stage(rows.in(now.stage * STAGE), columns.in(now.stage * STAGE), steps, lane);
                        __syncwarp();
                        if (thread % FN_WARP == 0) fn_barrier_arrive(shared_at(&shared.drained[now.stage]));
                    }
                    outputs::fold(lane, pair, sum);
                }
                if (cluster > 1) {
                    if (turn == 0) fn_cluster_wait();
                    outputs::exchange(a.to, shared.mail, sum, rank, round, turn++, total);
                } else {
#pragma unroll
                    for (int e = 0; e < outputs::SUMS; e++) total[e] = round == 0 ? sum[e] : fn_add(total[e], sum[e]);
                }
            }
            const fn_fma_tile at = fn_fma_tile_at<ROWS, COLUMNS>(a.to, tile);
            outputs::finish(a.to, shared.mail.room[(turn + 1) % 2],
                            at.row + warp_row + fn_fma_share::part_of_place(row_place),
                            at.column + warp_column + fn_fma_share::part_of_place(column_place), pair, rank, total);
        }
    }

    FN_DEVICE void run(const fn_fma_many_args &a, memory &shared) {
        const int thread = threadIdx.x, warp = __shfl_sync(0xffffffffu, thread / FN_WARP, 0);
        const int cluster = 1 << a.to.cluster_bits, rank = (int)blockIdx.x & (cluster - 1);
        const uint32_t first_tile = blockIdx.x >> a.to.cluster_bits, stride = gridDim.x >> a.to.cluster_bits;
        if (thread == outputs::THREADS) {
            fn_prefetch_map(&a.rows);
            fn_prefetch_map(&a.columns);
            for (int i = 0; i < STAGES; i++) {
                fn_barrier_init(shared_at(&shared.filled[i]), 1);
                fn_barrier_init(shared_at(&shared.drained[i]), WARPS);
            }
            outputs::open_mail(shared.mail);
            fn_barrier_fence();
        }
        __syncthreads();
        if (cluster > 1) fn_cluster_arrive(); /* others may send */
        wait_for_previous();
        if (warp < WARPS) {
            fn_registers_up<REGISTERS>();
            multiply(a, shared, warp, rank, first_tile, stride);
        } else {
            fn_registers_down<SUPPLIER_REGISTERS>();
            if (thread == outputs::THREADS) supply(a, shared, rank, first_tile, stride);
            __syncwarp();
            if (cluster > 1) fn_cluster_wait();
        }
    }
};

template <typename MANY>
static __global__ void __launch_bounds__(MANY::THREADS, MANY::RESIDENT)
    mm_fma_many(const __grid_constant__ fn_fma_many_args a) {
    extern __shared__ char memory[];
    const uint32_t at = shared_at(memory);
    MANY::run(a, *(typename MANY::memory *)(memory + ((at + 1023) & ~1023u) - at));
}

/* On an H200 (us, 4096 x 4096, M = 256): rows of fp32 224 and 218, of bfloat16 249 and 256; mm_fma.cu 287. A thread of the
 * multiplying warps that asks for operands besides: 285, for the others wait for it. One that asks whether a stage is free over
 * and over, instead of sleeping until it is: up to 3 % more. */
template <fn_dtype D> using fn_fma_wide = fn_fma_many<D, 2, 4, 8, 1>;   /* 32 x 64 */
template <fn_dtype D> using fn_fma_narrow = fn_fma_many<D, 2, 2, 6, 2>; /* 32 x 32 */

#define FN_FMA_MANY(KERNEL)                                                                                            \
    {(const void *)mm_fma_many<KERNEL>,                                                                                \
     KERNEL::ROWS,                                                                                                     \
     KERNEL::COLUMNS,                                                                                                  \
     FN_FMA_MANY_K,                                                                                                    \
     KERNEL::THREADS,                                                                                                  \
     KERNEL::RESIDENT,                                                                                                 \
     KERNEL::SHARED}

extern const fn_mm_fma_kernel fn_fma_many_kernels[FN_DTYPE_COUNT][FN_FMA_MANY_KERNELS] = {
    {FN_FMA_MANY(fn_fma_wide<FN_FLOAT32>), FN_FMA_MANY(fn_fma_narrow<FN_FLOAT32>)},
    {FN_FMA_MANY(fn_fma_wide<FN_FLOAT16>), FN_FMA_MANY(fn_fma_narrow<FN_FLOAT16>)},
    {FN_FMA_MANY(fn_fma_wide<FN_BFLOAT16>), FN_FMA_MANY(fn_fma_narrow<FN_BFLOAT16>)}};
