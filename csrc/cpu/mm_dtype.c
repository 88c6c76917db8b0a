/* mm_dtype.c: runs a product's plan on the CPU: which path, how many threads, which blocks. None of it moves a bit.
 *
 * b's columns are called its rows here: both operands are read along k. Tiles of outputs read a from panels, widened
 * to fp32, where a tile's rows alternate every 16 elements: one aligned stream of memory, without the conflicts of
 * rows that lie a multiple of 4 KiB apart. Four ways to read b:
 *
 *   FROM_ROWS     few rows of a (decode): a is packed once, if there is room, then b's rows are read where they lie, from
 *                 end to end, widened in registers.
 *   FROM_COLUMNS  the same where it is b's columns whose elements lie side by side.
 *   BY_BLOCKS     more rows: b is packed too. A group of a's rows is packed for one chunk of K, then b block by block.
 *                 Each of b's panels serves all rows of a group, each of a's all columns of a strip; tiles fetch what is
 *                 packed next.
 *   BY_PANELS     in between, where panels hold pairs of bfloat16 (mm_dtype.h): a is packed once, each of b's panels just
 *                 before its tiles run.
 *
 * Panels of 1024 k stream from the second-level cache as fast as they are used. On a Zen 4 core at 3.66 GHz, which has
 * 117 GFLOP/s of fused multiply-adds, tiles of 4 x 4, 6 x 4 and 5 x 5 reach 115 from panels of fp32, a whole product
 * of bfloat16 by them with M = 256 reaches 108. Folding the lanes costs 1.5 %, packing and memory the rest. On a Zen 5 core with 470 GFLOP/s
 * of VDPBF16PS, M = 256 reaches 440 with pairs.
 */
#include "mm_dtype.h"

#include "cpu.h"
#include "element.h"
#include "threads.h"

#include <stdlib.h>

/* A thread's scratch has at most 2.51 MiB: a and the sums 1 MiB each, b 256 KiB (the lanes of FROM_COLUMNS 512), and 260 KiB
 * for what must be gathered first, because its elements do not lie side by side. */
enum {
    GROUP_ROWS = 256,                   /* rows of a that are packed together: 1 MiB of a chunk */
    BLOCK_ROWS = 64,                    /* of them, that go through all columns of a block: 256 KiB of a chunk */
    BLOCK_COLUMNS = 64,                 /* columns of b that are packed together: 256 KiB of a chunk */
    STRIP_COLUMNS = 1024,               /* columns whose sums are kept, with GROUP_ROWS: 1 MiB */
    FEW_ROWS = 32,                      /* of a: up to so many, b is read where it lies, or packed panel by panel */
    ROWS_OF_PAIRS = 8,                  /* from so many rows on, operands of bfloat16 are multiplied in pairs */
    STACK_FLOATS = 4096,                /* of scratch, for small calls on one thread */
    GATHERED_STRIDE = FN_MM_CHUNK + 16, /* floats; rows 4 KiB apart would share the same few places of a cache */
};
/* Below this cost, which counts elements read and a sixteenth of the products, a thread is not worth waking. */
#define COST_PER_THREAD ((int64_t)1 << 15)

static const fn_mm_kernels *const paths[FN_PATH_COUNT] = {
#if defined(FN_X86)
    [FN_PATH_AVX2] = &fn_mm_avx2,
    [FN_PATH_AVX512] = &fn_mm_avx512,
    [FN_PATH_AVX512_BF16] = &fn_mm_avx512,
#elif defined(FN_ARM64)
    [FN_PATH_NEON] = &fn_mm_neon,
#endif
};

/* For two operands of bfloat16. */
static const fn_mm_pairs *const pair_paths[FN_PATH_COUNT] = {
#if defined(FN_AVX512_BF16)
    [FN_PATH_AVX512_BF16] = &fn_mm_avx512_bf16,
#endif
};

/* a, or b transposed. */
typedef struct {
    const char *data;
    int64_t row_stride, k_stride; /* in bytes */
    fn_dtype dtype;
    bool in_rows; /* elements side by side in rows */
} operand;

typedef enum { FROM_ROWS, FROM_COLUMNS, BY_PANELS, BY_BLOCKS } way;

typedef struct {
    const fn_mm_kernels *kernels;
    const fn_mm_pairs *pairs;            /* or NULL: panels hold fp32 */
    const fn_norm_kernels *norm_kernels; /* for their stores */
    const fn_mm_plan *plan;
    operand a, b;
    way way;
    bool whole;                                       /* all chunks of a are packed before the first tile */
    int64_t block_columns;                            /* of b, that are packed or read together */
    int64_t run_columns;                              /* that go through all chunks together */
    int64_t sums_stride;                              /* of a thread's sums, in floats */
    int64_t sums_size, a_size, b_size, gathered_size; /* of one thread's scratch, in floats */
} product;

static int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
static int64_t round_up(int64_t value, int64_t quantum) { return (value + quantum - 1) / quantum * quantum; }

/* ---- packing -------------------------------------------------------------------------------------------------------- */

/* Elements [k, k + count) of rows [row, row + rows) to fp32, side by side. */
static void gather(const fn_mm_kernels *kernels, const operand *from, int64_t row, int64_t rows, int64_t k,
                   int64_t count, float *to) {
    const int64_t bytes = fn_dtypes[from->dtype].bytes;
    const char *data = from->data + row * from->row_stride + k * from->k_stride;
    const int64_t whole_rows = from->row_stride == bytes ? rows / 16 * 16 : 0, whole_count = count / 16 * 16;
    for (int64_t j = 0; j < whole_count; j += 16)
        for (int64_t i = 0; i < whole_rows; i += 16)
            kernels->widen16(data + i * bytes + j * from->k_stride, from->k_stride, from->dtype,
                             to + i * GATHERED_STRIDE + j, GATHERED_STRIDE);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < whole_rows ? whole_count : 0; j < count; j++)
            to[i * GATHERED_STRIDE + j] =
                fn_load_element(data + i * from->row_stride + j * from->k_stride, from->dtype);
}

/* Floats that a row of a panel takes. */
static int64_t panel_row(const product *p, int64_t count) {
    return p->pairs ? round_up(count, 2 * FN_MM_LANES) / 2 : round_up(count, FN_MM_LANES);
}

/* Where a panel that starts at row `begin` of a block ends. a's: as even as can be, or all rows in one. */
static int64_t a_panel_end(const product *p, int64_t rows, int64_t begin) {
    if (p->way == FROM_COLUMNS) return rows;
    const int64_t left = rows - begin, panels = (left + p->kernels->tile_rows - 1) / p->kernels->tile_rows;
    return begin + (left + panels - 1) / panels;
}
/* b's: as many columns as a tile has, then one by one. */
static int64_t b_panel_end(const product *p, int64_t columns, int64_t begin) {
    return begin + (begin + p->kernels->tile_columns <= columns ? p->kernels->tile_columns : 1);
}
typedef int64_t panel_end(const product *p, int64_t rows, int64_t begin);

/* Elements [k, k + count) of rows [row, row + rows) to panels. `least`: of pairs, each panel's least exponent, at the
 * panel's first row. */
static void pack(const product *p, const operand *from, int64_t row, int64_t rows, int64_t k, int64_t count,
                 panel_end *end_of, float *to, int *least, float *gathered) {
    const char *data = from->data + row * from->row_stride + k * from->k_stride;
    int64_t stride = from->row_stride;
    fn_dtype dtype = from->dtype;
    if (!from->in_rows) {
        gather(p->kernels, from, row, rows, k, count, gathered);
        data = (const char *)gathered;
        stride = GATHERED_STRIDE * (int64_t)sizeof(float);
        dtype = FN_FLOAT32;
    }
    for (int64_t begin = 0, end; begin < rows; begin = end) {
        end = end_of(p, rows, begin);
        const char *panel_data = data + begin * stride;
        float *panel = to + begin * panel_row(p, count);
        if (p->pairs) least[begin] = p->pairs->pack(panel_data, stride, dtype, end - begin, count, panel);
        else p->kernels->pack(panel_data, stride, dtype, end - begin, count, panel);
    }
}

/* What will be packed next, fetched into the second-level cache while tiles run. */
typedef struct {
    const char *row;
    int64_t stride, rows, bytes, at;
} ahead;

static ahead ahead_of(const operand *from, int64_t row, int64_t rows, int64_t k, int64_t count) {
    if (!from->in_rows || rows <= 0 || count <= 0) return (ahead){0};
    return (ahead){.row = from->data + row * from->row_stride + k * from->k_stride,
                   .stride = from->row_stride,
                   .rows = rows,
                   .bytes = count * fn_dtypes[from->dtype].bytes};
}

/* A tile's share of them, of the cache's. */
static int64_t lines_of(const ahead *next, int64_t tiles) {
    return ((next->bytes + 63) / 64 * next->rows + tiles - 1) / tiles;
}

static void fetch(ahead *next, int64_t lines) {
    while (lines > 0 && next->rows > 0) {
        const char *from = next->row + next->at;
        const int64_t of_row = at_most((next->bytes - next->at + 63) / 64, lines);
        for (int64_t line = 0; line < of_row; line++) __builtin_prefetch(from + 64 * line, 0, 2);
        lines -= of_row;
        next->at += 64 * of_row;
        if (next->at < next->bytes) continue;
        next->row += next->stride;
        next->rows--;
        next->at = 0;
    }
}

/* ---- blocks --------------------------------------------------------------------------------------------------------- */

/* `b`: rows of b's dtype, or panels, b_stride bytes a row. a_least, b_least: see pack(). */
static void run_tiles(const product *p, const float *a, const int *a_least, int64_t rows, const char *b,
                      const int *b_least, int64_t b_stride, int64_t columns, int64_t count, float *sums, bool first,
                      ahead *next) {
    const fn_mm_kernels *kernels = p->kernels;
    fn_mm_tile *const *tiles = kernels->tile[p->way == FROM_ROWS ? (int)p->b.dtype : FN_MM_PACKED];
    const int64_t row_size = panel_row(p, count);
    const int64_t a_panels = (rows + kernels->tile_rows - 1) / kernels->tile_rows;
    const int64_t b_panels = columns / kernels->tile_columns + columns % kernels->tile_columns;
    const int64_t lines = lines_of(next, a_panels * b_panels);
    for (int64_t j = 0, j_end; j < columns; j = j_end) {
        j_end = b_panel_end(p, columns, j);
        for (int64_t i = 0, i_end; i < rows; i = i_end) {
            i_end = a_panel_end(p, rows, i);
            fetch(next, lines);
            if (p->pairs)
                tiles = a_least[i] + b_least[j] < FN_MM_LEAST_EXPONENTS ? p->pairs->exact_tile : p->pairs->tile;
            tiles[2 * (i_end - i - 1) + (j_end - j > 1)](a + i * row_size, b + j * b_stride, b_stride, count,
                                                         sums + i * p->sums_stride + j, p->sums_stride, first);
        }
    }
}

/* out = round(sums + bias) */
static void finish(const product *p, int64_t row, int64_t rows, int64_t column, int64_t columns, float *sums) {
    const fn_matrix *out = &p->plan->out, *bias = &p->plan->bias;
    float widened[STRIP_COLUMNS];
    if (bias->data)
        for (int64_t j = 0; j < columns; j++)
            widened[j] = fn_load_element(bias->data + (column + j) * bias->stride[1], bias->dtype);
    for (int64_t i = 0; i < rows; i++) {
        float *total = sums + i * p->sums_stride;
        char *to = out->data + (row + i) * out->stride[0] + column * out->stride[1];
        if (bias->data)
            for (int64_t j = 0; j < columns; j++) total[j] = fn_add(total[j], widened[j]);
        if (out->stride[1] != fn_dtypes[out->dtype].bytes)
            for (int64_t j = 0; j < columns; j++) fn_store_element(to + j * out->stride[1], total[j], out->dtype);
        else if (out->dtype == FN_FLOAT32) memcpy(to, total, (size_t)columns * sizeof(float));
        else p->norm_kernels->narrow(total, out->dtype, to, columns, false);
    }
}

typedef struct {
    float *sums, *a, *b, *gathered;
    /* a's of all chunks where they are packed at once: at most GROUP_ROWS before the last chunk's. */
    int a_least[GROUP_ROWS + FEW_ROWS], b_least[BLOCK_COLUMNS];
} scratch;

/* A chunk's part, from k, of the sums of rows [row, row + rows) and columns [column, column + columns). */
static void run_chunk(const product *p, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t k,
                      float *sums, scratch *s) {
    const int64_t count = at_most(p->plan->k - k, FN_MM_CHUNK), row_size = panel_row(p, count);
    const int64_t next_count = at_most(p->plan->k - k - count, FN_MM_CHUNK);
    const int64_t after = column + columns;
    float *a = s->a + (p->whole ? panel_row(p, k) * rows : 0);
    int *a_least = s->a_least + (p->whole ? k / FN_MM_CHUNK * rows : 0);
    for (int64_t j = 0; j < columns; j += p->block_columns) {
        const int64_t block_columns = at_most(columns - j, p->block_columns), j_end = j + block_columns;
        const char *b = p->b.data + (column + j) * p->b.row_stride + k * p->b.k_stride;
        int64_t b_stride = p->b.row_stride;
        const bool packs_a = !p->whole && j == 0;
        if (p->way == FROM_COLUMNS) {
            if (packs_a) pack(p, &p->a, row, rows, k, count, a_panel_end, a, a_least, s->gathered);
            if (p->pairs)
                p->pairs->columns(a, a_least[0], rows, b, p->b.k_stride, block_columns, count, s->b, sums + j,
                                  p->sums_stride, k == 0);
            else
                p->kernels->columns(a, rows, b, p->b.k_stride, p->b.dtype, block_columns, count, s->b, sums + j,
                                    p->sums_stride, k == 0);
            continue;
        }
        if (p->way != FROM_ROWS) {
            pack(p, &p->b, column + j, block_columns, k, count, b_panel_end, s->b, s->b_least, s->gathered);
            b = (const char *)s->b;
            b_stride = row_size * (int64_t)sizeof(float);
        }
        for (int64_t i = 0; i < rows; i += BLOCK_ROWS) {
            const int64_t block_rows = at_most(rows - i, BLOCK_ROWS), i_end = i + block_rows;
            if (packs_a)
                pack(p, &p->a, row + i, block_rows, k, count, a_panel_end, a + i * row_size, a_least + i, s->gathered);
            ahead next = {0};
            if (packs_a && i_end < rows)
                next = ahead_of(&p->a, row + i_end, at_most(rows - i_end, BLOCK_ROWS), k, count);
            else if (p->way == BY_PANELS)
                next = ahead_of(&p->b, after, at_most(p->plan->n - after, p->run_columns), k, count);
            else if (p->way == BY_BLOCKS && i_end == rows)
                next = j_end < columns
                           ? ahead_of(&p->b, column + j_end, at_most(columns - j_end, BLOCK_COLUMNS), k, count)
                           : ahead_of(&p->b, column, at_most(columns, BLOCK_COLUMNS), k + count, next_count);
            run_tiles(p, a + i * row_size, a_least + i, block_rows, b, s->b_least, b_stride, block_columns, count,
                      sums + i * p->sums_stride + j, k == 0, &next);
        }
    }
}

static void run_part(const product *p, int64_t m, int64_t m_end, int64_t n, int64_t n_end, scratch *s) {
    const int64_t k_end = p->plan->k;
    for (int64_t k = 0; p->whole && k < k_end; k += FN_MM_CHUNK)
        pack(p, &p->a, m, m_end - m, k, at_most(k_end - k, FN_MM_CHUNK), a_panel_end,
             s->a + panel_row(p, k) * (m_end - m), s->a_least + k / FN_MM_CHUNK * (m_end - m), s->gathered);
    for (int64_t column = n; column < n_end; column += STRIP_COLUMNS) {
        const int64_t columns = at_most(n_end - column, STRIP_COLUMNS);
        for (int64_t group = m; group < m_end; group += GROUP_ROWS) {
            const int64_t rows = at_most(m_end - group, GROUP_ROWS);
            if (k_end == 0) memset(s->sums, 0, (size_t)(rows * p->sums_stride) * sizeof(float));
            for (int64_t j = 0; j < columns; j += p->run_columns)
                for (int64_t k = 0; k < k_end; k += FN_MM_CHUNK)
                    run_chunk(p, group, rows, column + j, at_most(columns - j, p->run_columns), k, s->sums + j, s);
            finish(p, group, rows, column, columns, s->sums);
        }
    }
}

/* ---- threads -------------------------------------------------------------------------------------------------------- */

static int64_t threads_for(const fn_mm_plan *plan) {
    const double m = (double)plan->m, n = (double)plan->n, k = (double)plan->k;
    const double worth = (m * k + n * k + m * n + m * n * k / 16) / (double)COST_PER_THREAD;
    const int64_t threads = fn_threads_to_use();
    return worth < 2 ? 1 : worth < (double)threads ? (int64_t)worth : threads;
}

/* Thread number `thread` of `team`'s part of `size`, in whole quanta. */
static int64_t share(int64_t size, int64_t quantum, int64_t thread, int64_t team) {
    const int64_t quanta = (size + quantum - 1) / quantum;
    return at_most(quanta / team * thread + quanta % team * thread / team, quanta) * quantum;
}

static operand operand_of(const fn_matrix *matrix, int row, int64_t k) {
    const bool in_rows = k <= 1 || matrix->stride[1 - row] == fn_dtypes[matrix->dtype].bytes;
    return (operand){matrix->data, matrix->stride[row], matrix->stride[1 - row], matrix->dtype, in_rows};
}

static void prepare(product *p, const fn_mm_plan *plan, fn_path path) {
    p->kernels = paths[path];
    p->norm_kernels = fn_norm_paths[path];
    p->plan = plan;
    p->a = operand_of(&plan->a, 0, plan->k);
    p->b = operand_of(&plan->b, 1, plan->k);
    const int64_t rows = at_most(plan->m, GROUP_ROWS);
    const int64_t k = round_up(plan->k, FN_MM_LANES), chunk = at_most(k, FN_MM_CHUNK);
    const bool few = plan->m <= FEW_ROWS, bfloat16 = plan->a.dtype == FN_BFLOAT16 && plan->b.dtype == FN_BFLOAT16;
    const bool b_in_columns = !p->b.in_rows && p->b.row_stride == fn_dtypes[p->b.dtype].bytes;
    p->pairs = bfloat16 && plan->m >= ROWS_OF_PAIRS ? pair_paths[path] : NULL;
    p->whole = few && k <= GROUP_ROWS * FN_MM_CHUNK / plan->m; /* no more memory than a group */
    if (few && p->b.in_rows && !p->pairs) p->way = FROM_ROWS;
    else if (few && p->b.in_rows && p->whole) p->way = BY_PANELS;
    else if (few && b_in_columns && (plan->m <= 8 || plan->n >= 64)) p->way = FROM_COLUMNS; /* few n leave lanes idle */
    else p->way = BY_BLOCKS;

    /* The wider, the longer the pieces of memory: 16 lanes of so many sums for each row of a have 256 KiB, or 512. */
    const int64_t wide = plan->m <= 8 ? 512 : 256;
    p->block_columns = at_most(round_up(plan->n, FN_MM_LANES), p->way == FROM_COLUMNS ? wide : BLOCK_COLUMNS);
    p->run_columns = !p->whole || p->way == BY_BLOCKS ? STRIP_COLUMNS
                     : p->way == FROM_COLUMNS         ? p->block_columns
                                                      : p->kernels->tile_columns;
    p->sums_stride = at_most(plan->n, STRIP_COLUMNS);
    p->sums_size = round_up(rows * p->sums_stride, FN_MM_LANES);
    p->a_size = rows * panel_row(p, p->whole ? k : chunk);
    p->b_size = p->way == FROM_ROWS      ? 0
                : p->way == FROM_COLUMNS ? FN_MM_LANES * rows * p->block_columns
                                         : p->block_columns * panel_row(p, chunk);
    const int64_t gathered_a = p->a.in_rows ? 0 : at_most(rows, BLOCK_ROWS);
    const int64_t gathered_b = p->b.in_rows || p->way == FROM_COLUMNS ? 0 : p->block_columns;
    p->gathered_size = GATHERED_STRIDE * (gathered_a > gathered_b ? gathered_a : gathered_b);
}

fn_status fn_mm_run_cpu(const fn_mm_plan *plan) {
    fn_path path;
    FN_TRY(fn_cpu_path(&path));
    const int64_t threads = threads_for(plan);
    product p = {0};
    float *heap = NULL;
    _Alignas(64) float stack[STACK_FLOATS];
    int64_t each = 0;
    if (path != FN_PATH_SCALAR) {
        prepare(&p, plan, path);
        each = p.sums_size + p.a_size + p.b_size + p.gathered_size; /* a multiple of 64 bytes */
        if (threads > 1 || each > STACK_FLOATS) {
            heap = aligned_alloc(64, (size_t)(each * threads) * sizeof *heap);
            FN_REQUIRE(heap, FN_ERROR_MEMORY, "no memory for the packed rows of a product");
        }
    }
    /* Columns, unless there are too few of them for all. */
    const int64_t quantum = 16;
    const bool by_columns = plan->n >= threads * quantum || plan->n >= plan->m;
    FN_PARALLEL((int)threads) {
        const int64_t thread = fn_thread_number(), team = fn_team_size();
        const fn_fp_environment saved = fn_fp_enter();
        const int64_t size = by_columns ? plan->n : plan->m;
        const int64_t begin = at_most(share(size, quantum, thread, team), size);
        const int64_t end = at_most(share(size, quantum, thread + 1, team), size);
        const int64_t m = by_columns ? 0 : begin, m_end = by_columns ? plan->m : end;
        const int64_t n = by_columns ? begin : 0, n_end = by_columns ? end : plan->n;
        if (path == FN_PATH_SCALAR) fn_mm_scalar(plan, m, m_end, n, n_end);
        else if (begin < end) {
            scratch s; /* most of it is written before it is read */
            s.sums = heap ? heap + each * thread : stack;
            s.a = s.sums + p.sums_size;
            s.b = s.a + p.a_size;
            s.gathered = s.b + p.b_size;
            run_part(&p, m, m_end, n, n_end, &s);
        }
        fn_fp_leave(saved);
    }
    free(heap);
    return FN_OK;
}
