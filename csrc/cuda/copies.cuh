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

/* ---- numbers in shared memory ------------------------------------------------------------------------------------------- */

FN_DEVICE float load_float(uint32_t at) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
    return v;
}

FN_DEVICE uint32_t load_word(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

FN_DEVICE float2 load_two(uint32_t at) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
    return v;
}

FN_DEVICE float4 load_floats(uint32_t at) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

FN_DEVICE void store_floats(uint32_t at, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

FN_DEVICE float4 add_floats(float4 a, float4 b) {
    return make_float4(fn_add(a.x, b.x), fn_add(a.y, b.y), fn_add(a.z, b.z), fn_add(a.w, b.w));
}

/* The sums of the parts of k, COUNT of them: those of each half are added in order, then the halves. Where there is no part, v
 * has -0, to which everything may be added and is left as it was. */
template <int COUNT> FN_DEVICE float4 fold_parts(const float4 v[COUNT]) {
    float4 low = v[0], high = v[COUNT / 2];
#pragma unroll
    for (int i = 1; i < COUNT / 2; i++) {
        low = add_floats(low, v[i]);
        high = add_floats(high, v[COUNT / 2 + i]);
    }
    return add_floats(low, high);
}

#endif
