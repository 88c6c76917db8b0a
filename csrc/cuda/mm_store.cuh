/* mm_store.cuh: the sums' way out of the registers: what all kernels share, and that of mm_wgmma.cuh.
 *
 * There a warp has 16 rows of sums. They go 128 bytes of a row at a time through 2 KB of shared memory that no other warp touches,
 * swizzled as the copy engine expects it (the 16-byte unit's number, exclusive-or the row's number modulo 8), so that neither
 * side meets bank conflicts.
 */
#ifndef FUSEDNORM_MM_STORE_CUH
#define FUSEDNORM_MM_STORE_CUH

#include "element.cuh"
#include "hopper.cuh"
#include "mm_hopper.h"

enum { FN_STAGING_BYTES = FN_STAGING_ROWS * FN_ATOM_BYTES };

/* Of one warp: a ring of buffers. */
typedef struct {
    uint32_t at, next;
} fn_staging;

/* Where tile `number` of `size` rows, or columns, begins, of `all`; a multiple of STEP. None begins so late that the
 * copy engine would have to fill in STEP or more behind the last, which takes it longer than to load them: the last tiles may
 * overlap, and write the same. */
template <uint32_t STEP> FN_DEVICE uint32_t fn_tile_begin(uint32_t number, uint32_t size, uint32_t all) {
    return min(number * size, (max(all, size) - size + STEP - 1) / STEP * STEP);
}

FN_DEVICE uint32_t fn_first_token(uint32_t number, uint32_t size, const fn_mm_out &to) {
    return fn_tile_begin<1>(number, size, to.rows);
}

/* The copy engine takes a box of out that begins elsewhere than at a multiple of 16 bytes for an illegal instruction. */
FN_DEVICE uint32_t fn_first_weight(uint32_t number, uint32_t size, const fn_mm_out &to) {
    return fn_tile_begin<8>(number, size, to.columns);
}

FN_DEVICE float fn_mm_bias(const fn_mm_out &to, uint32_t column) {
    return column < to.columns ? load_element(to.bias + column * to.bias_stride, to.bias_dtype) : 0;
}

/* sums += bias, COLUMNS of it. A lane loads every 32nd element, and has what it needs from the lanes that loaded it. */
template <int COLUMNS> FN_DEVICE void fn_add_bias(const fn_mm_out &to, float *sums, uint32_t column, int lane) {
#pragma unroll
    for (int part = 0; part < COLUMNS / 32; part++) {
        const float mine = fn_mm_bias(to, column + part * 32 + lane);
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float bias = __shfl_sync(0xffffffffu, mine, 8 * j + 2 * (lane % 4) + i);
                float *s = sums + part * 16 + 4 * j + i;
                s[0] = fn_add(s[0], bias);
                s[2] = fn_add(s[2], bias);
            }
    }
}

FN_DEVICE void fn_put(uint32_t to, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory"); }

FN_DEVICE void fn_put_half(uint32_t to, uint16_t v) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(v) : "memory");
}

FN_DEVICE void fn_put2(uint32_t to, float low, float high) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
}

/* The sums are not read before the products are done. */
template <int COUNT> FN_DEVICE void fn_keep_sums(float sums[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

/* Four 8 x 8 matrices of 16 bits; lane l gives the address of row l % 8 of matrix l / 8. */
FN_DEVICE void fn_put_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

FN_DEVICE uint32_t fn_pack2(float low, float high, fn_dtype dtype) {
    return dtype == FN_BFLOAT16 ? fn_pack2_bf16(low, high) : fn_pack2_f16(low, high);
}

/* WIDE: out is of 32 bits; else of 16. sums: of COLUMNS of a row, 128 bytes of them or, if not WIDE, 64; 4 for each 8 columns, as
 * fn_product leaves them. */
template <bool WIDE, int COLUMNS = FN_ATOM_BYTES / (WIDE ? 4 : 2)>
FN_DEVICE void fn_stage(uint32_t to, const float *sums, fn_dtype dtype, int lane) {
    if constexpr (WIDE) {
        /* Rows two apart would meet in the same banks at the same columns, and rows one apart do: odd rows take the columns of
         * the block two further on. */
        const int r = lane / 4, c = lane % 4;
        const bool odd = r & 1;
        const uint32_t at = (to + r * FN_ATOM_BYTES + (((c >> 1) ^ r) << 4) + (c & 1) * 8) ^ (odd ? 64u : 0u);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float *near = sums + 4 * j + 2 * half, *far = near + 8;
                const uint32_t place = (at ^ (uint32_t)(j << 5)) + half * 8 * FN_ATOM_BYTES;
                fn_put2(place, odd ? far[0] : near[0], odd ? far[1] : near[1]);
                fn_put2(place ^ 64u, odd ? near[0] : far[0], odd ? near[1] : far[1]);
            }
    } else {
        const int row = lane % 16;
        const uint32_t at = to + row * FN_ATOM_BYTES + (((lane / 16) ^ (row & 7)) << 4);
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j += 2) {
            const float *s = sums + 4 * j;
            fn_put_matrices(at ^ (uint32_t)(j << 4), fn_pack2(s[0], s[1], dtype), fn_pack2(s[2], s[3], dtype),
                            fn_pack2(s[4], s[5], dtype), fn_pack2(s[6], s[7], dtype));
        }
    }
}

/* What the copy engine cannot address: rows and columns one by one. */
template <bool WIDE, int COLUMNS = FN_ATOM_BYTES / (WIDE ? 4 : 2)>
FN_DEVICE void fn_copy_out(const fn_mm_out &to, uint32_t from, uint32_t row, uint32_t column, int lane) {
    constexpr int bytes = WIDE ? 4 : 2;
    for (uint32_t i = 0; i < FN_STAGING_ROWS && row + i < to.rows; i++)
        for (uint32_t c = lane; c < COLUMNS && column + c < to.columns; c += 32) {
            const uint32_t unit = c * bytes / 16,
                           at = from + i * FN_ATOM_BYTES + ((unit ^ (i & 7)) << 4) + c * bytes % 16;
            char *there = to.data + (int64_t)(row + i) * to.stride + (int64_t)(column + c) * bytes;
            if constexpr (WIDE) {
                uint32_t v;
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
                *(uint32_t *)there = v;
            } else {
                uint16_t v;
                asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
                *(uint16_t *)there = v;
            }
        }
}

/* 16 rows from `row`, BN columns from `column`. */
template <int BN, int BUFFERS, bool WIDE>
FN_DEVICE void fn_store_sums(const CUtensorMap *map, const fn_mm_out &to, float sums[BN / 2], int row, int column,
                             fn_staging *staging, int lane) {
    constexpr int columns = FN_ATOM_BYTES / (WIDE ? 4 : 2), rest = BN % columns;
    static_assert(rest == 0 || rest == 32, "");
    if (row >= (int)to.rows) return;
#pragma unroll
    for (int chunk = 0; chunk < BN / columns; chunk++) {
        const int first = column + chunk * columns;
        const uint32_t buffer = staging->at + staging->next * FN_STAGING_BYTES;
        if (to.bias) fn_add_bias<columns>(to, sums + chunk * columns / 2, (uint32_t)first, lane);
        if (lane == 0) fn_stores_read<BUFFERS - 1>();
        __syncwarp();
        fn_stage<WIDE>(buffer, sums + chunk * columns / 2, to.dtype, lane);
        if (to.by_engine) {
            fn_fence_for_engine();
            __syncwarp();
            if (lane == 0) {
                if (first < (int)to.columns) fn_box_store(map, first, row, buffer);
                fn_stores_commit();
            }
        } else {
            __syncwarp();
            fn_copy_out<WIDE>(to, buffer, (uint32_t)row, (uint32_t)first, lane);
        }
        staging->next = staging->next == BUFFERS - 1 ? 0 : staging->next + 1;
    }
    if constexpr (rest) { /* narrower than the map's boxes */
        const int first = column + BN - rest;
        float *const last = sums + (BN - rest) / 2;
        const uint32_t buffer = staging->at + staging->next * FN_STAGING_BYTES;
        if (to.bias) fn_add_bias<rest>(to, last, (uint32_t)first, lane);
        if (lane == 0) fn_stores_read<BUFFERS - 1>();
        __syncwarp();
        fn_stage<WIDE, rest>(buffer, last, to.dtype, lane);
        __syncwarp();
        fn_copy_out<WIDE, rest>(to, buffer, (uint32_t)row, (uint32_t)first, lane);
        if (lane == 0) fn_stores_commit(); /* an empty group: the buffer counts as the others do */
        staging->next = staging->next == BUFFERS - 1 ? 0 : staging->next + 1;
    }
}

#endif
