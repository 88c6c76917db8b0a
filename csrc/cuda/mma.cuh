/* mma.cuh: the tensor core's step, and how tiles of 64 k reach it through shared memory.
 *
 * One step adds 16 products to an accumulator, in the tensor core's own arithmetic: the order of the steps decides the bits,
 * which lanes hold what does not. A tile in shared memory has rows of 128 bytes (64 k); the 16-byte units of a row are
 * exchanged by the row's number, so that 8 rows' units of the same k lie in 8 different groups of banks.
 */
#ifndef FUSEDNORM_MMA_CUH
#define FUSEDNORM_MMA_CUH

#include "cluster.cuh"
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

/* ---- sums in shared memory ---------------------------------------------------------------------------------------------- */

/* What lies at the same place in another block's shared memory. */
FN_DEVICE float4 floats_of_block(uint32_t at, int block) {
    float4 v = {};
    FN_CLUSTER_ASM("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "r"(fn_address_in_block(at, (uint32_t)block))
                   : "memory");
    return v;
}

/* ---- results ----------------------------------------------------------------------------------------------------------- */

/* Sums of a tile in shared memory: token by token, PITCH bytes apart, so that a warp's lanes write to different banks. */
template <int WEIGHTS, int TOKENS> struct fn_kept {
    static constexpr int pitch = (WEIGHTS + 4) * (int)sizeof(float), bytes = TOKENS * pitch;
};

/* A warp's sums, to the weights and tokens of its own that begin at those given. FETCH: sums = what lies there, + sums. */
template <int WEIGHTS, int TOKENS, bool FETCH = false>
FN_DEVICE void keep_sums(uint32_t kept, int pitch, int weight, int token, float sums[WEIGHTS / 16][TOKENS / 8][4]) {
    const int lane = threadIdx.x % 32;
    const uint32_t first = kept + (token + lane % 4 * 2) * pitch + (weight + lane / 4) * (int)sizeof(float);
#pragma unroll
    for (int i = 0; i < WEIGHTS / 16; i++)
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const uint32_t at = first + (j * 8 + n % 2) * pitch + (i * 16 + n / 2 * 8) * (int)sizeof(float);
                if (FETCH) sums[i][j][n] = fn_add(load_float(at), sums[i][j][n]);
                else asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(sums[i][j][n]) : "memory");
            }
}

/* out(token, weight...) = round(sums + bias) */
FN_DEVICE void store_sums(const fn_mm_tensor_args &a, float4 v, int64_t weight, int64_t token) {
    char *to = a.out + token * a.out_token_stride + weight * a.out_weight_stride;
    v = make_float4(without_minus_zero(v.x), without_minus_zero(v.y), without_minus_zero(v.z), without_minus_zero(v.w));
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

/* Folds the parts of a tile and writes it: thread `thread` of `threads` in all blocks that share it. Block b keeps the sums of
 * `each` parts from b * each on, one after the other; one block alone, the total. */
template <int WEIGHTS, int TOKENS>
FN_DEVICE void finish_tile(const fn_mm_tensor_args &a, uint32_t kept, int64_t weight, int64_t token, int thread,
                           int threads) {
    constexpr int UNITS = WEIGHTS / 4;
#pragma unroll 1
    for (int i = thread; i < UNITS * TOKENS; i += threads) {
        const int t = i / UNITS, w = i % UNITS * 4;
        if (token + t >= a.tokens.rows || weight + w >= a.weights.rows) continue;
        const uint32_t at = kept + t * fn_kept<WEIGHTS, TOKENS>::pitch + w * (int)sizeof(float);
        float4 sum[FN_MM_GATE_PARTS] = {load_floats(at)};
        if (a.cluster > 1) {
#pragma unroll
            for (int p = 0; p < FN_MM_GATE_PARTS; p++)
                sum[p] = p < a.cut.parts ? floats_of_block(at + p % a.parts_each * fn_kept<WEIGHTS, TOKENS>::bytes,
                                                           p / a.parts_each)
                                         : make_float4(-0.0f, -0.0f, -0.0f, -0.0f);
            sum[0] = fold_parts<FN_MM_GATE_PARTS>(sum);
        }
        store_sums(a, sum[0], weight + w, token + t);
    }
}

#endif
