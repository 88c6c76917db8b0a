/* rms_norm.cuh: the norms for rows whose columns lie side by side, at 16-byte alignment, in whole groups of 8.
 *
 * A row is read once and stays in registers:
 *   1. s = x (+ residual (+ post));  residual_out = round(s)
 *   2. p[i] = s[i] * s[i], folded by halves: 8 neighbours to one group sum, then the group sums to one total
 *   3. r = 1/sqrt(total / H + eps)
 *   4. y = s * r;  5. out = round(y * (weight + weight_offset))
 * Moves: x (and residual, post) in, out (and residual_out) out, once each; the weight comes from L2 after the first block.
 *
 * A group's index is [k | warp | lane]: a thread owns groups THREADS apart. The fold takes the high bits first, which are
 * the thread's own (registers), then the warps' (shared memory), then the lanes' (shuffles), so that no bit of the result
 * depends on THREADS. With several BLOCKS a row (a cluster) the index is [k | warp | lane / 8 | block | lane % 8]: 8 lanes
 * still read one line of 128 bytes, and only 8 sums a block travel to the others.
 *
 * A kernel may start while the one before it in the stream is still at work (programmatic dependent launch). Until
 * wait_for_previous() returns nothing is read, but for a weight that the caller promised to be constant.
 */
#ifndef FUSEDNORM_RMS_NORM_CUH
#define FUSEDNORM_RMS_NORM_CUH

#include "dependents.cuh"
#include "fold.cuh"
#include "launch.h"
#include "vector.cuh"

#include <type_traits>

/* ---- the kernel ------------------------------------------------------------------------------------------------------------ */

/* Rows of fp32 are moved in halves of groups, so that neighbour lanes touch neighbour addresses: a pair of lanes holds the
 * first and the second halves of the same groups, half of these for each of the two threads that they stand for. What lies in
 * a raw group then is a half of one group and, STEP / 2 groups further, the same half of another. */
template <int STEP> FN_DEVICE void load_halves(fn_raw<FN_FLOAT32> *raw, const char *at, bool there, bool other_there) {
    if (there) raw->v[0] = *(const uint4 *)at;
    if (other_there) raw->v[1] = *(const uint4 *)(at + STEP / 2 * FN_GROUP * sizeof(float));
}

template <int STEP> FN_DEVICE void store_halves(char *at, const fn_raw<FN_FLOAT32> &raw, bool there, bool other_there) {
    if (there) *(uint4 *)at = raw.v[0];
    if (other_there) *(uint4 *)(at + STEP / 2 * FN_GROUP * sizeof(float)) = raw.v[1];
}

/* Where this thread's groups of its rows lie. */
template <int ROWS> struct fn_place {
    char *row[ROWS];
    int group_bytes;
};

template <fn_dtype D, int ROWS>
FN_DEVICE fn_place<ROWS> find_place(const fn_norm_kernel_args &a, int operand, uint32_t row, int row_step, int first,
                                    int first_byte) {
    fn_place<ROWS> place;
    place.group_bytes = fn_group_bytes<D>(a.dtype[operand]);
    char *const base = a.data[operand] + blockIdx.y * a.outer_stride[operand] + first * place.group_bytes + first_byte;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        place.row[i] = base + (row + i * row_step) * a.stride[operand];
        asm volatile("" ::"l"(place.row[i])); /* computed here, while the previous kernel may still run */
    }
    return place;
}

/* benchmarks/price.cu has another order of additions here, to time it. */
#ifndef FN_FOLD_ROWS
#define FN_FOLD_ROWS fold_rows
#endif

/* D: the dtype of all operands but the weight's, which is W's; FN_ANY: the call's, each its own.
 * THREADS a row; up to a warp several rows share a block. A thread holds GROUPS groups of each of ROWS rows. */
template <fn_dtype D, fn_dtype W, bool FUSED, int THREADS, int BLOCKS, int GROUPS, int ROWS, bool EARLY>
FN_DEVICE void norm_these_rows(const fn_norm_kernel_args &a) {
    constexpr bool PACKED = THREADS <= FN_WARP;
    constexpr int ROW_STEP = PACKED ? FN_PACKED_BLOCK / THREADS : 1; /* rows between a thread's own */
    constexpr int STEP = THREADS * BLOCKS;                           /* groups between a thread's own */
    constexpr int ROWS_IN_BLOCK = ROW_STEP * ROWS;
    constexpr bool PAIRED = D == FN_FLOAT32;
    static_assert(!PAIRED || W == D, "the weight is moved as the rows are");
    __shared__ float sums[PACKED ? 1 : ROWS][THREADS], received[BLOCKS * 8];
    __shared__ uint64_t arrived;
    uint32_t rank = 0;
    if (BLOCKS > 1) {
        rank = fn_cluster_rank();
        open_exchange<BLOCKS>(&arrived);
    }
    const int thread = PACKED ? threadIdx.x % THREADS : threadIdx.x;
    const int place = PAIRED ? thread / 2 : thread, first_byte = PAIRED ? thread % 2 * 16 : 0;
    const int first = BLOCKS == 1 ? place : (place / 8 * BLOCKS + (int)rank) * 8 + place % 8;
    const uint32_t row = PACKED ? blockIdx.x * ROWS_IN_BLOCK + threadIdx.x / THREADS : blockIdx.x / BLOCKS * ROWS;
    const fn_place<ROWS> x = find_place<D, ROWS>(a, FN_X, row, ROW_STEP, first, first_byte);
    const fn_place<ROWS> out = find_place<D, ROWS>(a, FN_OUT, row, ROW_STEP, first, first_byte);
    fn_place<ROWS> residual, residual_out;
    if constexpr (FUSED) {
        residual = find_place<D, ROWS>(a, FN_RESIDUAL, row, ROW_STEP, first, first_byte);
        residual_out = find_place<D, ROWS>(a, FN_RESIDUAL_OUT, row, ROW_STEP, first, first_byte);
    }
    const int weight_bytes = fn_group_bytes<W>(a.dtype[FN_WEIGHT]);
    const char *const weight = a.data[FN_WEIGHT] + first * weight_bytes + first_byte;
    /* Arguments that are first used after the reduction: a miss in the constant cache would cost more there. */
    uint32_t flags = a.flags;
    float inverse_columns = a.inverse_columns;
    asm volatile("" : "+r"(flags), "+f"(inverse_columns));

    bool in_row[GROUPS], there[ROWS][GROUPS];
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        in_row[k] = first + k * STEP < a.groups;
#pragma unroll
        for (int i = 0; i < ROWS; i++) there[i][k] = in_row[k] && (ROWS_IN_BLOCK == 1 || row + i * ROW_STEP < a.rows);
    }
    bool other_in_row[GROUPS], other_there[ROWS][GROUPS];
    if constexpr (PAIRED)
#pragma unroll
        for (int k = 0; k < GROUPS; k++) {
            other_in_row[k] = first + k * STEP + STEP / 2 < a.groups;
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                other_there[i][k] = other_in_row[k] && (ROWS_IN_BLOCK == 1 || row + i * ROW_STEP < a.rows);
        }
    fn_raw<D> x_raw[ROWS][GROUPS], residual_raw[ROWS][FUSED ? GROUPS : 1];
    fn_raw<W> w_raw[GROUPS];
#pragma unroll
    for (int k = 0; k < GROUPS; k++) w_raw[k] = fn_ones<W>(a.dtype[FN_WEIGHT]); /* y * 1 is y */
    const auto load_weight = [&] {
#pragma unroll
        for (int k = 0; k < GROUPS; k++)
            if constexpr (PAIRED) {
                if (flags & FN_NORM_WEIGHT)
                    load_halves<STEP>(&w_raw[k], weight + k * STEP * weight_bytes, in_row[k], other_in_row[k]);
            } else if (in_row[k] && flags & FN_NORM_WEIGHT)
                fn_load<W>(&w_raw[k], weight + k * STEP * weight_bytes, a.dtype[FN_WEIGHT]);
    };
    if constexpr (EARLY) {
        load_weight();
    } else if (flags & FN_NORM_WEIGHT_PREFETCH) {
#pragma unroll
        for (int k = 0; k < GROUPS; k++)
            if (in_row[k] && thread % 8 == 0) prefetch_to_l2(weight + k * STEP * weight_bytes);
    }
    wait_for_previous();

#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int k = 0; k < GROUPS; k++) {
            x_raw[i][k] = fn_raw<D>{};
            if constexpr (PAIRED)
                load_halves<STEP>(&x_raw[i][k], x.row[i] + k * STEP * x.group_bytes, there[i][k], other_there[i][k]);
            else if (there[i][k]) fn_load<D>(&x_raw[i][k], x.row[i] + k * STEP * x.group_bytes, a.dtype[FN_X]);
            if constexpr (FUSED) {
                residual_raw[i][k] = fn_raw<D>{};
                if constexpr (PAIRED)
                    load_halves<STEP>(&residual_raw[i][k], residual.row[i] + k * STEP * residual.group_bytes,
                                      there[i][k], other_there[i][k]);
                else if (there[i][k])
                    fn_load<D>(&residual_raw[i][k], residual.row[i] + k * STEP * residual.group_bytes,
                               a.dtype[FN_RESIDUAL]);
            }
        }
    if constexpr (!EARLY) load_weight();
    if (flags & FN_NORM_DEPENDENTS_SOON) let_dependents_start();

    float s[ROWS][FUSED ? GROUPS : 1][FN_GROUP], r[ROWS];
    const auto sum_squares = [&](auto plain) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            float group_sum[GROUPS];
#pragma unroll
            for (int k = 0; k < GROUPS; k++) {
                float f[FN_GROUP], p[FN_GROUP];
                fn_widen<D>(x_raw[i][k], f, a.dtype[FN_X]);
                if constexpr (FUSED) {
                    float g[FN_GROUP];
                    fn_widen<D>(residual_raw[i][k], g, a.dtype[FN_RESIDUAL]);
#pragma unroll
                    for (int j = 0; j < FN_GROUP; j++) f[j] = fn_add(f[j], g[j]);
                    if (!plain.value && flags & FN_NORM_POST) {
                        const fn_place<ROWS> post = find_place<D, ROWS>(a, FN_POST, row, ROW_STEP, first, first_byte);
                        fn_raw<D> raw = {};
                        if constexpr (PAIRED)
                            load_halves<STEP>(&raw, post.row[i] + k * STEP * post.group_bytes, there[i][k],
                                              other_there[i][k]);
                        else if (there[i][k])
                            fn_load<D>(&raw, post.row[i] + k * STEP * post.group_bytes, a.dtype[FN_POST]);
                        fn_widen<D>(raw, g, a.dtype[FN_POST]);
#pragma unroll
                        for (int j = 0; j < FN_GROUP; j++) f[j] = fn_add(f[j], g[j]);
                    }
                    const fn_raw<D> rounded = fn_narrow<D>(f, a.dtype[FN_RESIDUAL_OUT]);
                    if constexpr (PAIRED)
                        store_halves<STEP>(residual_out.row[i] + k * STEP * residual_out.group_bytes, rounded,
                                           there[i][k], other_there[i][k]);
                    else if (there[i][k])
                        fn_store<D>(residual_out.row[i] + k * STEP * residual_out.group_bytes, rounded,
                                    a.dtype[FN_RESIDUAL_OUT]);
                    if (!plain.value && flags & FN_NORM_ROUND) fn_widen<D>(rounded, f, a.dtype[FN_RESIDUAL_OUT]);
#pragma unroll
                    for (int j = 0; j < FN_GROUP; j++) s[i][k][j] = f[j];
                    if (!plain.value && flags & FN_NORM_ROUND_AFTER)
                        fn_widen<D>(rounded, s[i][k], a.dtype[FN_RESIDUAL_OUT]);
                }
#pragma unroll
                for (int j = 0; j < FN_GROUP; j++) p[j] = fn_mul(f[j], f[j]);
                group_sum[k] = PAIRED ? fold8_with_neighbour(p) : fn_fold8(p);
            }
            r[i] = fold_own<GROUPS>(group_sum);
        }
    };
    if (!FUSED || !(flags & (FN_NORM_POST | FN_NORM_ROUND | FN_NORM_ROUND_AFTER))) sum_squares(std::true_type());
    else sum_squares(std::false_type());

    FN_FOLD_ROWS<THREADS, BLOCKS, ROWS, PAIRED>(r, rank, sums, received, &arrived);
    if (!(flags & FN_NORM_DEPENDENTS_SOON)) let_dependents_start();
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        r[i] = fn_rsqrt(fn_add(inverse_columns != 0 ? fn_mul(r[i], inverse_columns) : fn_div(r[i], a.columns), a.eps));

    const auto normalise = [&](auto cast) {
#pragma unroll
        for (int k = 0; k < GROUPS; k++) {
            float w[FN_GROUP];
            fn_keep_raw<W>(&w_raw[k]);
            fn_widen<W>(w_raw[k], w, a.dtype[FN_WEIGHT]);
#pragma unroll
            for (int j = 0; j < FN_GROUP; j++) w[j] = fn_add(w[j], a.weight_offset);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                float y[FN_GROUP];
                if constexpr (!FUSED) fn_widen<D>(x_raw[i][k], y, a.dtype[FN_X]);
#pragma unroll
                for (int j = 0; j < FN_GROUP; j++) y[j] = fn_mul(FUSED ? s[i][k][j] : y[j], r[i]);
                if (cast.value) fn_widen<D>(fn_narrow<D>(y, a.dtype[FN_X]), y, a.dtype[FN_X]);
#pragma unroll
                for (int j = 0; j < FN_GROUP; j++) y[j] = fn_mul(y[j], w[j]);
                if constexpr (PAIRED)
                    store_halves<STEP>(out.row[i] + k * STEP * out.group_bytes, fn_narrow<D>(y, a.dtype[FN_OUT]),
                                       there[i][k], other_there[i][k]);
                else if (there[i][k])
                    fn_store<D>(out.row[i] + k * STEP * out.group_bytes, fn_narrow<D>(y, a.dtype[FN_OUT]),
                                a.dtype[FN_OUT]);
            }
        }
    };
    if (!(flags & FN_NORM_CAST)) normalise(std::false_type());
    else normalise(std::true_type());
}

/* A device without clusters and dependent launch is never given the kernels that need them: they are empty there. */
template <fn_dtype D, fn_dtype W, bool FUSED, int THREADS, int BLOCKS, int GROUPS, int ROWS, bool EARLY>
__global__ void __launch_bounds__(THREADS <= FN_WARP ? FN_PACKED_BLOCK : THREADS)
    norm_rows(const __grid_constant__ fn_norm_kernel_args a) {
#if __CUDA_ARCH__ >= 900
    constexpr bool usable = true;
#else
    constexpr bool usable = BLOCKS == 1 && !EARLY;
#endif
    if constexpr (usable) norm_these_rows<D, W, FUSED, THREADS, BLOCKS, GROUPS, ROWS, EARLY>(a);
}

/* ---- tables ---------------------------------------------------------------------------------------------------------------- */

#define FN_KERNEL(D, W, FUSED, THREADS, BLOCKS, GROUPS, ROWS, EARLY)                                                   \
    {(const void *)norm_rows<D, W, FUSED, THREADS, BLOCKS, GROUPS, ROWS, EARLY>,                                       \
     THREADS,                                                                                                          \
     BLOCKS,                                                                                                           \
     GROUPS,                                                                                                           \
     ROWS,                                                                                                             \
     FUSED,                                                                                                            \
     EARLY},

#endif
