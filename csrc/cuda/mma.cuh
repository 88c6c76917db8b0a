/* mma.cuh: the tensor core's step, and how tiles of 64 k reach it through shared memory.
 *
 * One step adds 16 products to an accumulator, in the tensor core's own arithmetic: the order of the steps decides the bits,
 * which lanes hold what does not. A tile in shared memory has rows of 128 bytes (64 k); the 16-byte units of a row are
 * exchanged by the row's number, so that 8 rows' units of the same k lie in 8 different groups of banks.
 */
#ifndef FUSEDNORM_MMA_CUH
#define FUSEDNORM_MMA_CUH

#include "copies.cuh"
#include "dependents.cuh"
#include "element.cuh"
#include "mm_tensor.h"

enum {
    FN_UNIT = 16,
    FN_UNITS = FN_MM_TILE_K * 2 / FN_UNIT,
    FN_TILE_ROW = FN_UNITS * FN_UNIT
}; /* bytes, units, bytes */

FN_DEVICE uint32_t unit_at(uint32_t tile, int row, int unit) {
    return tile + row * FN_TILE_ROW + ((unit ^ (row & 7)) << 4);
}

/* ---- copies ------------------------------------------------------------------------------------------------------------ */

FN_DEVICE uint32_t two_elements(const fn_mm_tensor_side &side, const char *at, int64_t k, int64_t end) {
    const uint32_t low = k < end ? load_bits(at, 2) : 0;
    const uint32_t high = k + 1 < end ? load_bits(at + side.k_stride, 2) : 0;
    return low | high << 16;
}

/* Brings ROWS rows of an operand, from `row` on, tile by tile; what lies outside of the operand becomes 0. */
template <bool WHOLE, int ROWS, int THREADS> struct fn_tile_copy;

template <int ROWS, int THREADS> struct fn_tile_copy<true, ROWS, THREADS> {
    static constexpr int STEP = THREADS / FN_UNITS, COUNT = (ROWS + STEP - 1) / STEP; /* rows between a thread's own */
    const char *from;
    int64_t stride, end;
    uint32_t to, other_to; /* of even and of odd rows of a thread's own */
    int rows;

    FN_MEMBER fn_tile_copy(const fn_mm_tensor_side &side, int64_t row, int64_t k_end, int thread) {
        const int unit = thread % FN_UNITS, first = thread / FN_UNITS;
        const int64_t left = side.rows - row - first;
        from = side.data + (row + first) * side.row_stride + unit * FN_UNIT;
        stride = STEP * side.row_stride;
        end = k_end - unit * 8;
        to = unit_at(0, first, unit);
        other_to = unit_at(0, first + STEP, unit) - STEP * FN_TILE_ROW;
        rows = left < ROWS ? (int)left : first < ROWS ? ROWS : 0;
    }
    /* As copy, of tile `number` of those from k on, which all lie within the operand: few instructions for many copies. */
    FN_MEMBER void copy_inner(uint32_t tile, int64_t k, int number) const {
        const char *at = from + k * 2;
#pragma unroll
        for (int i = 0; i < COUNT; i++, at += stride)
            if (ROWS % STEP == 0 || i * STEP < ROWS)
                copy_part_async<FN_UNIT>(tile + (i % 2 ? other_to : to) + i * STEP * FN_TILE_ROW,
                                         at + number * FN_TILE_ROW, i * STEP < rows ? FN_UNIT : 0);
    }
    FN_MEMBER void copy(uint32_t tile, int64_t k) const {
        const int64_t left = end - k;
        const char *at = from + k * 2;
        if (left > 0 && left < 8) { /* what lies behind the row's end may be nobody's memory */
#pragma unroll 1
            for (int i = 0; i < COUNT && i * STEP < ROWS; i++, at += stride) {
                const uint32_t unit = tile + (i % 2 ? other_to : to) + i * STEP * FN_TILE_ROW;
                asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(unit), "r"(0) : "memory");
#pragma unroll 1
                for (int j = 0; i * STEP < rows && j < (int)left; j++)
                    asm volatile("st.shared.b16 [%0], %1;" ::"r"(unit + 2 * j), "h"(((const uint16_t *)at)[j])
                                 : "memory");
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++, at += stride)
            if (ROWS % STEP == 0 || i * STEP < ROWS)
                copy_part_async<FN_UNIT>(tile + (i % 2 ? other_to : to) + i * STEP * FN_TILE_ROW, at,
                                         left > 0 && i * STEP < rows ? FN_UNIT : 0);
    }
};

/* Neighbour threads take neighbour rows: of an operand that is not whole these often lie side by side. */
template <int ROWS, int THREADS> struct fn_tile_copy<false, ROWS, THREADS> {
    const fn_mm_tensor_side &side;
    int64_t row, end;
    int thread;

    FN_MEMBER fn_tile_copy(const fn_mm_tensor_side &side, int64_t row, int64_t k_end, int thread)
        : side(side), row(row), end(k_end), thread(thread) {}
    FN_MEMBER void copy(uint32_t tile, int64_t k) const {
#pragma unroll 1
        for (int i = thread; i < ROWS * FN_UNITS; i += THREADS) {
            const int r = i % ROWS, unit = i / ROWS;
            const int64_t first = k + unit * 8, stop = row + r < side.rows ? end : 0;
            const char *const from = side.data + (row + r) * side.row_stride + first * side.k_stride;
            uint32_t pair[4];
#pragma unroll
            for (int j = 0; j < 4; j++) pair[j] = two_elements(side, from + 2 * j * side.k_stride, first + 2 * j, stop);
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(unit_at(tile, r, unit)), "r"(pair[0]),
                         "r"(pair[1]), "r"(pair[2]), "r"(pair[3])
                         : "memory");
        }
    }
};

/* ---- steps ------------------------------------------------------------------------------------------------------------- */

/* Four 8 x 8 matrices of 16-bit elements: lane 8 i + r says where row r of matrix i lies. */
FN_DEVICE void load_matrices(uint32_t v[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at)
                 : "memory");
}

FN_DEVICE void load_2_matrices(uint32_t v[2], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(v[0]), "=r"(v[1])
                 : "r"(at)
                 : "memory");
}

/* sum(weight, token) += the sum over 16 k of weights(weight, k) * tokens(token, k), for 16 weights and 8 tokens */
template <fn_dtype D> FN_DEVICE void add_step(float sum[4], const uint32_t weights[4], const uint32_t *tokens) {
    if constexpr (D == FN_BFLOAT16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(tokens[0]), "r"(tokens[1]));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(tokens[0]),
                       "r"(tokens[1]));
}

/* The 4 steps of a tile, k ascending, for WEIGHTS x TOKENS sums of a warp. `weights` and `tokens`: tiles; the warp's begin at
 * the rows given. */
template <fn_dtype D, int WEIGHTS, int TOKENS>
FN_DEVICE void add_tile(float sums[WEIGHTS / 16][TOKENS / 8][4], uint32_t weights, int weight_row, uint32_t tokens,
                        int token_row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < FN_MM_TILE_K / FN_MM_STEP; step++) {
        uint32_t w[WEIGHTS / 16][4], t[TOKENS / 8][2];
#pragma unroll
        for (int i = 0; i < WEIGHTS / 16; i++)
            load_matrices(w[i], unit_at(weights, weight_row + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int j = 0; j + 1 < TOKENS / 8; j += 2) {
            uint32_t both[4];
            load_matrices(both, unit_at(tokens, token_row + j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
            t[j][0] = both[0], t[j][1] = both[1], t[j + 1][0] = both[2], t[j + 1][1] = both[3];
        }
        if (TOKENS % 16)
            load_2_matrices(t[TOKENS / 8 - 1],
                            unit_at(tokens, token_row + TOKENS - 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < WEIGHTS / 16; i++)
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j++) add_step<D>(sums[i][j], w[i], t[j]);
    }
}

/* ---- clusters ---------------------------------------------------------------------------------------------------------- */

FN_DEVICE int rank_in_cluster(void) {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return (int)rank;
}

/* All threads of all blocks arrive, then wait until all have; of what they wrote nothing is said. */
FN_DEVICE void arrive_in_cluster(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

FN_DEVICE void wait_for_cluster_arrivals(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

/* All threads of all blocks; what each wrote before is seen by all after. */
FN_DEVICE void meet_cluster(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

/* Of the same place in another block's shared memory. */
FN_DEVICE uint32_t address_in_cluster(uint32_t at, int block) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(block));
#endif
    return at;
}

FN_DEVICE void store_in_cluster(uint32_t at, float4 v) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
#endif
}

FN_DEVICE float4 load_floats(uint32_t at) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

FN_DEVICE float4 add_floats(float4 a, float4 b) {
    return make_float4(fn_add(a.x, b.x), fn_add(a.y, b.y), fn_add(a.z, b.z), fn_add(a.w, b.w));
}

/* What lies at the same place in another block's shared memory. */
FN_DEVICE float4 floats_of_block(uint32_t at, int block) {
#if __CUDA_ARCH__ >= 900
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address_in_cluster(at, block))
                 : "memory");
    return v;
#else
    return load_floats(at);
#endif
}

/* ---- results ----------------------------------------------------------------------------------------------------------- */

/* Sums of a tile in shared memory: token by token, PITCH bytes apart, so that a warp's lanes write to different banks. */
template <int WEIGHTS, int TOKENS> struct fn_kept {
    static constexpr int pitch = (WEIGHTS + 4) * (int)sizeof(float), bytes = TOKENS * pitch;
};

/* A warp's sums, to the weights and tokens of its own that begin at those given. */
template <int WEIGHTS, int TOKENS>
FN_DEVICE void keep_sums(uint32_t kept, int pitch, int weight, int token,
                         const float sums[WEIGHTS / 16][TOKENS / 8][4]) {
    const int lane = threadIdx.x % 32;
    const uint32_t at = kept + (token + lane % 4 * 2) * pitch + (weight + lane / 4) * (int)sizeof(float);
#pragma unroll
    for (int i = 0; i < WEIGHTS / 16; i++)
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + (j * 8 + n % 2) * pitch + (i * 16 + n / 2 * 8) * 4),
                             "f"(sums[i][j][n])
                             : "memory");
}

/* out(token, weight...) = round(sums + bias) */
FN_DEVICE void store_sums(const fn_mm_tensor_args &a, float4 v, int64_t weight, int64_t token) {
    char *to = a.out + token * a.out_token_stride + weight * a.out_weight_stride;
    if (!a.out_whole || a.bias || weight + 4 > a.weights.rows) {
#pragma unroll 1
        for (const int64_t end = weight + 4 < a.weights.rows ? weight + 4 : a.weights.rows; weight < end; weight++) {
            if (a.bias) v.x = fn_add(v.x, load_element(a.bias + weight * a.bias_stride, a.bias_dtype));
            store_element(to, v.x, a.out_dtype);
            v.x = v.y, v.y = v.z, v.z = v.w;
            to += a.out_weight_stride;
        }
    } else if (a.out_dtype == FN_FLOAT32) *(float4 *)to = v;
    else if (a.out_dtype == FN_BFLOAT16) *(uint2 *)to = make_uint2(fn_pack2_bf16(v.x, v.y), fn_pack2_bf16(v.z, v.w));
    else *(uint2 *)to = make_uint2(fn_pack2_f16(v.x, v.y), fn_pack2_f16(v.z, v.w));
}

/* Adds up the chunks of a tile, in ascending order, and writes it: thread `thread` of `threads` in all blocks that share it.
 * Block b keeps the sums of `each` chunks from b * each on, one after the other. */
template <int WEIGHTS, int TOKENS>
FN_DEVICE void finish_tile(const fn_mm_tensor_args &a, uint32_t kept, int chunks, int each, int64_t weight,
                           int64_t token, int thread, int threads) {
    constexpr int UNITS = WEIGHTS / 4;
#pragma unroll 1
    for (int i = thread; i < UNITS * TOKENS; i += threads) {
        const int t = i / UNITS, w = i % UNITS * 4;
        if (token + t >= a.tokens.rows || weight + w >= a.weights.rows) continue;
        const uint32_t at = kept + t * fn_kept<WEIGHTS, TOKENS>::pitch + w * (int)sizeof(float);
        float4 total = floats_of_block(at, 0);
        int block = 0, own = 0;
#pragma unroll 8
        for (int chunk = 1; chunk < chunks; chunk++) {
            if (++own == each) own = 0, block++;
            total = add_floats(total, floats_of_block(at + own * fn_kept<WEIGHTS, TOKENS>::bytes, block));
        }
        store_sums(a, total, weight + w, token + t);
    }
}

#endif
