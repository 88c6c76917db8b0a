/* copies.cuh: copies from global to shared memory that go on while a thread does other work. */
#ifndef FUSEDNORM_COPIES_CUH
#define FUSEDNORM_COPIES_CUH

#include "vector.cuh"

#define FN_MEMBER __device__ __forceinline__

template <int BYTES> FN_DEVICE void copy_async(uint32_t shared, const char *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(BYTES) : "memory");
}

/* BYTES bytes, of which `bytes` are read, the others +0. */
template <int BYTES> FN_DEVICE void copy_part_async(uint32_t shared, const char *from, int bytes) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}

FN_DEVICE void close_copies(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* All but the latest LATER groups are there, as far as this thread copied them. */
template <int LATER> FN_DEVICE void wait_for_copies(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

FN_DEVICE uint32_t shared_at(const void *shared) { return (uint32_t)__cvta_generic_to_shared(shared); }

#endif
