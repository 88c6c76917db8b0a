/* mm_fma.cuh: how operands reach shared memory, widened to fp32, for mm_fma.cu.
 *
 * Shared memory has a tile's elements by row, K consecutive k in each row. A row's units of 16 bytes are permuted,
 * so that neither reading nor writing meets a bank twice: unit u lies at u ^ fn_swizzle(row).
 */
#ifndef FUSEDNORM_MM_FMA_CUH
#define FUSEDNORM_MM_FMA_CUH

#include "copies.cuh"
#include "dependents.cuh"
#include "element.cuh"
#include "launch.h"
#include "mm_fma.h"

/* ---- tiles of an operand ----------------------------------------------------------------------------------------- */

/* Where an element lies in a tile. Sizes are powers of two, and a place is made of the bits of an index: the place of
 * a sum of indices without a common bit is the sum of the places, and its offset in shared memory the exclusive or of
 * the offsets. */
struct fn_mm_place {
    int row, k;
};

/* Rows that differ in bit 1 or 3 alone are 4 units apart; 4 rows that differ in bits 0 and 1, or 2 and 3, are 2 apart. */
FN_DEVICE constexpr int fn_swizzle(int row) { return ((row ^ row >> 2) & 3) * 2; }

/* In bytes. */
template <int K> FN_DEVICE constexpr int fn_mm_offset_in_row(fn_mm_place at) {
    return ((at.k / 4 ^ fn_swizzle(at.row)) * 4 + at.k % 4) * 4;
}

template <int K> FN_DEVICE constexpr int fn_mm_offset(fn_mm_place at) {
    return at.row * K * 4 + fn_mm_offset_in_row<K>(at);
}

/* The offset of a place from the offset of another without a common bit. */
template <int K> FN_DEVICE uint32_t fn_mm_further(uint32_t offset, fn_mm_place by) {
    return (offset ^ (uint32_t)fn_mm_offset_in_row<K>(by)) + by.row * K * 4;
}

/* What THREADS threads need to bring an operand's tiles, ROWS rows of K elements, one after the other. What lies
 * outside of the operand becomes +0. */
template <int ROWS, int K, int THREADS> struct fn_mm_source {
    static constexpr int BYTES = ROWS * K * 4, SINGLES = ROWS * K / THREADS, VECTORS = SINGLES / 4;
    static constexpr int GROUPS = ROWS / 4 < 4 ? ROWS / 4 : 4; /* of 4 rows that a warp reads together */
    static_assert(VECTORS * THREADS * 4 == ROWS * K && K % FN_WARP == 0, "whole rounds of threads");

    const char *next; /* this thread's first element of the next tile */
    int64_t left;     /* of k, from the tile after those that are known to be whole */
    int tiles;        /* of the chunk, the same */
    int whole_tiles;  /* that come first: only now and then is there more to be counted */
    int rows;         /* of the tile that there are */
    int row, k;       /* the place of this thread's first element */
    uint32_t offset;
    uint32_t raw[VECTORS][4]; /* FN_MM_HELD: 4 elements as loaded; those of 16 bits fill half of it */

    /* A warp has 32 k of a row, or 8 k of 4 rows. */
    FN_DEVICE constexpr fn_mm_place single(int index, bool along_rows) {
        return along_rows ? fn_mm_place{index / FN_WARP / (K / 8) * 4 + index / 8 % 4,
                                        index / FN_WARP % (K / 8) * 8 + index % 8}
                          : fn_mm_place{index / K, index % K};
    }

    /* The first of 4. A warp has some rows from end to end, or 8 k of up to 16 rows. */
    FN_DEVICE constexpr fn_mm_place vector(int index, bool along_rows) {
        constexpr int warp = 8 * GROUPS;
        return along_rows ? fn_mm_place{(index / warp / (K / 8) * GROUPS + index / 8 % GROUPS) * 4,
                                        index / warp % (K / 8) * 8 + index % 8}
                          : fn_mm_place{index / (K / 4), index % (K / 4) * 4};
    }

    FN_MEMBER void start(const fn_mm_fma_side &side, int64_t first_row, int64_t first_k, int64_t k_end) {
        const bool by_vector = side.access == FN_MM_COPIED || side.access == FN_MM_HELD;
        const fn_mm_place at = by_vector ? vector(threadIdx.x, side.along_rows) : single(threadIdx.x, side.along_rows);
        next = side.data + (first_row + at.row) * side.row_stride + (first_k + at.k) * side.k_stride;
        left = k_end - first_k;
        tiles = FN_MM_CHUNK / K;
        whole_tiles = 0;
        row = at.row, k = at.k;
        rows = (int)min(side.rows - first_row, (int64_t)ROWS);
        offset = fn_mm_offset<K>(at);
        asm volatile("" : "+r"(rows)); /* computed once, here */
    }

    /* Begins the next tile. Returns how many k it has for this thread: K if it is whole, in rows too. */
    FN_MEMBER int begin(const fn_mm_fma_side &side) {
        if (whole_tiles > 0) {
            whole_tiles--;
            return K;
        }
        if (tiles == 0) {
            tiles = FN_MM_CHUNK / K;
            next += side.chunk_step;
            left -= side.chunk_skip;
        }
        const int whole = rows == ROWS ? (int)min(left / K, (int64_t)tiles) : 0;
        const int here = (int)min(left - k, (int64_t)K - 1);
        const int passed = max(whole, 1);
        left -= passed * K;
        tiles -= passed;
        whole_tiles = max(whole - 1, 0);
        return whole > 0 ? K : here;
    }

    FN_MEMBER bool has(fn_mm_place more, int k_here) const { return row + more.row < rows && more.k < k_here; }

    /* All but FN_MM_HELD: to shared memory; all but FN_MM_ANY asynchronously. */
    FN_MEMBER void copy(const fn_mm_fma_side &side, char *shared) {
        if (side.access == FN_MM_HELD) return;
        const uint32_t to = shared_at(shared) + offset;
        const int k_here = begin(side);
        if (side.access == FN_MM_COPIED && k_here == K) {
#pragma unroll
            for (int own = 0; own < VECTORS; own++) {
                const fn_mm_place at = vector(own * THREADS, false);
                copy_async<16>(fn_mm_further<K>(to, at), next + at.row * side.row_stride);
            }
        } else if (side.access == FN_MM_COPIED) {
#pragma unroll
            for (int own = 0; own < VECTORS; own++) {
                const fn_mm_place at = vector(own * THREADS, false);
                const int bytes = has(at, k_here) ? min(k_here - at.k, 4) * 4 : 0;
                const char *const from = bytes ? next + at.row * side.row_stride : side.data;
                if (bytes == 0 || bytes == 16) copy_part_async<16>(fn_mm_further<K>(to, at), from, bytes);
                else /* what lies behind the row's end may be nobody's memory */
#pragma unroll 1
                    for (int e = 0; e < 16; e += 4)
                        copy_part_async<4>(fn_mm_further<K>(to, at) + e, e < bytes ? from + e : side.data,
                                           e < bytes ? 4 : 0);
            }
        } else if (side.access == FN_MM_COPIED_SINGLY) {
#pragma unroll 4
            for (int own = 0; own < SINGLES; own++) {
                const fn_mm_place at = single(own * THREADS, side.along_rows);
                const bool there = has(at, k_here);
                const char *const from = there ? next + at.row * side.row_stride + at.k * side.k_stride : side.data;
                copy_part_async<4>(fn_mm_further<K>(to, at), from, there ? 4 : 0);
            }
        } else {
#pragma unroll 1
            for (int own = 0; own < SINGLES; own++) {
                const fn_mm_place at = single(own * THREADS, side.along_rows);
                const char *const from = next + at.row * side.row_stride + at.k * side.k_stride;
                *(float *)(shared + fn_mm_further<K>(offset, at)) =
                    has(at, k_here) ? load_element(from, side.dtype) : 0;
            }
        }
        next += side.tile_step;
    }

    /* FN_MM_HELD: into registers. */
    FN_MEMBER void fetch(const fn_mm_fma_side &side) {
        if (side.access != FN_MM_HELD) return;
        const int k_here = begin(side);
#pragma unroll
        for (int own = 0; own < VECTORS; own++) {
            const fn_mm_place by_k = vector(own * THREADS, false), by_row = vector(own * THREADS, true);
            const fn_mm_place more = {side.along_rows ? by_row.row : by_k.row, side.along_rows ? by_row.k : by_k.k};
            const char *const at = next + more.row * side.row_stride + more.k * side.k_stride;
            raw[own][0] = raw[own][1] = raw[own][2] = raw[own][3] = 0;
            if (k_here != K && !has(more, k_here)) continue;
            if (side.dtype == FN_FLOAT32) {
                const uint4 v = *(const uint4 *)at;
                raw[own][0] = v.x, raw[own][1] = v.y, raw[own][2] = v.z, raw[own][3] = v.w;
            } else {
                const uint2 v = *(const uint2 *)at;
                raw[own][0] = v.x, raw[own][1] = v.y;
            }
        }
        next += side.tile_step;
    }

    FN_DEVICE void widen(const uint32_t raw[4], fn_dtype dtype, float f[4]) {
        switch (dtype) {
        case FN_FLOAT16: fn_unpack2_f16(raw[0], f, f + 1), fn_unpack2_f16(raw[1], f + 2, f + 3); return;
        case FN_BFLOAT16: fn_unpack2_bf16(raw[0], f, f + 1), fn_unpack2_bf16(raw[1], f + 2, f + 3); return;
        case FN_FLOAT32:
        case FN_DTYPE_COUNT: break;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) f[i] = __uint_as_float(raw[i]);
    }

    /* FN_MM_HELD: what fetch() brought. */
    FN_MEMBER void put(const fn_mm_fma_side &side, char *shared) {
        if (side.access != FN_MM_HELD) return;
#pragma unroll
        for (int own = 0; own < VECTORS; own++) {
            float f[4];
            widen(raw[own], side.dtype, f);
            if (!side.along_rows) {
                float4 *const to = (float4 *)(shared + fn_mm_further<K>(offset, vector(own * THREADS, false)));
                *to = make_float4(f[0], f[1], f[2], f[3]);
                continue;
            }
            const fn_mm_place first = vector(own * THREADS, true);
#pragma unroll
            for (int i = 0; i < 4; i++) *(float *)(shared + fn_mm_further<K>(offset, {first.row + i, first.k})) = f[i];
        }
    }
};

#endif
