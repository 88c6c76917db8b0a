/* mm_one.cuh: products of one token with few weights, all chunks of k side by side in one block.
 *
 * What takes time here is how long the first bytes need and how many steps follow one another. A step of the tensor
 * core multiplies 16 rows by 8 columns, and there is but one token: so the columns are its chunks of one number, one of
 * each of the 8 parts, and the rows are the same chunks of one weight and, below them, of the next. The sums of row i
 * and column i, and of row 8 + i and column i, are part i's; the others are dropped. A warp has the chunks of one
 * number.
 *
 * Each lane copies what it gives to the steps, and a step begins as soon as its operands are there. Where a k stands within
 * a step is for the lanes to choose, alike for weights and token: compute capability 9.0 adds a step's 16 products at once
 * (older ones in two halves: this kernel is not for them). What a chunk lacks of its length is steps of zeros. Where there
 * is no chunk the sum is -0, to which everything may be added and is left as it was.
 *
 * Moves: the weights once, the token once for every two weights, out once.
 */
#ifndef FUSEDNORM_MM_ONE_CUH
#define FUSEDNORM_MM_ONE_CUH

#include "mma.cuh"

enum {
    FN_ONE_WEIGHTS = 2,                   /* of a block */
    FN_ONE_LANES = 32 / FN_MM_GATE_PARTS, /* of a chunk, each with a unit: two steps */
    FN_ONE_LOADS = FN_MM_GATE_CHUNK * 2 / (FN_ONE_LANES * FN_UNIT),
    FN_ONE_LOAD = 32 * FN_UNIT, /* bytes of a warp's, of one row */
    FN_ONE_ROW = FN_ONE_LOADS * FN_ONE_LOAD,
    FN_ONE_OPERANDS = (FN_ONE_WEIGHTS + 1) * FN_ONE_ROW, /* of a warp: its rows, the token's last */
    FN_ONE_SUMS = FN_ONE_WEIGHTS * FN_MM_GATE_PARTS * 4, /* of a warp: weight by weight, of each the parts' */
    FN_ONE_KEPT = FN_MM_ONE_MOST_WARPS * FN_ONE_SUMS,
};

/* What a lane brings of its part's chunk: of every load one unit of both weights and of the token. */
struct fn_one_copies {
    const char *weights[FN_ONE_WEIGHTS], *token;
    uint32_t to;
    int left; /* elements, from the lane's first on to the chunk's end; none: 0 or less */

    FN_MEMBER void copy(int row, int load, const char *from) const {
        copy_part_async<FN_UNIT>(to + row * FN_ONE_ROW + load * FN_ONE_LOAD, from + load * FN_ONE_LANES * FN_UNIT,
                                 load * FN_ONE_LANES * FN_UNIT / 2 < left ? FN_UNIT : 0);
    }
    FN_MEMBER void copy_weights(int load) const {
#pragma unroll
        for (int w = 0; w < FN_ONE_WEIGHTS; w++) copy(w, load, weights[w]);
    }
    /* A group for each load. EARLY is a constant, since a branch at each load would take longer than the copy. */
    template <bool EARLY> FN_MEMBER void run() const {
        if (EARLY)
#pragma unroll
            for (int load = 0; load < FN_ONE_LOADS; load++) copy_weights(load);
        wait_for_previous();
        let_dependents_start();
#pragma unroll
        for (int load = 0; load < FN_ONE_LOADS; load++) {
            if (!EARLY) copy_weights(load);
            copy(FN_ONE_WEIGHTS, load, token);
            close_copies();
        }
    }
};

/* A unit's elements by steps. Of 4 lanes the first two have the first step, the others the second: each gives half of its own
 * to the lane two further, for half of that one's. */
FN_DEVICE void own_steps(uint32_t step[2][2], uint32_t at) {
    uint32_t own[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(own[0]), "=r"(own[1]), "=r"(own[2]), "=r"(own[3])
                 : "r"(at)
                 : "memory");
    const bool second = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, second ? own[i] : own[2 + i], 2);
        step[0][i] = second ? other : own[i];
        step[1][i] = second ? own[2 + i] : other;
    }
}

/* Load by load, each waited for on its own. `at`: the lane's units. */
template <int LOAD, fn_dtype D> FN_DEVICE void add_loads(float sums[4], uint32_t at) {
    if constexpr (LOAD < FN_ONE_LOADS) {
        wait_for_copies<FN_ONE_LOADS - 1 - LOAD>();
        uint32_t v[3][2][2];
#pragma unroll
        for (int row = 0; row < 3; row++) own_steps(v[row], at + row * FN_ONE_ROW + LOAD * FN_ONE_LOAD);
#pragma unroll
        for (int s = 0; s < 2; s++) {
            const uint32_t w[4] = {v[0][s][0], v[1][s][0], v[0][s][1], v[1][s][1]};
            add_step<D>(sums, w, v[2][s]);
        }
        add_loads<LOAD + 1, D>(sums, at);
    }
}

/* The total of one weight: from `sums` on lie the parts' chunks of the first number, FN_ONE_SUMS further those of the
 * second. MOST are loaded before the first is added: behind the last may lie anything. */
template <int MOST> FN_DEVICE float fold_chunks(uint32_t sums, int chunks) {
    float4 low[MOST], high[MOST]; /* of the parts 0 to 3 and 4 to 7 */
#pragma unroll
    for (int c = 0; c < MOST; c++) {
        low[c] = load_floats(sums + c * FN_ONE_SUMS);
        high[c] = load_floats(sums + c * FN_ONE_SUMS + FN_MM_GATE_PARTS / 2 * 4);
    }
    float4 l = low[0], h = high[0];
#pragma unroll
    for (int c = 1; c < MOST; c++)
        if (c < chunks) l = add_floats(l, low[c]), h = add_floats(h, high[c]);
    return fn_add(fn_add(fn_add(fn_add(l.x, l.y), l.z), l.w), fn_add(fn_add(fn_add(h.x, h.y), h.z), h.w));
}

/* For operands that are whole and k a multiple of 8: a unit lies in a row or behind its end. A warp for each chunk of a
 * part. */
template <fn_dtype D>
__global__ void __launch_bounds__(32 * FN_MM_ONE_MOST_WARPS, 1) mm_one(const __grid_constant__ fn_mm_tensor_args a) {
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane / FN_ONE_LANES, unit = lane % FN_ONE_LANES;
    const int part_k = (int)a.cut.part_tiles * FN_MM_TILE_K, in_part = warp * FN_MM_GATE_CHUNK;
    const int k = part * part_k + in_part; /* of the chunk that a lane brings units of */
    const int left = min(min(part_k - in_part, (int)FN_MM_GATE_CHUNK), (int)a.k - k); /* none: 0 or less */
    const int64_t weight = (int64_t)blockIdx.x * FN_ONE_WEIGHTS, at_k = (k + unit * 8) * 2;
    const bool both = weight + 1 < a.weights.rows; /* else the first is brought once more, and its sum not written */
    const uint32_t kept = shared_at(shared), operands = kept + FN_ONE_KEPT + warp * FN_ONE_OPERANDS; /* sums first */
    const char *const first = a.weights.data + weight * a.weights.row_stride + at_k;
    const fn_one_copies copies = {{first, both ? first + a.weights.row_stride : first},
                                  a.tokens.data + at_k,
                                  operands + lane * FN_UNIT,
                                  left - unit * 8};
    if (a.early) copies.run<true>();
    else copies.run<false>();
    /* The bias comes while the operands do. */
    const bool writes = threadIdx.x == 0 || (threadIdx.x == 1 && both); /* thread i the sum of weight i */
    float bias = 0;
    if (a.bias && writes) bias = load_element(a.bias + (weight + threadIdx.x) * a.bias_stride, a.bias_dtype);
    float sums[4] = {};
    add_loads<0, D>(sums, copies.to);
    if (unit == part / 2) { /* row `part` and column `part`, and row 8 + part */
#pragma unroll
        for (int w = 0; w < FN_ONE_WEIGHTS; w++) {
            const float sum = part % 2 ? sums[2 * w + 1] : sums[2 * w];
            const uint32_t at = kept + warp * FN_ONE_SUMS + (w * FN_MM_GATE_PARTS + part) * 4;
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(left > 0 ? sum : -0.0f) : "memory");
        }
    }
    __syncthreads();
    if (!writes) return;
    const uint32_t at = kept + threadIdx.x * (FN_MM_GATE_PARTS * 4);
    const int chunks = (part_k + FN_MM_GATE_CHUNK - 1) / FN_MM_GATE_CHUNK;
    float total = chunks <= FN_MM_ONE_MOST_WARPS / 2 ? fold_chunks<FN_MM_ONE_MOST_WARPS / 2>(at, chunks)
                                                     : fold_chunks<FN_MM_ONE_MOST_WARPS>(at, chunks);
    total = without_minus_zero(total);
    if (a.bias) total = fn_add(total, bias);
    store_element(a.out + (weight + threadIdx.x) * a.out_weight_stride, total, a.out_dtype);
}

#define FN_MM_ONE(D) (const void *)mm_one<D>, FN_ONE_WEIGHTS, 1, 32, FN_ONE_OPERANDS, FN_ONE_KEPT, true, true

#endif
