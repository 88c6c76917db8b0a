/* hopper.cuh: what sm_90a has and C does not, besides clusters: the tensor copy engine, warpgroup products.
 * Above each function stands what its PTX means.
 */
#ifndef FUSEDNORM_HOPPER_CUH
#define FUSEDNORM_HOPPER_CUH

#include "cluster.cuh"
#include "dependents.cuh"

#include <cuda.h>

/* ---- barriers of threads -------------------------------------------------------------------------------------------------- */

/* Barrier 1 to 15 of the block opens when `threads` threads, in whole warps, have come: those that stay, and those that pass. */
FN_DEVICE void fn_threads_wait(uint32_t barrier, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

FN_DEVICE void fn_threads_pass(uint32_t barrier, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* ---- the copy engine ----------------------------------------------------------------------------------------------------- */

FN_DEVICE void fn_prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* What is read once need not stay in L2: as the copies take it. */
FN_DEVICE uint64_t fn_evict_first(void) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}

/* The map's box at (column, row) to shared memory; what lies outside of the matrix arrives as zeros. */
FN_DEVICE void fn_box_load(uint32_t to, const CUtensorMap *map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
            "r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

FN_DEVICE void fn_box_load_hint(uint32_t to, const CUtensorMap *map, int column, int row, uint32_t barrier,
                                uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
                 : "memory");
}

/* To the same place in all blocks of the mask, each of whose barriers (at the same place, too) counts the bytes. */
FN_DEVICE void fn_box_multicast(uint32_t to, const CUtensorMap *map, int column, int row, uint32_t barrier,
                                uint16_t blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
                 : "memory");
}

FN_DEVICE void fn_box_multicast_hint(uint32_t to, const CUtensorMap *map, int column, int row, uint32_t barrier,
                                     uint16_t blocks, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks), "l"(policy)
                 : "memory");
}

/* Shared memory to the map's box, which begins at a multiple of 16 bytes (elsewhere: an illegal instruction); what lies outside of the
 * matrix is not written, if its rows are multiples of 16 bytes (else up to 16 bytes are). */
FN_DEVICE void fn_box_store(const CUtensorMap *map, int column, int row, uint32_t from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
                 "r"(column), "r"(row), "r"(from)
                 : "memory");
}

FN_DEVICE void fn_stores_commit(void) { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/* Until all but the last PENDING groups of this thread's stores have read their shared memory. */
template <int PENDING> FN_DEVICE void fn_stores_read(void) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

/* What this thread wrote to shared memory comes before what the copy engine will read. */
FN_DEVICE void fn_fence_for_engine(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* ---- warpgroup products ---------------------------------------------------------------------------------------------------- */

/* A tile of rows of 128 bytes in groups of 8, swizzled by 128 bytes, as the unit reads it: address / 16; 1024 bytes from one
 * group of rows to the next; the swizzle. 16 columns further on: + 2. */
FN_DEVICE uint64_t fn_tile(uint32_t address) {
    return (uint64_t)((address & 0x3ffffu) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

template <int REGISTERS> FN_DEVICE void fn_registers_up(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> FN_DEVICE void fn_registers_down(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* The registers of the sums are as the program left them. */
FN_DEVICE void fn_products_begin(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

FN_DEVICE void fn_products_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* Until all but the last PENDING groups are done. */
template <int PENDING> FN_DEVICE void fn_products_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define FN_P4(a, b, c, d) "%" #a ",%" #b ",%" #c ",%" #d
#define FN_P8(a, b, c, d, e, f, g, h) FN_P4(a, b, c, d) "," FN_P4(e, f, g, h)
#define FN_P16 FN_P8(0, 1, 2, 3, 4, 5, 6, 7) "," FN_P8(8, 9, 10, 11, 12, 13, 14, 15)
#define FN_P32 FN_P16 "," FN_P8(16, 17, 18, 19, 20, 21, 22, 23) "," FN_P8(24, 25, 26, 27, 28, 29, 30, 31)
#define FN_P64                                                                                                         \
    FN_P32 "," FN_P8(32, 33, 34, 35, 36, 37, 38, 39) "," FN_P8(40, 41, 42, 43, 44, 45, 46, 47) "," FN_P8(              \
        48, 49, 50, 51, 52, 53, 54, 55) "," FN_P8(56, 57, 58, 59, 60, 61, 62, 63)
#define FN_P24 FN_P16 "," FN_P8(16, 17, 18, 19, 20, 21, 22, 23)
#define FN_P36 FN_P32 "," FN_P4(32, 33, 34, 35)
#define FN_P48 FN_P32 "," FN_P8(32, 33, 34, 35, 36, 37, 38, 39) "," FN_P8(40, 41, 42, 43, 44, 45, 46, 47)
#define FN_P40 FN_P32 "," FN_P8(32, 33, 34, 35, 36, 37, 38, 39)
#define FN_P64_TO_79 FN_P8(64, 65, 66, 67, 68, 69, 70, 71) "," FN_P8(72, 73, 74, 75, 76, 77, 78, 79)
#define FN_P80_TO_95 FN_P8(80, 81, 82, 83, 84, 85, 86, 87) "," FN_P8(88, 89, 90, 91, 92, 93, 94, 95)
#define FN_P96_TO_111 FN_P8(96, 97, 98, 99, 100, 101, 102, 103) "," FN_P8(104, 105, 106, 107, 108, 109, 110, 111)
#define FN_P80 FN_P64 "," FN_P64_TO_79
#define FN_P96 FN_P80 "," FN_P80_TO_95
#define FN_P112 FN_P96 "," FN_P96_TO_111
#define FN_R4(d, i) "+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3])
#define FN_R8(d, i) FN_R4(d, i), FN_R4(d, (i) + 4)
#define FN_R16(d, i) FN_R8(d, i), FN_R8(d, (i) + 8)
#define FN_R24(d, i) FN_R16(d, i), FN_R8(d, (i) + 16)
#define FN_R32(d, i) FN_R16(d, i), FN_R16(d, (i) + 16)
#define FN_R64(d, i) FN_R32(d, i), FN_R32(d, (i) + 32)
#define FN_R80(d, i) FN_R64(d, i), FN_R16(d, (i) + 64)
#define FN_R96(d, i) FN_R64(d, i), FN_R32(d, (i) + 64)
#define FN_R112(d, i) FN_R96(d, i), FN_R16(d, (i) + 96)
#define FN_R36(d, i) FN_R32(d, i), FN_R4(d, (i) + 32)
#define FN_R48(d, i) FN_R32(d, i), FN_R16(d, (i) + 32)
#define FN_R40(d, i) FN_R32(d, i), FN_R8(d, (i) + 32)

#define FN_PRODUCT(N, TYPE, COUNT, LIST, A, B, ADD)                                                                    \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #ADD ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST "}, %" #A ", %" #B          \
                 ", p, 1, 1, 0, 0;}"                                                                                   \
                 : FN_R##COUNT(d, 0)                                                                                   \
                 : "l"(a), "l"(b), "r"(add))
#define FN_PRODUCT_OF(D, N, COUNT, LIST, A, B, ADD)                                                                    \
    if constexpr (D == FN_BFLOAT16) FN_PRODUCT(N, "bf16", COUNT, LIST, A, B, ADD);                                     \
    else FN_PRODUCT(N, "f16", COUNT, LIST, A, B, ADD)

/* d = a * b^T + (add ? d : 0) for a of 64 rows, b of N rows, 16 columns. Of d, 64 x N, a thread of warp w and lane l has
 * d[4j + i]: row 16w + l / 4 + 8 * (i / 2), column 8j + 2 * (l % 4) + i % 2. Asynchronous. */
template <fn_dtype D, int N> FN_DEVICE void fn_product(float d[N / 2], uint64_t a, uint64_t b, uint32_t add) {
    static_assert(N == 8 || N == 16 || N == 32 || N == 48 || N == 64 || N == 72 || N == 80 || N == 96 || N == 128 ||
                      N == 160 || N == 192 || N == 224,
                  "");
    if constexpr (N == 8) {
        FN_PRODUCT_OF(D, 8, 4, FN_P4(0, 1, 2, 3), 4, 5, 6);
    }
    if constexpr (N == 16) {
        FN_PRODUCT_OF(D, 16, 8, FN_P8(0, 1, 2, 3, 4, 5, 6, 7), 8, 9, 10);
    }
    if constexpr (N == 32) {
        FN_PRODUCT_OF(D, 32, 16, FN_P16, 16, 17, 18);
    }
    if constexpr (N == 48) {
        FN_PRODUCT_OF(D, 48, 24, FN_P24, 24, 25, 26);
    }
    if constexpr (N == 64) {
        FN_PRODUCT_OF(D, 64, 32, FN_P32, 32, 33, 34);
    }
    if constexpr (N == 72) {
        FN_PRODUCT_OF(D, 72, 36, FN_P36, 36, 37, 38);
    }
    if constexpr (N == 80) {
        FN_PRODUCT_OF(D, 80, 40, FN_P40, 40, 41, 42);
    }
    if constexpr (N == 96) {
        FN_PRODUCT_OF(D, 96, 48, FN_P48, 48, 49, 50);
    }
    if constexpr (N == 128) {
        FN_PRODUCT_OF(D, 128, 64, FN_P64, 64, 65, 66);
    }
    if constexpr (N == 160) {
        FN_PRODUCT_OF(D, 160, 80, FN_P80, 80, 81, 82);
    }
    if constexpr (N == 192) {
        FN_PRODUCT_OF(D, 192, 96, FN_P96, 96, 97, 98);
    }
    if constexpr (N == 224) {
        FN_PRODUCT_OF(D, 224, 112, FN_P112, 112, 113, 114);
    }
}

#endif
