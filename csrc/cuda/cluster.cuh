/* cluster.cuh: what the blocks of a cluster share, and the barriers in shared memory by which they tell each other, compute
 * capability 9.0 and newer. Kernels for older GPUs are compiled from the same text, and never come here.
 * Above each function stands what its PTX means.
 */
#ifndef FUSEDNORM_CLUSTER_CUH
#define FUSEDNORM_CLUSTER_CUH

#include "copies.cuh"

#if __CUDA_ARCH__ >= 900
#define FN_CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define FN_CLUSTER_ASM(...)
#endif

/* ---- barriers in shared memory ------------------------------------------------------------------------------------------- */

/* A phase ends after `arrivals` arrivals, and after the bytes that were announced. */
FN_DEVICE void fn_barrier_init(uint32_t barrier, uint32_t arrivals) {
    FN_CLUSTER_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/* The initialised barriers are visible to the other blocks of the cluster and to the copy engine. */
FN_DEVICE void fn_barrier_fence(void) { FN_CLUSTER_ASM("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/* Arrives, and announces bytes. */
FN_DEVICE void fn_barrier_expect(uint32_t barrier, uint32_t bytes) {
    FN_CLUSTER_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

FN_DEVICE void fn_barrier_arrive(uint32_t barrier) {
    FN_CLUSTER_ASM("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* At the same place in block `rank` of the cluster. The scope is the block's: nothing is published but that the tensor core has
 * read its operands, and the cluster's scope would make it a fence of the whole GPU. */
FN_DEVICE void fn_barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    FN_CLUSTER_ASM("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
                   "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier),
                   "r"(rank)
                   : "memory");
}

/* Until the phase of this parity is over. */
FN_DEVICE void fn_barrier_wait(uint32_t barrier, uint32_t parity) {
    FN_CLUSTER_ASM(
        "{.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

/* The same for a long wait: asking over and over takes a scheduler's turns from the warps that multiply, so the thread is to
 * sleep up to 10 ms at a time. */
FN_DEVICE void fn_barrier_await(uint32_t barrier, uint32_t parity) {
    FN_CLUSTER_ASM("{.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, 10000000;\n"
                   "@!p bra again;}" ::"r"(barrier),
                   "r"(parity)
                   : "memory");
}

/* As before, where what other blocks of the cluster sent is read afterwards. */
FN_DEVICE void fn_barrier_wait_for_cluster(uint32_t barrier, uint32_t parity) {
    FN_CLUSTER_ASM("{.reg .pred p;\nagain: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
                   "@!p bra again;}" ::"r"(barrier),
                   "r"(parity)
                   : "memory");
}

/* ---- blocks -------------------------------------------------------------------------------------------------------------- */

FN_DEVICE uint32_t fn_cluster_rank(void) {
    uint32_t rank = 0;
    FN_CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* All threads of all blocks arrive, then wait until all have. What each wrote before it arrived is seen by all after the wait;
 * the relaxed arrival says nothing of that. */
FN_DEVICE void fn_cluster_arrive(void) { FN_CLUSTER_ASM("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
FN_DEVICE void fn_cluster_arrive_relaxed(void) {
    FN_CLUSTER_ASM("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
FN_DEVICE void fn_cluster_wait(void) { FN_CLUSTER_ASM("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/* All threads of all blocks of the cluster. Orders nothing: what must be seen was fenced before. */
FN_DEVICE void fn_cluster_sync(void) {
    FN_CLUSTER_ASM("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

/* Of the same place in another block's shared memory. */
FN_DEVICE uint32_t fn_address_in_block(uint32_t at, uint32_t rank) {
    FN_CLUSTER_ASM("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(rank));
    return at;
}

/* Numbers on their way to another block; they count as bytes of that block's barrier. Both addresses are of that block. */
FN_DEVICE void fn_send(uint32_t to, float v, uint32_t barrier) {
    FN_CLUSTER_ASM("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                   "r"(__float_as_uint(v)), "r"(barrier)
                   : "memory");
}

FN_DEVICE void fn_send4(uint32_t to, float4 v, uint32_t barrier) {
    FN_CLUSTER_ASM(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
        "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
        : "memory");
}

/* The stage is free, says this warp to all blocks that write to it. */
template <int SHARERS> FN_DEVICE void fn_release(uint32_t barrier, int lane) {
    if constexpr (SHARERS > 1) {
        if (lane < SHARERS) fn_barrier_arrive_at(barrier, lane);
    } else {
        if (lane == 0) fn_barrier_arrive(barrier);
    }
}

#endif
