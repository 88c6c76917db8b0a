/* mm_gate.cuh: products with few weights and few tokens, a block for each part of k, a warp for each chunk.
 *
 * All of a chunk is asked for at once: what limits such a product is how long the first bytes take, not how many they are.
 * A block adds up its chunks, in their order, and sends the part's sums to the blocks of the cluster that own their tokens;
 * when all are there, the owners fold them. Moves: the weights once for each TOKENS tokens, the
 * tokens once for each WEIGHTS weights, out once.
 */
#ifndef FUSEDNORM_MM_GATE_CUH
#define FUSEDNORM_MM_GATE_CUH

#include "mma.cuh"

enum { FN_GATE_TILES = FN_MM_GATE_CHUNK / FN_MM_TILE_K };

/* Of a warp. */
template <int WEIGHTS, int TOKENS> struct fn_gate_bytes {
    static constexpr int operands = FN_GATE_TILES * (WEIGHTS + TOKENS) * FN_TILE_ROW;
};

template <int TILE, fn_dtype D, int WEIGHTS, int TOKENS>
FN_DEVICE void add_tiles(float sums[WEIGHTS / 16][TOKENS / 8][4], uint32_t weights, uint32_t tokens) {
    if constexpr (TILE < FN_GATE_TILES) {
        wait_for_copies<FN_GATE_TILES - 1 - TILE>();
        __syncwarp();
        add_tile<D, WEIGHTS, TOKENS>(sums, weights + TILE * WEIGHTS * FN_TILE_ROW, 0,
                                     tokens + TILE * TOKENS * FN_TILE_ROW, 0);
        add_tiles<TILE + 1, D, WEIGHTS, TOKENS>(sums, weights, tokens);
    }
}

/* A warp for each chunk of a part, a block for each part. */
template <fn_dtype D, int WEIGHTS, int TOKENS>
__global__ void __launch_bounds__(32 * FN_MM_GATE_MOST_WARPS, 1) mm_gate(const __grid_constant__ fn_mm_tensor_args a) {
    constexpr int BYTES = fn_gate_bytes<WEIGHTS, TOKENS>::operands, UNITS = WEIGHTS / 4;
    constexpr int PITCH = fn_kept<WEIGHTS, TOKENS>::pitch;
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = (int)fn_cluster_rank();
    const uint32_t operands = shared_at(shared), weights = operands + warp * BYTES;
    const uint32_t tokens = weights + FN_GATE_TILES * WEIGHTS * FN_TILE_ROW;
    const uint32_t here = operands + blockDim.x / 32 * BYTES;               /* the barrier of what is received */
    const uint32_t received = here + FN_GATE_BARRIER_BYTES;                 /* part by part, of each the tokens owned */
    const int owner_bits = 31 - __clz(a.cluster), owners = 1 << owner_bits; /* token t is block t % owners' */
    const int slot_bytes = fn_kept<WEIGHTS, TOKENS>::bytes >> owner_bits;
    const int64_t weight = (int64_t)(blockIdx.x / a.cluster) * WEIGHTS, token = (int64_t)blockIdx.y * TOKENS;
    const int64_t part_k = part * a.cut.part_tiles * FN_MM_TILE_K, part_end = part_k + a.cut.part_tiles * FN_MM_TILE_K;
    const int64_t k = part_k + warp * FN_MM_GATE_CHUNK, k_end = part_end < a.k ? part_end : a.k;
    const int used = a.tokens.rows - token < TOKENS ? (int)(a.tokens.rows - token) : TOKENS;
    const int owned = (used + owners - 1 - part) >> owner_bits; /* of the tokens, by this block */
    const fn_tile_copy<true, WEIGHTS, 32> weights_from(a.weights, weight, k_end, lane);
    const fn_tile_copy<true, TOKENS, 32> tokens_from(a.tokens, token, k_end, lane);
    const bool inner = k + FN_MM_GATE_CHUNK <= k_end;
    if (threadIdx.x == 0) {
        fn_barrier_init(here, 1);
        fn_barrier_fence();
        if (part < owners) fn_barrier_expect(here, a.cut.parts * owned * WEIGHTS * (int)sizeof(float));
    }
    if (a.early)
#pragma unroll
        for (int tile = 0; tile < FN_GATE_TILES; tile++)
            weights_from.copy(weights + tile * WEIGHTS * FN_TILE_ROW, k + tile * FN_MM_TILE_K);
    __syncwarp();
    fn_cluster_arrive_relaxed(); /* a block is written to once it has begun */
    wait_for_previous();
    if (inner) {
#pragma unroll
        for (int tile = 0; tile < FN_GATE_TILES; tile++) {
            if (!a.early) weights_from.copy_inner(weights + tile * WEIGHTS * FN_TILE_ROW, k, tile);
            tokens_from.copy_inner(tokens + tile * TOKENS * FN_TILE_ROW, k, tile);
            close_copies();
        }
    } else {
#pragma unroll 1
        for (int tile = 0; tile < FN_GATE_TILES; tile++) {
            if (!a.early) weights_from.copy(weights + tile * WEIGHTS * FN_TILE_ROW, k + tile * FN_MM_TILE_K);
            tokens_from.copy(tokens + tile * TOKENS * FN_TILE_ROW, k + tile * FN_MM_TILE_K);
            close_copies();
        }
    }
    let_dependents_start();
    float sums[WEIGHTS / 16][TOKENS / 8][4] = {};
    add_tiles<0, D, WEIGHTS, TOKENS>(sums, weights, tokens);
    __syncwarp(); /* all lanes have read the operands that lay there */
    keep_sums<WEIGHTS, TOKENS>(weights, PITCH, 0, 0, sums);
    __syncthreads();
    fn_cluster_wait();
    const int chunks = (int)((k_end - part_k + FN_MM_GATE_CHUNK - 1) / FN_MM_GATE_CHUNK);
#pragma unroll 1
    for (int i = threadIdx.x; i < used * UNITS; i += blockDim.x) {
        const int t = i / UNITS, at = i % UNITS * 16;
        const uint32_t from = operands + t * PITCH + at, owner = (uint32_t)(t & (owners - 1));
        float4 sum = load_floats(from);
#pragma unroll
        for (int chunk = 1; chunk < FN_MM_GATE_MOST_WARPS; chunk++)
            if (chunk < chunks) sum = add_floats(sum, load_floats(from + chunk * BYTES));
        fn_send4(fn_address_in_block(received + part * slot_bytes + (t >> owner_bits) * PITCH + at, owner), sum,
                 fn_address_in_block(here, owner));
    }
    if (part >= owners) return;
    fn_barrier_wait_for_cluster(here,
                                0); /* no block leaves before it has all sums, so none writes to one that has gone */
#pragma unroll 1
    for (int i = threadIdx.x; i < owned * UNITS; i += blockDim.x) {
        const int slot = i / UNITS, w = i % UNITS * 4;
        if (weight + w >= a.weights.rows) continue;
        const uint32_t at = received + slot * PITCH + w * 4;
        float4 sum[FN_MM_GATE_PARTS];
#pragma unroll
        for (int p = 0; p < FN_MM_GATE_PARTS; p++)
            sum[p] = p < a.cut.parts ? load_floats(at + p * slot_bytes) : make_float4(-0.0f, -0.0f, -0.0f, -0.0f);
        const float4 total = fold_parts<FN_MM_GATE_PARTS>(sum);
        store_sums(a, total, weight + w, token + (slot << owner_bits | part));
    }
}

#define FN_GATE(D, WEIGHTS, TOKENS)                                                                                    \
    (const void *)mm_gate<D, WEIGHTS, TOKENS>, WEIGHTS, TOKENS, 32, fn_gate_bytes<WEIGHTS, TOKENS>::operands,          \
        fn_kept<WEIGHTS, TOKENS>::bytes, true, true
#define FN_MM_GATE(D)                                                                                                  \
    {FN_GATE(D, 16, 8)}, {FN_GATE(D, 16, 16)}, {FN_GATE(D, 16, 32)}, { FN_GATE(D, 32, 32) }

#endif
