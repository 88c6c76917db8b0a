/* mm_gate.cuh: products with few weights and few tokens, a warp for each chunk of k.
 *
 * All of a chunk is asked for at once: what limits such a product is how long the first bytes take, not how many they are.
 * Each warp of a cluster sends its chunk's sums to the blocks that own their tokens; when all are there, the owners add them
 * up in the order of the chunks. Moves: the weights once for each TOKENS tokens, the tokens once for each WEIGHTS weights, out once.
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

/* Sums of a chunk go to the blocks that will add them up: token t to block t % owners, owners a power of two. By way of
 * `scratch`, so that what travels are whole groups of neighbours. */
template <int WEIGHTS, int TOKENS>
FN_DEVICE void send_sums(uint32_t kept, uint32_t scratch, int owner_bits, int tokens,
                         const float sums[WEIGHTS / 16][TOKENS / 8][4]) {
    constexpr int PITCH = fn_kept<WEIGHTS, TOKENS>::pitch, UNITS = WEIGHTS / 4;
    __syncwarp(); /* all lanes have read the operands that lay there */
    keep_sums<WEIGHTS, TOKENS>(scratch, PITCH, 0, 0, sums);
    __syncwarp();
#pragma unroll
    for (int i = threadIdx.x % 32; i < TOKENS * UNITS; i += 32) {
        const int token = i / UNITS, at = i % UNITS * 16;
        if (token >= tokens) break;
        const uint32_t there = kept + (token >> owner_bits) * PITCH + at;
        store_in_cluster(address_in_cluster(there, token & ((1 << owner_bits) - 1)),
                         load_floats(scratch + token * PITCH + at));
    }
}

/* chunks_each warps. */
template <fn_dtype D, int WEIGHTS, int TOKENS>
__global__ void __launch_bounds__(128, 1) mm_gate(const __grid_constant__ fn_mm_tensor_args a) {
    constexpr int BYTES = fn_gate_bytes<WEIGHTS, TOKENS>::operands;
    using KEPT = fn_kept<WEIGHTS, TOKENS>;
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = rank_in_cluster();
    const int owner_bits = 31 - __clz(a.cluster), chunk = rank * a.chunks_each + warp;
    const uint32_t weights = shared_at(shared) + warp * BYTES, kept = shared_at(shared) + a.chunks_each * BYTES;
    const uint32_t tokens = weights + FN_GATE_TILES * WEIGHTS * FN_TILE_ROW;
    const int64_t weight = (int64_t)(blockIdx.x / a.cluster) * WEIGHTS, token = (int64_t)blockIdx.y * TOKENS;
    const int64_t k = (int64_t)chunk * FN_MM_GATE_CHUNK, left = a.tokens.rows - token;
    const fn_tile_copy<true, WEIGHTS, 32> weights_from(a.weights, weight, a.k, lane);
    const fn_tile_copy<true, TOKENS, 32> tokens_from(a.tokens, token, a.k, lane);
    const bool inner = k + FN_MM_GATE_CHUNK <= a.k;
    if (a.early)
#pragma unroll
        for (int tile = 0; tile < FN_GATE_TILES; tile++)
            weights_from.copy(weights + tile * WEIGHTS * FN_TILE_ROW, k + tile * FN_MM_TILE_K);
    arrive_in_cluster(); /* a block is written to once it has begun */
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
    const int slot_bytes = KEPT::bytes >> owner_bits; /* of a chunk, in each owner */
    wait_for_cluster_arrivals();
    if (chunk < a.chunks)
        send_sums<WEIGHTS, TOKENS>(kept + chunk * slot_bytes, weights, owner_bits, left < TOKENS ? (int)left : TOKENS,
                                   sums);
    meet_cluster();
    if (rank < 1 << owner_bits) {
        const int slots = TOKENS >> owner_bits;
#pragma unroll 1
        for (int i = threadIdx.x; i < slots * (WEIGHTS / 4); i += blockDim.x) {
            const int slot = i / (WEIGHTS / 4), w = i % (WEIGHTS / 4) * 4, t = slot << owner_bits | rank;
            if (t >= left || weight + w >= a.weights.rows) continue;
            const uint32_t at = kept + slot * KEPT::pitch + w * 4;
            float4 total = load_floats(at);
#pragma unroll 8
            for (int c = 1; c < a.chunks; c++) total = add_floats(total, load_floats(at + c * slot_bytes));
            store_sums(a, total, weight + w, token + t);
        }
    }
}

#define FN_MM_GATE(D, WEIGHTS, TOKENS)                                                                                 \
    (const void *)mm_gate<D, WEIGHTS, TOKENS>, WEIGHTS, TOKENS, 32, fn_gate_bytes<WEIGHTS, TOKENS>::operands,          \
        fn_kept<WEIGHTS, TOKENS>::bytes, true, true

#endif
