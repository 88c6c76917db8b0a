/* mm_few.cuh: products of up to four tokens with few weights, all chunks of k side by side in one block.
 *
 * What takes time here is how long the first bytes need and how many steps follow one another. A step of the tensor
 * core multiplies 16 rows by 8 columns, and there are few tokens: so the columns are a token's chunks of one number,
 * one of each of the 8 parts, and the rows are the same chunks of one weight and, below them, of another. The sums of
 * row i and column i, and of row 8 + i and column i, are part i's; the others are dropped. A warp has the chunks of one
 * number.
 *
 * The operands come in lines of 128 bytes, whose four sectors are the operands of four steps, and a quarter of the
 * chunks is multiplied as soon as it is there. Where a k stands within a step is for the lanes to choose, alike for
 * weights and tokens: compute capability 9.0 adds a step's 16 products at once (older ones in two halves: this kernel
 * is not for them). What a chunk lacks of its length is steps of zeros. Where there is no chunk the sum is -0, to which
 * everything may be added and is left as it was.
 *
 * What follows the last step is short, and asks for nothing that could be had before: there is nothing else to wait
 * for, and on an H200 instructions and arguments that come for the first time cost more than what is done with them.
 *
 * Moves: the weights once, the tokens once for every two or four weights, out once.
 */
#ifndef FUSEDNORM_MM_FEW_CUH
#define FUSEDNORM_MM_FEW_CUH

#include "mma.cuh"

enum {
    FN_FEW_LINE = 128, /* bytes of one part, four steps */
    FN_FEW_QUARTER = FN_MM_GATE_PARTS * FN_FEW_LINE,
    FN_FEW_QUARTERS = FN_MM_GATE_CHUNK * 2 / FN_FEW_LINE,
    FN_FEW_ROW = FN_FEW_QUARTERS * FN_FEW_QUARTER, /* of a warp */
};

/* Bytes of shared memory: what all warps leave, chunk by chunk, of each token by token, weight by weight, part by part;
 * and a warp's operands, the weights' rows, then the tokens'. */
template <int WEIGHTS, int TOKENS> struct fn_few_bytes {
    static constexpr int sums = TOKENS * WEIGHTS * FN_MM_GATE_PARTS * 4, kept = FN_MM_FEW_MOST_WARPS * sums;
    static constexpr int operands = (WEIGHTS + TOKENS) * FN_FEW_ROW;
};

/* What a lane brings: of each line of two parts, 4 apart, the same unit. The sectors of a line are exchanged by its
 * part, so that those which a step needs of 4 parts lie in different banks. */
template <int WEIGHTS, int TOKENS> struct fn_few_copies {
    const char *weights[WEIGHTS], *tokens[TOKENS];
    int64_t further; /* bytes from one part to the other */
    uint32_t to;
    int left[2]; /* elements of the chunk, from the lane's first on; none: 0 or less */

    FN_MEMBER void copy(int row, int quarter, const char *from) const {
#pragma unroll
        for (int i = 0; i < 2; i++)
            copy_part_async<FN_UNIT>(to + row * FN_FEW_ROW + quarter * FN_FEW_QUARTER + i * (FN_FEW_QUARTER / 2),
                                     from + i * further + quarter * FN_FEW_LINE,
                                     quarter * FN_FEW_LINE / 2 < left[i] ? FN_UNIT : 0);
    }
    FN_MEMBER void copy_weights(int quarter) const {
#pragma unroll
        for (int w = 0; w < WEIGHTS; w++) copy(w, quarter, weights[w]);
    }
    /* A group for each quarter. EARLY is a constant, since a branch at each load would take longer than the copy. */
    template <bool EARLY> FN_MEMBER void run() const {
        if (EARLY)
#pragma unroll
            for (int quarter = 0; quarter < FN_FEW_QUARTERS; quarter++) copy_weights(quarter);
        wait_for_previous();
        let_dependents_start();
#pragma unroll
        for (int quarter = 0; quarter < FN_FEW_QUARTERS; quarter++) {
            if (!EARLY) copy_weights(quarter);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) copy(WEIGHTS + t, quarter, tokens[t]);
            close_copies();
        }
    }
};

/* Quarter by quarter, each waited for on its own. `at`: the lane's two registers' place in its part's line. */
template <int WEIGHTS, int TOKENS, int QUARTER, fn_dtype D>
FN_DEVICE void add_quarters(float sums[WEIGHTS / 2][TOKENS][4], uint32_t at, int part) {
    if constexpr (QUARTER < FN_FEW_QUARTERS) {
        wait_for_copies<FN_FEW_QUARTERS - 1 - QUARTER>();
        __syncwarp();
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const uint32_t sector = (uint32_t)(step ^ (part & 3)) * 32;
            uint32_t v[WEIGHTS + TOKENS][2];
#pragma unroll
            for (int row = 0; row < WEIGHTS + TOKENS; row++)
                asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                             : "=r"(v[row][0]), "=r"(v[row][1])
                             : "r"((at ^ sector) + row * FN_FEW_ROW + QUARTER * FN_FEW_QUARTER)
                             : "memory");
#pragma unroll
            for (int i = 0; i < WEIGHTS; i += 2) {
                const uint32_t w[4] = {v[i][0], v[i + 1][0], v[i][1], v[i + 1][1]};
#pragma unroll
                for (int t = 0; t < TOKENS; t++) add_step<D>(sums[i / 2][t], w, v[WEIGHTS + t]);
            }
        }
        add_quarters<WEIGHTS, TOKENS, QUARTER + 1, D>(sums, at, part);
    }
}

/* The total of an output, to whose parts 8 lanes belong, in each of them: from `sums` on lie this lane's chunks,
 * `pitch` bytes apart, -0 where there is none. */
FN_DEVICE float fold_chunks(uint32_t sums, int pitch) {
    const int half = threadIdx.x % 32 / (FN_MM_GATE_PARTS / 2) * (FN_MM_GATE_PARTS / 2);
    float chunk[FN_MM_FEW_MOST_WARPS], part[FN_MM_GATE_PARTS / 2];
#pragma unroll
    for (int c = 0; c < FN_MM_FEW_MOST_WARPS; c++) chunk[c] = load_float(sums + c * pitch);
    float sum = chunk[0];
#pragma unroll
    for (int c = 1; c < FN_MM_FEW_MOST_WARPS; c++) sum = fn_add(sum, chunk[c]);
#pragma unroll
    for (int p = 0; p < FN_MM_GATE_PARTS / 2; p++) part[p] = __shfl_sync(0xffffffffu, sum, half + p);
    sum = part[0];
#pragma unroll
    for (int p = 1; p < FN_MM_GATE_PARTS / 2; p++) sum = fn_add(sum, part[p]);
    return fn_add(sum, __shfl_xor_sync(0xffffffffu, sum, FN_MM_GATE_PARTS / 2));
}

/* For operands that are whole and k a multiple of 8: a unit lies in a row or behind its end. A warp for each chunk of a
 * part. */
template <fn_dtype D, int WEIGHTS, int TOKENS>
__global__ void __launch_bounds__(32 * FN_MM_FEW_MOST_WARPS, 1) mm_few(const __grid_constant__ fn_mm_tensor_args a) {
    typedef fn_few_bytes<WEIGHTS, TOKENS> bytes;
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int part_k = (int)a.cut.part_tiles * FN_MM_TILE_K, in_part = warp * FN_MM_GATE_CHUNK;
    const int chunk_k = min(part_k - in_part, (int)FN_MM_GATE_CHUNK);
    const auto left_of = [&](int part) { return min(chunk_k, (int)a.k - (part * part_k + in_part)); };
    const int64_t weight = (int64_t)blockIdx.x * WEIGHTS;
    const uint32_t kept = shared_at(shared), operands = kept + bytes::kept + warp * bytes::operands;
    const int first = lane / 8, unit = lane % 8; /* of the two parts whose lines this lane brings units of */
    const int64_t at_k = ((int64_t)first * part_k + in_part + unit * 8) * 2;
    fn_few_copies<WEIGHTS, TOKENS> copies;
    /* What there is not is brought from the last row that there is, and its sum not written. */
#pragma unroll
    for (int w = 0; w < WEIGHTS; w++)
        copies.weights[w] = a.weights.data + min(weight + w, a.weights.rows - 1) * a.weights.row_stride + at_k;
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
        copies.tokens[t] = a.tokens.data + min((int64_t)t, a.tokens.rows - 1) * a.tokens.row_stride + at_k;
    copies.further = (int64_t)part_k * (FN_MM_GATE_PARTS / 2) * 2;
    copies.to = operands + first * FN_FEW_LINE + ((unit / 2 ^ first) * 2 + unit % 2) * FN_UNIT;
    copies.left[0] = left_of(first) - unit * 8, copies.left[1] = left_of(first + 4) - unit * 8;
    const int part = lane / 4; /* whose sums this lane has two of */
    const bool any = left_of(part) > 0;
    const int output = threadIdx.x / FN_MM_GATE_PARTS, own_token = output / WEIGHTS;
    const int64_t own_weight = weight + output % WEIGHTS;
    const bool writes = threadIdx.x % FN_MM_GATE_PARTS == 0 && own_token < a.tokens.rows && own_weight < a.weights.rows;
    const bool is_plain = a.out_dtype == FN_FLOAT32 && a.out_whole && !a.bias;
    char *to = a.out + own_token * a.out_token_stride + own_weight * a.out_weight_stride;
    asm volatile("" : "+l"(to)); /* computed here */
    for (uint32_t i = blockDim.x / 32 * bytes::sums + threadIdx.x * 4; i < bytes::kept; i += blockDim.x * 4)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(kept + i), "f"(-0.0f) : "memory");
    if (a.early) copies.template run<true>();
    else copies.template run<false>();
    float bias = 0; /* comes while the operands do */
    if (a.bias && writes) bias = load_element(a.bias + own_weight * a.bias_stride, a.bias_dtype);
    float sums[WEIGHTS / 2][TOKENS][4] = {};
    add_quarters<WEIGHTS, TOKENS, 0, D>(sums, operands + part * FN_FEW_LINE + lane % 4 * 8, part);
    if (lane % 4 == part / 2) /* row `part` and column `part`, and row 8 + part */
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
#pragma unroll
            for (int w = 0; w < WEIGHTS; w++) {
                const float sum = part % 2 ? sums[w / 2][t][2 * (w % 2) + 1] : sums[w / 2][t][2 * (w % 2)];
                const uint32_t at = kept + warp * bytes::sums + ((t * WEIGHTS + w) * FN_MM_GATE_PARTS + part) * 4;
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(any ? sum : -0.0f) : "memory");
            }
    __syncthreads();
    constexpr int FOLDERS = TOKENS * WEIGHTS * FN_MM_GATE_PARTS;
    if (warp > (FOLDERS - 1) / 32) return;
    const float total = without_minus_zero(fold_chunks(kept + threadIdx.x % FOLDERS * 4, bytes::sums));
    if (!writes) return;
    if (is_plain) *(float *)to = total;
    else store_element(to, a.bias ? fn_add(total, bias) : total, a.out_dtype);
}

#define FN_FEW(D, WEIGHTS, TOKENS)                                                                                     \
    (const void *)mm_few<D, WEIGHTS, TOKENS>, WEIGHTS, TOKENS, 32, fn_few_bytes<WEIGHTS, TOKENS>::operands,            \
        fn_few_bytes<WEIGHTS, TOKENS>::kept, true, true
/* Weights and tokens of a block; by tokens, then weights. Measured on an H200, in us at 256 x 7168 and 384 x 7168:
 *   one token: 1 weight 1.97, 2.27; 2 weights 1.72, 2.04; 3 weights 1.71, 1.91; 4 weights 1.75, 1.86
 *   four tokens: 2 weights 2.09, 2.92; 4 weights 2.39, 2.56; mm_gate.cuh 2.30, 2.48 */
#define FN_MM_FEW(D)                                                                                                   \
    {FN_FEW(D, 2, 1)}, {FN_FEW(D, 4, 1)}, {FN_FEW(D, 2, 2)}, {FN_FEW(D, 4, 2)}, { FN_FEW(D, 2, 4) }

#endif
