/* fold.cuh: a row's partial sums, held by threads, warps and blocks, to one total, in the order of the contract. */
#ifndef FUSEDNORM_FOLD_CUH
#define FUSEDNORM_FOLD_CUH

#include "cluster.cuh"
#include "launch.h"
#include "vector.cuh"

/* Of N numbers, N known: as if padded with +0 to a power of two. v + 0 is v, since no sum of squares is -0. */
template <int N> FN_DEVICE float fold_own(float v[N]) {
    constexpr int padded = N > 4 ? 8 : N > 2 ? 4 : N;
#pragma unroll
    for (int half = padded / 2; half >= 1; half /= 2)
#pragma unroll
        for (int i = 0; i < half; i++)
            if (i + half < N) v[i] = fn_add(v[i], v[i + half]);
    return v[0];
}

template <int WARPS> FN_DEVICE float fold_warps(const float *sums, int lane) {
    float v[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) v[w] = sums[w * FN_WARP + lane];
#pragma unroll
    for (int half = WARPS / 2; half >= 1; half /= 2)
#pragma unroll
        for (int w = 0; w < WARPS / 2; w++)
            if (w < half) v[w] = fn_add(v[w], v[w + half]);
    return v[0];
}

/* Leaves the sum in all lanes. PAIRED: a lane's place is its number with the lowest bit moved to the top. */
template <int LANES, bool PAIRED> FN_DEVICE float fold_lanes(float v) {
    if (PAIRED) v = fn_add(v, __shfl_xor_sync(0xffffffffu, v, 1));
#pragma unroll
    for (int distance = LANES / 2; distance >= (PAIRED ? 2 : 1); distance /= 2)
        v = fn_add(v, __shfl_xor_sync(0xffffffffu, v, distance));
    return v;
}

/* Which of a row's THREADS partial sums a thread holds. */
template <int THREADS, bool PAIRED> FN_DEVICE int place_of(int thread) {
    return PAIRED ? thread / 2 + thread % 2 * (THREADS / 2) : thread;
}

/* p: a half of two groups, of which the neighbour lane has the other halves. One group is folded here, one there. */
FN_DEVICE float fold8_with_neighbour(const float p[FN_GROUP]) {
    const bool odd = threadIdx.x % 2;
    float q[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
        q[j] = fn_add(odd ? p[4 + j] : p[j], __shfl_xor_sync(0xffffffffu, odd ? p[j] : p[4 + j], 1));
    return fn_add(fn_add(q[0], q[2]), fn_add(q[1], q[3]));
}

/* ---- a cluster ------------------------------------------------------------------------------------------------------------ */

/* Before the wait for the previous kernel, which hides it: no block goes on before the barriers of all blocks are there. Each
 * expects 8 sums from each block of the cluster; those that come before it says so are counted too. */
template <int BLOCKS> FN_DEVICE void open_exchange(uint64_t *arrived) {
    if (threadIdx.x == 0) {
        fn_barrier_init(shared_at(arrived), 1);
        fn_barrier_fence();
    }
    fn_cluster_arrive();
    fn_cluster_wait();
    if (threadIdx.x == 0) fn_barrier_expect(shared_at(arrived), BLOCKS * 8 * sizeof(float));
}

/* sums[rank * 8 + lane % 8] = v in every block of the cluster; by one warp, 8 lanes for a block. */
template <int BLOCKS> FN_DEVICE void send_to_cluster(float *sums, uint64_t *arrived, uint32_t rank, int lane, float v) {
    const uint32_t slot = shared_at(sums + rank * 8 + lane % 8), barrier = shared_at(arrived);
#pragma unroll
    for (int first = 0; first < BLOCKS; first += FN_WARP / 8) {
        const int block = first + lane / 8;
        if (block < BLOCKS) fn_send(fn_address_in_block(slot, block), v, fn_address_in_block(barrier, block));
    }
}

/* v[i], for each of ROWS rows: from a thread's own sum to the row's total, in all threads of all blocks that share it. */
template <int THREADS, int BLOCKS, int ROWS, bool PAIRED>
FN_DEVICE void fold_rows(float v[ROWS], uint32_t rank, float (*sums)[THREADS], float *received, uint64_t *arrived) {
    if constexpr (THREADS <= FN_WARP) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) v[i] = fold_lanes<THREADS, PAIRED>(v[i]);
    } else {
        const int lane = threadIdx.x % FN_WARP;
#pragma unroll
        for (int i = 0; i < ROWS; i++) sums[i][place_of<THREADS, PAIRED>(threadIdx.x)] = v[i];
        __syncthreads();
        if constexpr (BLOCKS == 1) {
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                v[i] = fold_lanes<FN_WARP, false>(fold_warps<THREADS / FN_WARP>(sums[i], lane));
        } else {
            static_assert(ROWS == 1, "a cluster exchanges the sums of one row");
            if (threadIdx.x < FN_WARP) {
                v[0] = fold_warps<THREADS / FN_WARP>(sums[0], lane);
                v[0] = fn_add(v[0], __shfl_xor_sync(0xffffffffu, v[0], 16));
                v[0] = fn_add(v[0], __shfl_xor_sync(0xffffffffu, v[0], 8));
                send_to_cluster<BLOCKS>(received, arrived, rank, lane, v[0]);
            }
            /* No block leaves before it has all sums, so none writes to one that has gone. */
            fn_barrier_wait_for_cluster(shared_at(arrived), 0);
            float from[BLOCKS];
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) from[block] = received[block * 8 + lane % 8];
            v[0] = fold_lanes<8, false>(fold_own<BLOCKS>(from));
        }
    }
}

#endif
