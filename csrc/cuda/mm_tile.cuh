/* mm_tile.cuh: products of 16-bit operands, a tile of out for each block.
 *
 * For each part of K, in ascending order, and for each chunk of a part: sum = 0; for each 16 k, in ascending order: sum += 16
 * products (one step of the tensor core). part = the first chunk's sum, then part + sum for each further one. half = the parts 0 to
 * 3, or 4 to 7, likewise. out = round(half + half + bias).
 *
 * STAGES tiles of 64 k of both operands are on their way to shared memory while one is worked on. A cluster of blocks may
 * share the parts: then each keeps its own in shared memory, and when all are there each folds a share of the tile, reading
 * every block's. Moves: each operand once for each tile of the other; out once.
 */
#ifndef FUSEDNORM_MM_TILE_CUH
#define FUSEDNORM_MM_TILE_CUH

#include "mma.cuh"

/* Parts' sums have places of their own: those of a block of a cluster, or of both halves. */
template <int WEIGHTS, int TOKENS, int STAGES, bool CHUNKED> struct fn_tile_bytes {
    static constexpr int one = (WEIGHTS + TOKENS) * FN_TILE_ROW, sums = fn_kept<WEIGHTS, TOKENS>::bytes;
    static constexpr int all = STAGES * one + (CHUNKED ? 2 * sums : 0);
};

/* WARPS_W x WARPS_T warps share a tile of WEIGHTS x TOKENS. */
template <fn_dtype D, int WEIGHTS, int TOKENS, int WARPS_W, int WARPS_T, int STAGES, bool CHUNKED, bool WHOLE>
__global__ void __launch_bounds__(32 * WARPS_W * WARPS_T, 1) mm_tile(const __grid_constant__ fn_mm_tensor_args a) {
    constexpr int THREADS = 32 * WARPS_W * WARPS_T, OWN_W = WEIGHTS / WARPS_W, OWN_T = TOKENS / WARPS_T;
    constexpr int TILE_BYTES = fn_tile_bytes<WEIGHTS, TOKENS, STAGES, CHUNKED>::one,
                  SUMS = OWN_W / 16 * (OWN_T / 8) * 4;
    using KEPT = fn_kept<WEIGHTS, TOKENS>;
    static_assert(KEPT::bytes <= STAGES * TILE_BYTES, "the sums fit where the tiles were");
    extern __shared__ __align__(128) char shared[];
    const uint32_t tiles = shared_at(shared), kept = tiles + STAGES * TILE_BYTES;
    const int thread = threadIdx.x, warp = thread / 32;
    const int weight_row = warp % WARPS_W * OWN_W, token_row = warp / WARPS_W * OWN_T;
    const int cluster = CHUNKED ? a.cluster : 1, rank = cluster > 1 ? (int)fn_cluster_rank() : 0;
    const int64_t weight = (int64_t)(blockIdx.x / cluster) * WEIGHTS, token = (int64_t)blockIdx.y * TOKENS;
    const int64_t all_tiles = (a.k + FN_MM_TILE_K - 1) / FN_MM_TILE_K;
    const int64_t first = CHUNKED ? rank * a.parts_each * a.cut.part_tiles : 0;
    const int64_t wanted = CHUNKED ? first + a.parts_each * a.cut.part_tiles : all_tiles;
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

    float sums[OWN_W / 16][OWN_T / 8][4] = {}, parts[OWN_W / 16][OWN_T / 8][4];
    float *const sum = &sums[0][0][0], *const part = &parts[0][0][0];
#pragma unroll
    for (int i = 0; i < SUMS; i++) part[i] = -0.0f; /* to which a sum may be added and is left as it was */
    int64_t part_begin = first, in_chunk = 0;
    int own = 0; /* the part's number among this block's */
    for (int64_t tile = first; tile < end; tile++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        copy(tile + STAGES - 1);
        const uint32_t from = tiles + stage * TILE_BYTES;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        add_tile<D, OWN_W, OWN_T>(sums, from, weight_row, from + WEIGHTS * FN_TILE_ROW, token_row);
        if (!CHUNKED) continue;
        const bool ends_part = tile + 1 == part_begin + a.cut.part_tiles || tile + 1 == end;
        if (++in_chunk != a.cut.chunk_tiles && !ends_part) continue;
#pragma unroll
        for (int i = 0; i < SUMS; i++) part[i] = fn_add(part[i], sum[i]), sum[i] = 0;
        in_chunk = 0;
        if (!ends_part) continue;
        /* A cluster's parts each have a place. One block's have that of their half, to which they are added. */
        const int half = own / (FN_MM_GATE_PARTS / 2);
        const uint32_t place = kept + (cluster > 1 ? own : half) * KEPT::bytes;
        if (cluster == 1 && own % (FN_MM_GATE_PARTS / 2))
            keep_sums<OWN_W, OWN_T, true>(place, KEPT::pitch, weight_row, token_row, parts);
        if (cluster == 1 && half == 1 && tile + 1 == end) {
            keep_sums<OWN_W, OWN_T, true>(kept, KEPT::pitch, weight_row, token_row, parts);
            keep_sums<OWN_W, OWN_T>(kept, KEPT::pitch, weight_row, token_row, parts);
        } else {
            keep_sums<OWN_W, OWN_T>(place, KEPT::pitch, weight_row, token_row, parts);
        }
#pragma unroll
        for (int i = 0; i < SUMS; i++) part[i] = -0.0f;
        part_begin = tile + 1;
        own++;
    }
    let_dependents_start();

    if constexpr (CHUNKED) {
        if (cluster > 1) {
            fn_cluster_arrive();
            fn_cluster_wait();
        } else {
            __syncthreads();
        }
        finish_tile<WEIGHTS, TOKENS>(a, kept, weight, token, rank * THREADS + thread, cluster * THREADS);
        if (cluster > 1) { /* no block leaves while another reads its sums */
            fn_cluster_arrive();
            fn_cluster_wait();
        }
    } else {
        wait_for_copies<0>();
        __syncthreads(); /* the tiles are done with: the sums take their place */
        keep_sums<OWN_W, OWN_T>(tiles, KEPT::pitch, weight_row, token_row, sums);
        __syncthreads();
        finish_tile<WEIGHTS, TOKENS>(a, tiles, weight, token, thread, THREADS);
    }
}

#define FN_TILE(D, WEIGHTS, TOKENS, WARPS_W, WARPS_T, STAGES, CHUNKED, WHOLE)                                          \
    (const void *)mm_tile<D, WEIGHTS, TOKENS, WARPS_W, WARPS_T, STAGES, CHUNKED, WHOLE>, WEIGHTS, TOKENS,              \
        32 * (WARPS_W) * (WARPS_T), fn_tile_bytes<WEIGHTS, TOKENS, STAGES, CHUNKED>::all,                              \
        fn_kept<WEIGHTS, TOKENS>::bytes, CHUNKED, WHOLE

/* By the tile's tokens, ascending, for each of (chunked, whole). */
#define FN_MM_TILE(D)                                                                                                  \
    {FN_TILE(D, 32, 8, 2, 1, 8, false, true)}, {FN_TILE(D, 32, 16, 2, 1, 8, false, true)},                             \
        {FN_TILE(D, 32, 32, 2, 1, 8, false, true)}, {FN_TILE(D, 64, 64, 2, 2, 6, false, true)},                        \
        {FN_TILE(D, 128, 128, 4, 2, 3, false, true)}, {FN_TILE(D, 16, 8, 1, 1, 8, true, true)},                        \
        {FN_TILE(D, 16, 32, 1, 1, 6, true, true)}, {FN_TILE(D, 64, 64, 2, 2, 4, true, true)},                          \
        {FN_TILE(D, 64, 128, 2, 4, 4, true, true)}, {FN_TILE(D, 32, 8, 2, 1, 4, false, false)},                        \
        {FN_TILE(D, 64, 64, 2, 2, 3, false, false)}, {FN_TILE(D, 16, 8, 1, 1, 4, true, false)}, {                      \
        FN_TILE(D, 64, 64, 2, 2, 3, true, false)                                                                       \
    }

#endif
