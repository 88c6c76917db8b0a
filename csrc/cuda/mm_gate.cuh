/* mm_gate.cuh: products with few weights and few tokens, a warp for each chunk of k.
 *
 * All of a chunk is asked for at once: what limits such a product is how long the first bytes take, not how many they are.
 * Each warp of a cluster leaves its chunk's sums in shared memory; when all are there, each warp adds up a part of them in
 * the order of the chunks. Moves: the weights once for each TOKENS tokens, the tokens once for each WEIGHTS weights, out once.
 */
#ifndef FUSEDNORM_MM_GATE_CUH
#define FUSEDNORM_MM_GATE_CUH

#include "mma.cuh"

enum { FN_GATE_TILES = FN_MM_GATE_CHUNK / FN_MM_TILE_K };

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

/* chunks_each warps. */
template <fn_dtype D, int WEIGHTS, int TOKENS>
__global__ void __launch_bounds__(128, 1) mm_gate(const __grid_constant__ fn_mm_tensor_args a) {
    constexpr int BYTES = FN_GATE_TILES * (WEIGHTS + TOKENS) * FN_TILE_ROW;
    using KEPT = fn_kept<WEIGHTS, TOKENS>;
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = rank_in_cluster();
    const uint32_t weights = shared_at(shared) + warp * BYTES, kept = shared_at(shared) + a.chunks_each * BYTES;
    const uint32_t tokens = weights + FN_GATE_TILES * WEIGHTS * FN_TILE_ROW;
    const int64_t weight = (int64_t)(blockIdx.x / a.cluster) * WEIGHTS, token = (int64_t)blockIdx.y * TOKENS;
    const int64_t k = (int64_t)(rank * a.chunks_each + warp) * FN_MM_GATE_CHUNK;
    const fn_tile_copy<true, WEIGHTS, 32> weights_from(a.weights, weight, a.k, lane);
    const fn_tile_copy<true, TOKENS, 32> tokens_from(a.tokens, token, a.k, lane);
    if (a.early)
#pragma unroll
        for (int tile = 0; tile < FN_GATE_TILES; tile++)
            weights_from.copy(weights + tile * WEIGHTS * FN_TILE_ROW, k + tile * FN_MM_TILE_K);
    wait_for_previous();
#pragma unroll
    for (int tile = 0; tile < FN_GATE_TILES; tile++) {
        if (!a.early) weights_from.copy(weights + tile * WEIGHTS * FN_TILE_ROW, k + tile * FN_MM_TILE_K);
        tokens_from.copy(tokens + tile * TOKENS * FN_TILE_ROW, k + tile * FN_MM_TILE_K);
        close_copies();
    }
    let_dependents_start();
    float sums[WEIGHTS / 16][TOKENS / 8][4] = {};
    add_tiles<0, D, WEIGHTS, TOKENS>(sums, weights, tokens);
    keep_sums<WEIGHTS, TOKENS>(kept + warp * KEPT::bytes, KEPT::pitch, 0, 0, sums);
    meet_cluster();
    const int threads = 32 * a.chunks_each;
    finish_tile<WEIGHTS, TOKENS>(a, kept, a.chunks, a.chunks_each, weight, token, rank * threads + threadIdx.x,
                                 a.cluster * threads);
    meet_cluster(); /* no block leaves while another reads its sums */
}

#define FN_MM_GATE(D, WEIGHTS, TOKENS)                                                                                 \
    {                                                                                                                  \
        (const void *)mm_gate<D, WEIGHTS, TOKENS>, WEIGHTS, TOKENS, 32,                                                \
            FN_GATE_TILES *(WEIGHTS + TOKENS) * FN_TILE_ROW, fn_kept<WEIGHTS, TOKENS>::bytes, true, true               \
    }

#endif
