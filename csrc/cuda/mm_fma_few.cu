/* mm_fma_few.cu: products of few tokens with weights in fp32, with the bits of the CPU's.
 *
 * What takes time here is reading the weights, so they are on their way from the first moment to the last. A warp has
 * 8 weights, or 8 OWN, and copies their rows into a ring of its own, STAGES stages of 256 k ahead: no other warp is
 * waited for. Of a weight's 16 lanes of k a thread has 4 neighbours: those of its quarter, for OWN weights and all
 * tokens of the block; so it reads units of 16 bytes, and there are 4 TOKENS OWN sums that do not wait for each other.
 * At a chunk's end the quarters fold their lanes, and each keeps the sums of a quarter of the outputs.
 *
 * Tokens are the block's: a chunk of them at a time, widened to fp32, the next one on its way behind the weights.
 *
 * The blocks of a cluster take turns at the chunks. Their sums go to the first one, which adds them in order.
 *
 * Moves: the weights once for every TOKENS tokens; the tokens once for every block's weights; out once.
 */
#include "cluster.cuh"
#include "dependents.cuh"
#include "element.cuh"
#include "launch.h"
#include "mm_fma.h"

enum {
    FN_FEW_UNIT = 16, /* bytes */
    FN_FEW_QUARTERS = 4,
    FN_FEW_TEAMS = FN_WARP / FN_FEW_QUARTERS, /* of threads with the same weights */
    FN_FEW_STEPS = 16,                        /* of a stage, of 16 k each */
    FN_FEW_STAGE_K = FN_FEW_STEPS * FN_MM_LANES,
    FN_FEW_ROW = FN_FEW_STAGE_K * 4,                    /* bytes of a weight in a stage */
    FN_FEW_HALF = FN_WARP * FN_FEW_UNIT,                /* of which a warp copies so many at once */
    FN_FEW_HALF_K = FN_FEW_HALF / 4,                    /* elements */
    FN_FEW_CHUNK_STAGES = FN_MM_CHUNK / FN_FEW_STAGE_K, /* of a whole chunk */
    FN_FEW_TOKEN = FN_MM_CHUNK * 4,                     /* bytes of a token's chunk */
    FN_FEW_TOKEN_UNITS = FN_FEW_TOKEN / FN_FEW_UNIT,    /* as fp32; of 16 bits half as many */
    FN_FEW_WIDE_UNIT = 2 * FN_FEW_UNIT,                 /* what a unit of 16 bits becomes */
};
static_assert(2 * FN_FEW_HALF == FN_FEW_ROW && FN_FEW_QUARTERS * 4 == FN_MM_LANES,
              "two copies a row, units of 4 lanes");

/* ---- weights ----------------------------------------------------------------------------------------------------- */

/* Unit u of row r lies at u ^ r % 8: 8 rows' units of the same k lie in 8 different groups of banks. */
FN_DEVICE uint32_t few_unit(int row, int unit) { return row * FN_FEW_ROW + (unit ^ row % FN_FEW_TEAMS) * FN_FEW_UNIT; }

/* What a warp copies, stage after stage; a lane has a unit of each half row. */
template <int ROWS, int STAGES> struct fn_few_weights {
    const char *from; /* the lane's unit of the first row, in the next stage */
    int64_t left;     /* of k, from the next stage on */
    int64_t stride;
    int rows;      /* that there are */
    int stage;     /* the next one, of its chunk */
    int skipped;   /* chunks that other blocks have, between two of this one's */
    uint32_t slot; /* of the ring, in bytes: the next one */
    uint32_t lane, ring;

    FN_MEMBER void start(const fn_fma_few_args &a, int64_t first_row, int rank, uint32_t to) {
        lane = threadIdx.x % FN_WARP;
        rows = (int)max((int64_t)0, min(a.weights.rows - first_row, (int64_t)ROWS));
        stride = a.weights.row_stride;
        const int64_t k = (int64_t)rank * FN_MM_CHUNK;
        from = a.weights.data + (rows ? first_row : 0) * stride + k * 4 + lane * FN_FEW_UNIT;
        left = a.k - k;
        stage = 0, skipped = a.cluster - 1;
        slot = 0, ring = to;
    }

    /* Queues the next stage, if there is one. What lies outside of the operand becomes +0. */
    FN_MEMBER void copy() {
        if (left > 0) {
            const int first = left > lane * 4 ? FN_FEW_UNIT : 0,
                      second = left > FN_FEW_HALF_K + lane * 4 ? FN_FEW_UNIT : 0;
            const char *at = from;
#pragma unroll
            for (int r = 0; r < ROWS; r++, at += stride) {
                const uint32_t to = ring + slot + few_unit(r, lane);
                copy_part_async<FN_FEW_UNIT>(to, at, r < rows ? first : 0);
                copy_part_async<FN_FEW_UNIT>(to + FN_FEW_HALF, at + FN_FEW_HALF, r < rows ? second : 0);
            }
            from += FN_FEW_ROW;
            left -= FN_FEW_STAGE_K;
            if (++stage == FN_FEW_CHUNK_STAGES) {
                stage = 0;
                from += (int64_t)skipped * FN_MM_CHUNK * 4;
                left -= (int64_t)skipped * FN_MM_CHUNK;
            }
            slot = slot == (STAGES - 1) * ROWS * FN_FEW_ROW ? 0 : slot + ROWS * FN_FEW_ROW;
        }
        close_copies();
    }
};

/* ---- tokens ------------------------------------------------------------------------------------------------------ */

/* A chunk of the block's tokens, from k on: fp32 to where it is used; a unit of 16 bits to the second half of the place
 * that it takes when it is widened, by the thread that copied it. What there is not becomes +0. */
template <int TOKENS> struct fn_few_tokens {
    const char *from; /* of the block's first token */
    int64_t stride, k_end;
    int rows;
    fn_dtype dtype;

    FN_MEMBER void copy(char *to, int64_t k) const {
        if (dtype == FN_FLOAT32)
#pragma unroll 4
            for (int i = threadIdx.x; i < TOKENS * FN_FEW_TOKEN_UNITS; i += blockDim.x) {
                const int row = i / FN_FEW_TOKEN_UNITS;
                const int64_t at = k + i % FN_FEW_TOKEN_UNITS * 4;
                copy_part_async<FN_FEW_UNIT>(shared_at(to) + i * FN_FEW_UNIT, from + row * stride + at * 4,
                                             row < rows && at < k_end ? FN_FEW_UNIT : 0);
            }
        else
#pragma unroll 4
            for (int i = threadIdx.x; i < TOKENS * FN_FEW_TOKEN_UNITS / 2; i += blockDim.x) {
                const int row = i / (FN_FEW_TOKEN_UNITS / 2);
                const int64_t at = k + i % (FN_FEW_TOKEN_UNITS / 2) * 8;
                copy_part_async<FN_FEW_UNIT>(shared_at(to) + i * FN_FEW_WIDE_UNIT + FN_FEW_UNIT,
                                             from + row * stride + at * 2, row < rows && at < k_end ? FN_FEW_UNIT : 0);
            }
    }

    FN_MEMBER void widen(char *at) const {
        if (dtype == FN_FLOAT32) return;
#pragma unroll 2
        for (int i = threadIdx.x; i < TOKENS * FN_FEW_TOKEN_UNITS / 2; i += blockDim.x) {
            char *const place = at + i * FN_FEW_WIDE_UNIT;
            fn_raw<FN_BFLOAT16> raw;
            float f[FN_GROUP];
            raw.v[0] = *(const uint4 *)(place + FN_FEW_UNIT);
            if (dtype == FN_BFLOAT16) fn_widen<FN_BFLOAT16>(raw, f, FN_BFLOAT16);
            else fn_widen<FN_FLOAT16>({{raw.v[0]}}, f, FN_FLOAT16);
            *(float4 *)place = make_float4(f[0], f[1], f[2], f[3]);
            *(float4 *)(place + FN_FEW_UNIT) = make_float4(f[4], f[5], f[6], f[7]);
        }
    }
};

/* ---- sums -------------------------------------------------------------------------------------------------------- */

/* a lane of k each: lane[i] = fn_fma(a[i], b[i], lane[i]) */
FN_DEVICE void few_fma(const float4 &a, const float4 &b, float4 &lane) {
    lane.x = fn_fma(a.x, b.x, lane.x), lane.y = fn_fma(a.y, b.y, lane.y);
    lane.z = fn_fma(a.z, b.z, lane.z), lane.w = fn_fma(a.w, b.w, lane.w);
}

/* One halving, with the thread DISTANCE further. COUNT outputs become half as many, as long as there are two. */
template <int COUNT, int DISTANCE, int ROOM> FN_DEVICE void few_halve(float4 (&v)[ROOM], bool high) {
#pragma unroll
    for (int o = 0; o < (COUNT + 1) / 2; o++) {
        const float4 other = v[COUNT > 1 ? o + COUNT / 2 : o];
        const float4 kept = high ? other : v[o], sent = high ? v[o] : other;
        v[o].x = fn_add(kept.x, __shfl_xor_sync(0xffffffffu, sent.x, DISTANCE));
        v[o].y = fn_add(kept.y, __shfl_xor_sync(0xffffffffu, sent.y, DISTANCE));
        v[o].z = fn_add(kept.z, __shfl_xor_sync(0xffffffffu, sent.z, DISTANCE));
        v[o].w = fn_add(kept.w, __shfl_xor_sync(0xffffffffu, sent.w, DISTANCE));
    }
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

template <int TOKENS, int OWN, int STAGES> struct fn_fma_few {
    static constexpr int ROWS = FN_FEW_TEAMS * OWN, STAGE = ROWS * FN_FEW_ROW, RING = STAGES * STAGE;
    static constexpr int OUTPUTS = TOKENS * OWN, SUMS = OUTPUTS > FN_FEW_QUARTERS ? OUTPUTS / FN_FEW_QUARTERS : 1;
    static constexpr int WRITERS = OUTPUTS < FN_FEW_QUARTERS ? OUTPUTS : FN_FEW_QUARTERS; /* of a team */
    static_assert(STAGES <= FN_FEW_CHUNK_STAGES, "a chunk's tokens come in the groups of the chunk before it");
    static_assert(SUMS <= TOKENS && TOKENS % SUMS == 0, "a thread's sums are of one weight");

    /* One thread's operands: of its first weight in a stage, steps of an even number and of an odd one; of the first
     * token. */
    struct reader {
        const char *even, *odd, *tokens;

        FN_MEMBER void add(int step, float4 (&lane)[OUTPUTS]) const {
            const char *const weights = (step % 2 ? odd : even) + step / 2 * (2 * FN_MM_LANES * 4);
            float4 w[OWN];
#pragma unroll
            for (int o = 0; o < OWN; o++) w[o] = *(const float4 *)(weights + o * FN_FEW_TEAMS * FN_FEW_ROW);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                const float4 x = *(const float4 *)(tokens + t * FN_FEW_TOKEN + step * (FN_MM_LANES * 4));
#pragma unroll
                for (int o = 0; o < OWN; o++) few_fma(x, w[o], lane[o * TOKENS + t]);
            }
        }
    };

    /* The contract pads a chunk to a whole step, which turns a lane of -0 to +0. Steps beyond that are not made. */
    FN_DEVICE void add_stage(const reader &from, int steps, float4 (&lane)[OUTPUTS]) {
        if (steps >= FN_FEW_STEPS)
#pragma unroll
            for (int s = 0; s < FN_FEW_STEPS; s++) from.add(s, lane);
        else
#pragma unroll 1
            for (int s = 0; s < steps; s++) from.add(s, lane);
    }

    /* sum[e] = the chunk's sum of this thread's output e. The lanes start again. */
    FN_DEVICE void fold(float4 (&lane)[OUTPUTS], int quarter, float (&sum)[SUMS]) {
        few_halve<OUTPUTS, 2 * FN_FEW_TEAMS>(lane, quarter & 2);
        few_halve<(OUTPUTS + 1) / 2, FN_FEW_TEAMS>(lane, quarter & 1);
#pragma unroll
        for (int e = 0; e < SUMS; e++) sum[e] = fn_add(fn_add(lane[e].x, lane[e].z), fn_add(lane[e].y, lane[e].w));
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) lane[o] = make_float4(0, 0, 0, 0);
    }

    FN_DEVICE void run(const fn_fma_few_args &a, char *shared) {
        const int thread = threadIdx.x, warp = thread / FN_WARP, warps = blockDim.x / FN_WARP;
        const int team = thread % FN_FEW_TEAMS, quarter = thread % FN_WARP / FN_FEW_TEAMS;
        const int rank = blockIdx.x % a.cluster;
        const uint32_t number = blockIdx.x / a.cluster; /* of the cluster: those with the same weights side by side */
        const int64_t first_token = (int64_t)(number % a.groups) * TOKENS;
        const int64_t first_row = ((int64_t)(number / a.groups) * warps + warp) * ROWS;
        const int64_t round_k = (int64_t)a.cluster * FN_MM_CHUNK;
        const int chunks = (int)((a.k + FN_MM_CHUNK - 1) / FN_MM_CHUNK); /* looked at in clusters alone: there few */
        char *const ring = shared + warp * RING, *const token_room = shared + warps * RING;
        float *const received = (float *)(token_room + a.token_rooms * (TOKENS * FN_FEW_TOKEN)) + thread;
        const uint32_t barrier = shared_at(received - thread) + chunks * SUMS * blockDim.x * 4;

        fn_few_weights<ROWS, STAGES> weights;
        weights.start(a, first_row, rank, shared_at(ring));
        const fn_few_tokens<TOKENS> tokens = {a.tokens.data + first_token * a.tokens.row_stride, a.tokens.row_stride,
                                              a.k, (int)min(a.tokens.rows - first_token, (int64_t)TOKENS),
                                              a.token_dtype};

        if (a.cluster > 1) {
            if (rank == 0 && thread == 0) {
                fn_barrier_init(barrier, 1);
                fn_barrier_fence();
                fn_barrier_expect(barrier, chunks * SUMS * (blockDim.x / FN_FEW_QUARTERS * WRITERS) * 4);
            }
            __syncwarp();
            fn_cluster_arrive_relaxed(); /* it has started: others may write here */
        }
        if (a.early)
#pragma unroll 1
            for (int s = 0; s < STAGES; s++) weights.copy();
        wait_for_previous();
        tokens.copy(token_room, (int64_t)rank * FN_MM_CHUNK);
        close_copies();
        if (!a.early)
#pragma unroll 1
            for (int s = 0; s < STAGES; s++) weights.copy();

        /* This thread's outputs: one weight, SUMS tokens. The bias comes while the operands do. */
        const int first = quarter / 2 * (OUTPUTS / 2) + quarter % 2 * (OUTPUTS / 4);
        const bool writes = quarter % (FN_FEW_QUARTERS / WRITERS) == 0; /* others have the same sums */
        const int64_t row = first_row + first / TOKENS * FN_FEW_TEAMS + team, token = first_token + first % TOKENS;
        float bias[SUMS], total[SUMS], sum[SUMS];
#pragma unroll
        for (int e = 0; e < SUMS; e++) {
            bias[e] = total[e] = 0;
            if (a.bias && rank == 0 && writes && row < a.weights.rows && token + e < a.tokens.rows)
                bias[e] =
                    load_element(a.bias + row * a.bias_weight_stride + (token + e) * a.bias_token_stride, a.bias_dtype);
        }

        float4 lane[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) lane[o] = make_float4(0, 0, 0, 0);
        const uint32_t own = few_unit(team, quarter);
        uint32_t slot = 0, room = 0;
        if (a.early) wait_for_copies<0>(); /* the tokens were the last */
        for (int64_t k = (int64_t)rank * FN_MM_CHUNK, round = 0; k < a.k; k += round_k, round++) {
            const int steps = (int)((min(a.k - k, (int64_t)FN_MM_CHUNK) + FN_MM_LANES - 1) / FN_MM_LANES);
            char *const here = token_room + room;
            wait_for_copies<STAGES - 1>();
            tokens.widen(here);
            __syncthreads(); /* the tokens are there, and those before them have been used */
            room = room ? 0 : TOKENS * FN_FEW_TOKEN;
            if (k + round_k < a.k) tokens.copy(token_room + room, k + round_k);
            else let_dependents_start();
            for (int s = 0; s < steps; s += FN_FEW_STEPS) {
                wait_for_copies<STAGES - 1>();
                __syncwarp(); /* the stage is there */
                const reader from = {ring + slot + own, ring + slot + (own ^ FN_MM_LANES * 4),
                                     here + quarter * FN_FEW_UNIT + s * (FN_MM_LANES * 4)};
                add_stage(from, steps - s, lane);
                __syncwarp(); /* and has been used */
                weights.copy();
                slot = slot == RING - STAGE ? 0 : slot + STAGE;
            }
            fold(lane, quarter, sum);
            if (a.cluster > 1) {
                if (round == 0) fn_cluster_wait(); /* all have started */
                const int chunk = (int)round * a.cluster + rank;
#pragma unroll
                for (int e = 0; e < SUMS; e++)
                    if (writes)
                        fn_send(fn_address_in_block(shared_at(received + (chunk * SUMS + e) * blockDim.x), 0), sum[e],
                                fn_address_in_block(barrier, 0));
            } else
#pragma unroll
                for (int e = 0; e < SUMS; e++) total[e] = round == 0 ? sum[e] : fn_add(total[e], sum[e]);
        }
        wait_for_copies<0>(); /* of nothing */
        if (rank > 0) return;
        if (a.cluster > 1) {
            fn_barrier_wait_for_cluster(barrier, 0); /* all sums are here, so nobody writes to a block that has gone */
#pragma unroll
            for (int e = 0; e < SUMS; e++) {
                total[e] = received[e * blockDim.x];
                for (int c = 1; c < chunks; c++) total[e] = fn_add(total[e], received[(c * SUMS + e) * blockDim.x]);
            }
        }
        if (!writes || row >= a.weights.rows) return;
#pragma unroll
        for (int e = 0; e < SUMS; e++) {
            if (token + e >= a.tokens.rows) break;
            if (a.bias) total[e] = fn_add(total[e], bias[e]);
            store_element(a.out + row * a.out_weight_stride + (token + e) * a.out_token_stride, total[e], a.out_dtype);
        }
    }
};

template <typename FEW>
static __global__ void __launch_bounds__(FN_WARP *FN_FMA_FEW_MOST_WARPS, 1)
    mm_fma_few(const __grid_constant__ fn_fma_few_args a) {
    extern __shared__ __align__(128) char shared[];
    FEW::run(a, shared);
}

#define FN_FMA_FEW_KERNEL(TOKENS, OWN, STAGES)                                                                         \
    (const void *)mm_fma_few<fn_fma_few<TOKENS, OWN, STAGES>>, TOKENS, fn_fma_few<TOKENS, OWN, STAGES>::ROWS,          \
        fn_fma_few<TOKENS, OWN, STAGES>::RING, TOKENS *FN_FEW_TOKEN, fn_fma_few<TOKENS, OWN, STAGES>::SUMS

/* The last is for many weights: tokens come out of shared memory half as often, but a warp has twice the work. */
extern const fn_fma_few_kernel fn_fma_few_kernels[FN_FMA_FEW_KERNELS] = {{FN_FMA_FEW_KERNEL(1, 1, 4), 2},
                                                                         {FN_FMA_FEW_KERNEL(2, 1, 4), 2},
                                                                         {FN_FMA_FEW_KERNEL(4, 1, 4), 2},
                                                                         {FN_FMA_FEW_KERNEL(8, 1, 4), 4},
                                                                         {FN_FMA_FEW_KERNEL(8, 2, 2), 4}};
