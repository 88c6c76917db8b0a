/* mm_dtype_lanes.h: the product written once for every instruction set with vectors of LANES floats.
 *
 * A file such as mm_dtype_avx2.c defines the vocabulary below and includes this file last; the bits are those of
 * mm_dtype_scalar.c because each of the 16 lanes sees the same fused multiply-adds in the same order.
 *
 *   LANES, vector                    floats in a vector, 4, 8 or 16, and its type
 *   TILE_ROWS, TILE_COLUMNS          of the largest tile, at most FN_MM_MOST_ROWS rows; its sums stay in registers, and
 *                                    are enough to hide an addition's latency
 *   zero, broadcast, add             +0 or x in all lanes; a + b
 *   multiply_add                     a * b + c, rounded once
 *   load_f32, load_f16, load_bf16    LANES elements from any address, widened
 *   load_part_f32, ...               load_part below, if HAS_MASKED_LOADS is defined
 *   store                            LANES floats
 *   fold_lanes                       the 16 lanes of one sum, folded by halves
 *   fold_tile                        the same for all sums of the largest tile, put or added where they belong; if
 *                                    HAS_FOLD_TILE is defined
 *   transpose16                      a 16 x 16 matrix of floats, to rows any number of floats apart
 *   PATH, PATH_NAME                  the table to define and its name
 */
#include "mm_dtype.h"

enum { PARTS = FN_MM_LANES / LANES };
_Static_assert(TILE_ROWS <= FN_MM_MOST_ROWS, "the table of tiles has room");

#define INLINE static inline __attribute__((always_inline))
/* The numbers are known to the compiler: sums live in registers. */
#define FOR_ROWS _Pragma("GCC unroll 4") for (int i = 0; i < rows; i++)
#define FOR_COLUMNS _Pragma("GCC unroll 4") for (int j = 0; j < columns; j++)
#define FOR_PARTS _Pragma("GCC unroll 4") for (int p = 0; p < PARTS; p++)

/* The value is in a register from here on. */
#if LANES == 4
#define KEEP(vector) __asm__("" : "+w"(vector))
#else
#define KEEP(vector) __asm__("" : "+v"(vector))
#endif

INLINE int size_of(fn_dtype dtype) { return dtype == FN_FLOAT32 ? 4 : 2; }

INLINE vector load(const char *p, fn_dtype dtype) {
    switch (dtype) {
    case FN_FLOAT16: return load_f16(p);
    case FN_BFLOAT16: return load_bf16(p);
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: break;
    }
    return load_f32(p);
}

/* The first `count` elements of LANES, then zeros; count may be below 0 or above LANES. */
INLINE vector load_part(const char *p, int64_t count, fn_dtype dtype) {
#if defined(HAS_MASKED_LOADS)
    switch (dtype) {
    case FN_FLOAT16: return load_part_f16(p, count);
    case FN_BFLOAT16: return load_part_bf16(p, count);
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: break;
    }
    return load_part_f32(p, count);
#else
    char copy[LANES * 4] = {0};
    if (count >= LANES) return load(p, dtype);
    if (count > 0) memcpy(copy, p, (size_t)(count * size_of(dtype)));
    return load(copy, dtype);
#endif
}

/* acc += a * b over the first `count` of 16 places k, and zeros in the others, for every output of the tile. `whole` is
 * known to the compiler: count is 16. */
INLINE void step(bool whole, int64_t count, vector (*acc)[TILE_COLUMNS][PARTS], int rows, int columns, const float *a,
                 const char *b, int64_t b_stride, fn_dtype b_dtype) {
    FOR_PARTS {
        vector y[TILE_COLUMNS];
        FOR_COLUMNS {
            const char *from = b + j * b_stride + p * LANES * size_of(b_dtype);
            y[j] = whole ? load(from, b_dtype) : load_part(from, count - p * LANES, b_dtype);
        }
        FOR_ROWS {
            vector x = load_f32(a + i * FN_MM_LANES + p * LANES);
            KEEP(x); /* gcc would load it again for each column: loads are what limits a small tile */
            FOR_COLUMNS acc[i][j][p] = multiply_add(x, y[j], acc[i][j][p]);
        }
    }
}

/* The lanes of every sum, folded, put or added where they belong. */
INLINE void put_sums(vector (*acc)[TILE_COLUMNS][PARTS], int rows, int columns, float *sums, int64_t sums_stride,
                     bool first) {
#if defined(HAS_FOLD_TILE)
    if (rows == TILE_ROWS && columns == TILE_COLUMNS) {
        fold_tile(acc, sums, sums_stride, first);
        return;
    }
#endif
    FOR_ROWS FOR_COLUMNS {
        float *sum = sums + i * sums_stride + j;
        const float folded = fold_lanes(acc[i][j]);
        *sum = first ? folded : *sum + folded;
    }
}

INLINE void tile(int rows, int columns, int source, const float *a, const char *b, int64_t b_stride, int64_t count,
                 float *sums, int64_t sums_stride, bool first) {
    const bool packed = source == FN_MM_PACKED;
    const fn_dtype dtype = packed ? FN_FLOAT32 : (fn_dtype)source;
    const int b_step = FN_MM_LANES * size_of(dtype) * (packed ? columns : 1);
    if (packed) {
        b_stride = FN_MM_LANES * sizeof(float);
        count = (count + FN_MM_LANES - 1) / FN_MM_LANES * FN_MM_LANES;
    }
    vector acc[TILE_ROWS][TILE_COLUMNS][PARTS];
    FOR_ROWS FOR_COLUMNS FOR_PARTS acc[i][j][p] = zero();
    for (; count >= FN_MM_LANES; count -= FN_MM_LANES) {
        /* b's rows may come from memory: those of the next tile, to the second-level cache. With bfloat16 weights of
         * 32 MiB, 36 GB/s at M = 1 instead of 20. Past the last row it fetches what no one needs, and cannot fault. */
        if (!packed) FOR_COLUMNS __builtin_prefetch(b + (j + columns) * b_stride, 0, 2);
        step(true, FN_MM_LANES, acc, rows, columns, a, b, b_stride, dtype);
        a += rows * FN_MM_LANES;
        b += b_step;
    }
    if (!packed && count > 0) step(false, count, acc, rows, columns, a, b, b_stride, dtype);
    put_sums(acc, rows, columns, sums, sums_stride, first);
}

#define DEFINE_TILE(name, rows, columns, source)                                                                       \
    static void name(const float *a, const char *b, int64_t b_stride, int64_t count, float *sums, int64_t sums_stride, \
                     bool first) {                                                                                     \
        tile(rows, columns, source, a, b, b_stride, count, sums, sums_stride, first);                                  \
    }
#define DEFINE_TILES(name, rows)                                                                                       \
    DEFINE_TILE(name##_f32_wide, rows, TILE_COLUMNS, FN_FLOAT32)                                                       \
    DEFINE_TILE(name##_f16_wide, rows, TILE_COLUMNS, FN_FLOAT16)                                                       \
    DEFINE_TILE(name##_bf16_wide, rows, TILE_COLUMNS, FN_BFLOAT16)                                                     \
    DEFINE_TILE(name##_packed_wide, rows, TILE_COLUMNS, FN_MM_PACKED)                                                  \
    DEFINE_TILE(name##_f32, rows, 1, FN_FLOAT32)                                                                       \
    DEFINE_TILE(name##_f16, rows, 1, FN_FLOAT16)                                                                       \
    DEFINE_TILE(name##_bf16, rows, 1, FN_BFLOAT16)                                                                     \
    DEFINE_TILE(name##_packed, rows, 1, FN_MM_PACKED)
DEFINE_TILES(one_row, 1)
DEFINE_TILES(two_rows, 2)
#if TILE_ROWS >= 3
DEFINE_TILES(three_rows, 3)
#endif
#if TILE_ROWS >= 4
DEFINE_TILES(four_rows, 4)
#endif

/* ---- columns: a vector holds one lane of neighbouring sums, and the lanes are in memory ----------------------------- */

enum { DEPTH = LANES == 8 ? 4 : 8, WIDTH = 2 }; /* of the largest step: k of one lane, vectors; AVX2 has 16 registers */
#define FOR_DEPTH _Pragma("GCC unroll 8") for (int d = 0; d < depth; d++)
#define FOR_WIDTH _Pragma("GCC unroll 2") for (int v = 0; v < width; v++)

/* One lane of `rows` x `width` vectors of outputs takes `depth` k. `part`: the elements of the one vector, LANES for a whole
 * one. a's k lie a_step floats apart, b's b_step bytes, the rows' sums sums_step floats. */
INLINE void column_step(int depth, int width, int64_t part, const float *a, int64_t a_step, int64_t rows, const char *b,
                        int64_t b_step, fn_dtype dtype, float *sums, int64_t sums_step) {
    vector y[DEPTH][WIDTH];
    FOR_DEPTH FOR_WIDTH {
        const char *from = b + d * b_step + v * LANES * size_of(dtype);
        y[d][v] = part >= LANES ? load(from, dtype) : load_part(from, part, dtype);
        __builtin_prefetch(from + DEPTH * b_step, 0, 2); /* past the last k it fetches what no one needs */
    }
    for (int64_t i = 0; i < rows; i++, a += FN_MM_LANES, sums += sums_step) {
        vector sum[WIDTH];
        FOR_WIDTH sum[v] = load_f32(sums + v * LANES);
        FOR_DEPTH {
            const vector x = broadcast(a[d * a_step]);
            FOR_WIDTH sum[v] = multiply_add(x, y[d][v], sum[v]);
        }
        FOR_WIDTH store(sums + v * LANES, sum[v]);
    }
}

INLINE void column_steps(int depth, int64_t columns, const float *a, int64_t a_step, int64_t rows, const char *b,
                         int64_t b_step, fn_dtype dtype, float *sums, int64_t sums_step) {
    const int size = size_of(dtype);
    int64_t j = 0;
    for (; j + WIDTH * LANES <= columns; j += WIDTH * LANES)
        column_step(depth, WIDTH, LANES, a, a_step, rows, b + j * size, b_step, dtype, sums + j, sums_step);
    for (; j < columns; j += LANES)
        column_step(depth, 1, columns - j, a, a_step, rows, b + j * size, b_step, dtype, sums + j, sums_step);
}

/* The sums of a row from its lanes, which are lane_size floats apart. `padded`: the contract adds 0 * 0 to some of the lanes
 * at last, which shows where all are -0. */
INLINE void fold_columns(const float *lanes, int64_t lane_size, int64_t columns, bool padded, float *sums, bool first) {
    for (int64_t j = 0; j < columns; j += LANES) {
        vector lane[FN_MM_LANES];
        float copy[LANES];
        _Pragma("GCC unroll 16") for (int l = 0; l < FN_MM_LANES; l++) lane[l] = load_f32(lanes + l * lane_size + j);
        _Pragma("GCC unroll 8") for (int l = 0; l < 8; l++) lane[l] = add(lane[l], lane[l + 8]);
        _Pragma("GCC unroll 4") for (int l = 0; l < 4; l++) lane[l] = add(lane[l], lane[l + 4]);
        vector chunk = add(add(lane[0], lane[2]), add(lane[1], lane[3]));
        if (padded) chunk = add(chunk, zero());
        const int64_t left = columns - j;
        if (left >= LANES) store(sums + j, first ? chunk : add(load_f32(sums + j), chunk));
        else {
            memcpy(copy, sums + j, (size_t)left * sizeof *copy);
            store(copy, first ? chunk : add(load_f32(copy), chunk));
            memcpy(sums + j, copy, (size_t)left * sizeof *copy);
        }
    }
}

INLINE void columns_as(fn_dtype dtype, const float *a, int64_t rows, const char *b, int64_t k_stride, int64_t columns,
                       int64_t count, float *lanes, float *sums, int64_t sums_stride, bool first) {
    const int64_t step = (columns + LANES - 1) / LANES * LANES, lane_size = rows * step;
    const int64_t a_step = rows * FN_MM_LANES, b_step = FN_MM_LANES * k_stride;
    memset(lanes, 0, (size_t)(FN_MM_LANES * lane_size) * sizeof *lanes);
    for (int64_t k = 0, depth; k < count; k += depth * FN_MM_LANES) {
        depth = count - k >= DEPTH * FN_MM_LANES ? DEPTH : count - k >= DEPTH / 2 * FN_MM_LANES ? DEPTH / 2 : 1;
        for (int64_t l = 0; l < FN_MM_LANES && k + l < count; l++) {
            const float *x = a + k * rows + l;
            const char *y = b + (k + l) * k_stride;
            float *lane = lanes + l * lane_size;
            if (depth == DEPTH) column_steps(DEPTH, columns, x, a_step, rows, y, b_step, dtype, lane, step);
            else if (depth > 1) column_steps(DEPTH / 2, columns, x, a_step, rows, y, b_step, dtype, lane, step);
            else column_steps(1, columns, x, a_step, rows, y, b_step, dtype, lane, step);
        }
    }
    for (int64_t i = 0; i < rows; i++)
        fold_columns(lanes + i * step, lane_size, columns, count % FN_MM_LANES > 0, sums + i * sums_stride, first);
}

static void run_columns(const float *a, int64_t rows, const char *b, int64_t k_stride, fn_dtype dtype, int64_t columns,
                        int64_t count, float *lanes, float *sums, int64_t sums_stride, bool first) {
    switch (dtype) {
    case FN_FLOAT16:
        columns_as(FN_FLOAT16, a, rows, b, k_stride, columns, count, lanes, sums, sums_stride, first);
        return;
    case FN_BFLOAT16:
        columns_as(FN_BFLOAT16, a, rows, b, k_stride, columns, count, lanes, sums, sums_stride, first);
        return;
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: break;
    }
    columns_as(FN_FLOAT32, a, rows, b, k_stride, columns, count, lanes, sums, sums_stride, first);
}

INLINE void pack_as(fn_dtype dtype, const char *from, int64_t stride, int64_t rows, int64_t count, float *panel) {
    const int size = size_of(dtype);
    for (int64_t k = 0; k < count; k += FN_MM_LANES)
        for (int64_t i = 0; i < rows; i++, panel += FN_MM_LANES) {
            const char *at = from + i * stride + k * size;
            const int64_t left = count - k;
            FOR_PARTS store(panel + p * LANES, left >= FN_MM_LANES
                                                   ? load(at + p * LANES * size, dtype)
                                                   : load_part(at + p * LANES * size, left - p * LANES, dtype));
        }
}

static void pack(const char *from, int64_t stride, fn_dtype dtype, int64_t rows, int64_t count, float *panel) {
    switch (dtype) {
    case FN_FLOAT16: pack_as(FN_FLOAT16, from, stride, rows, count, panel); return;
    case FN_BFLOAT16: pack_as(FN_BFLOAT16, from, stride, rows, count, panel); return;
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: break;
    }
    pack_as(FN_FLOAT32, from, stride, rows, count, panel);
}

static void widen16(const char *from, int64_t stride, fn_dtype dtype, float *to, int64_t to_stride) {
    vector block[16][PARTS];
    _Pragma("GCC unroll 16") for (int k = 0; k < 16; k++) FOR_PARTS block[k][p] =
        load(from + k * stride + p * LANES * size_of(dtype), dtype);
    transpose16(block, to, to_stride);
}

#define TABLE_ROW(name, type) name##_##type, name##_##type##_wide
#if TILE_ROWS >= 4
#define TABLE(type)                                                                                                    \
    TABLE_ROW(one_row, type), TABLE_ROW(two_rows, type), TABLE_ROW(three_rows, type), TABLE_ROW(four_rows, type)
#elif TILE_ROWS == 3
#define TABLE(type) TABLE_ROW(one_row, type), TABLE_ROW(two_rows, type), TABLE_ROW(three_rows, type)
#else
#define TABLE(type) TABLE_ROW(one_row, type), TABLE_ROW(two_rows, type)
#endif

const fn_mm_kernels PATH = {
    .name = PATH_NAME,
    .tile_rows = TILE_ROWS,
    .tile_columns = TILE_COLUMNS,
    .tile = {[FN_FLOAT32] = {TABLE(f32)},
             [FN_FLOAT16] = {TABLE(f16)},
             [FN_BFLOAT16] = {TABLE(bf16)},
             [FN_MM_PACKED] = {TABLE(packed)}},
    .columns = run_columns,
    .pack = pack,
    .widen16 = widen16,
};
