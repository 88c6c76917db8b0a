/* mm_tile.cuh: products of 16-bit operands, a tile of out for each block.
 *
 * For each chunk, in ascending order: sum = 0; for each 16 k, in ascending order: sum += 16 products (one step of the tensor
 * core). total = the first chunk's sum, then total + sum for each further one. out = round(total + bias).
 *
 * STAGES tiles of 64 k of both operands are on their way to shared memory while one is worked on. A cluster of blocks may
 * share the chunks of a tile: then each keeps its chunks' sums in shared memory, and when all are there each adds up a part
 * of the tile, reading every block's. Moves: each operand once for each tile of the other; out once.
 */
#ifndef FUSEDNORM_MM_TILE_CUH
#define FUSEDNORM_MM_TILE_CUH

#include "mma.cuh"

template <int WEIGHTS, int TOKENS, int STAGES> struct fn_tile_bytes {
    static constexpr int one = (WEIGHTS + TOKENS) * FN_TILE_ROW, all = STAGES * one;
};

/* WARPS_W x WARPS_T warps share a tile of WEIGHTS x TOKENS. */
template <fn_dtype D, int WEIGHTS, int TOKENS, int WARPS_W, int WARPS_T, int STAGES, bool CHUNKED, bool WHOLE>
__global__ void __launch_bounds__(32 * WARPS_W * WARPS_T, 1) mm_tile(const __grid_constant__ fn_mm_tensor_args a) {
    constexpr int THREADS = 32 * WARPS_W * WARPS_T, OWN_W = WEIGHTS / WARPS_W, OWN_T = TOKENS / WARPS_T;
    constexpr int TILE_BYTES = fn_tile_bytes<WEIGHTS, TOKENS, STAGES>::one, SUMS = OWN_W / 16 * (OWN_T / 8) * 4;
    using KEPT = fn_kept<WEIGHTS, TOKENS>;
    static_assert(KEPT::bytes <= STAGES * TILE_BYTES, "the sums fit where the tiles were");
    extern __shared__ __align__(128) char shared[];
    const uint32_t tiles = shared_at(shared), kept = tiles + STAGES * TILE_BYTES;
    const int thread = threadIdx.x, warp = thread / 32;
    const int weight_row = warp % WARPS_W * OWN_W, token_row = warp / WARPS_W * OWN_T;
    const bool shared_out = CHUNKED && a.cluster > 1; /* blocks of a cluster share the chunks */
    const int rank = shared_out ? rank_in_cluster() : 0;
    const int64_t weight = (int64_t)(blockIdx.x / (CHUNKED ? a.cluster : 1)) * WEIGHTS,
                  token = (int64_t)blockIdx.y * TOKENS;
    const int64_t all_tiles = (a.k + FN_MM_TILE_K - 1) / FN_MM_TILE_K;
    const int64_t first = CHUNKED ? rank * a.chunks_each * a.chunk_tiles : 0;
    const int64_t wanted = CHUNKED ? first + a.chunks_each * a.chunk_tiles : all_tiles;
    const int64_t end = wanted < all_tiles ? wanted : all_tiles;

    const fn_tile_copy<WHOLE, WEIGHTS, THREADS> weights(a.weights, weight, a.k, thread);
    const fn_tile_copy<WHOLE, TOKENS, THREADS> tokens(a.tokens, token, a.k, thread);
    int next_stage = 0, stage = 0;
    const auto copy = [&](int64_t tile) {
        if (tile < end) {
            const uint32_t to = tiles + next_stage * TILE_BYTES;
            weights.copy(to, tile * FN_MM_TILE_K);
            tokens.copy(to + WEIGHTS * FN_TILE_ROW, tile * FN_MM_TILE_K);
        }
        next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
        close_copies();
    };
    wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) copy(first + i);

    float sums[OWN_W / 16][OWN_T / 8][4] = {}, totals[OWN_W / 16][OWN_T / 8][4];
    float *const sum = &sums[0][0][0], *const total = &totals[0][0][0];
    int64_t chunk_end = first + (CHUNKED ? a.chunk_tiles : all_tiles);
    int chunk = 0;
    for (int64_t tile = first; tile < end; tile++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        copy(tile + STAGES - 1);
        const uint32_t from = tiles + stage * TILE_BYTES;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        add_tile<D, OWN_W, OWN_T>(sums, from, weight_row, from + WEIGHTS * FN_TILE_ROW, token_row);
        if (!CHUNKED || (tile + 1 != chunk_end && tile + 1 != end)) continue;
        if (shared_out) {
            keep_sums<OWN_W, OWN_T>(kept + chunk * KEPT::bytes, KEPT::pitch, weight_row, token_row, sums);
        } else {
#pragma unroll
            for (int i = 0; i < SUMS; i++) total[i] = chunk ? fn_add(total[i], sum[i]) : sum[i];
        }
#pragma unroll
        for (int i = 0; i < SUMS; i++) sum[i] = 0;
        chunk_end += a.chunk_tiles;
        chunk++;
    }
    let_dependents_start();

    if (shared_out) {
        meet_cluster();
        finish_tile<WEIGHTS, TOKENS>(a, kept, a.chunks, a.chunks_each, weight, token, rank * THREADS + thread,
                                     a.cluster * THREADS);
        meet_cluster(); /* no block leaves while another reads its sums */
    } else {
        wait_for_copies<0>();
        __syncthreads(); /* the tiles are done with: the sums take their place */
        if constexpr (CHUNKED) keep_sums<OWN_W, OWN_T>(tiles, KEPT::pitch, weight_row, token_row, totals);
        else keep_sums<OWN_W, OWN_T>(tiles, KEPT::pitch, weight_row, token_row, sums);
        __syncthreads();
        finish_tile<WEIGHTS, TOKENS>(a, tiles, 1, 1, weight, token, thread, THREADS);
    }
}

#define FN_MM_TILE(D, WEIGHTS, TOKENS, WARPS_W, WARPS_T, STAGES, CHUNKED, WHOLE)                                       \
    (const void *)mm_tile<D, WEIGHTS, TOKENS, WARPS_W, WARPS_T, STAGES, CHUNKED, WHOLE>, WEIGHTS, TOKENS,              \
        32 * (WARPS_W) * (WARPS_T), fn_tile_bytes<WEIGHTS, TOKENS, STAGES>::all, fn_kept<WEIGHTS, TOKENS>::bytes,      \
        CHUNKED, WHOLE

#endif
