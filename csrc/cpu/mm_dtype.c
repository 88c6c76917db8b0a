/* mm_dtype.c: runs a product's plan on the CPU: which path, how many threads, which blocks. None of it moves a bit.
 *
 * a's rows and b's columns ("rows" of b below) are read where they lie if they are fp32 with their elements side by side.
 * Others are widened chunk by chunk into rows of fp32, which many tiles then use: b's for GROUP_ROWS rows of a, a's for
 * BLOCK_COLUMNS columns. For a few rows of a (decode), 16-bit rows of b are widened in registers instead: little would be
 * used twice, and memory is what limits it.
 */
#include "mm_dtype.h"

#include "cpu.h"
#include "element.h"
#include "threads.h"

#include <stdlib.h>

enum {
    GROUP_ROWS = 256,    /* rows of a whose sums are kept between chunks, with BLOCK_COLUMNS: 64 KiB */
    BLOCK_ROWS = 32,     /* rows of a that go through all columns of a block: 128 KiB of a chunk */
    BLOCK_COLUMNS = 64,  /* 256 KiB of a chunk */
    DIRECT_ROWS = 32,    /* up to so many rows of a, 16-bit rows of b are widened in registers, and a's once for all */
    STREAM_ROWS = 16,    /* up to so many, b's rows are read from end to end, as many at a time as a tile has */
    STACK_FLOATS = 4096, /* of scratch, for small calls on one thread */
    PACKED_STRIDE = FN_MM_CHUNK + 16, /* floats; rows 4 KiB apart would share the same few places of a cache */
};
/* Below this cost, which counts elements read and a sixteenth of the products, a thread is not worth waking. */
#define COST_PER_THREAD ((int64_t)1 << 15)

static const fn_mm_kernels *const paths[FN_PATH_COUNT] = {
#if defined(FN_X86)
    [FN_PATH_AVX2] = &fn_mm_avx2,
    [FN_PATH_AVX512] = &fn_mm_avx512,
#elif defined(FN_ARM64)
    [FN_PATH_NEON] = &fn_mm_neon,
#endif
};

/* a, or b transposed. */
typedef struct {
    const char *data;
    int64_t row_stride, k_stride; /* in bytes */
    fn_dtype dtype;
    bool direct; /* tiles read it where it lies */
} operand;

typedef struct {
    const fn_mm_kernels *kernels;
    const fn_norm_kernels *norm_kernels; /* for their stores */
    const fn_mm_plan *plan;
    operand a, b;
    int64_t block_columns;
    int64_t sums_size, a_size, b_size; /* of one thread's scratch, in floats */
} product;

static int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

/* ---- packing -------------------------------------------------------------------------------------------------------- */

/* Elements [k, k + count) of rows [row, row + rows) to fp32, `stride` floats from row to row. */
static void pack(const product *p, const operand *from, int64_t row, int64_t rows, int64_t k, int64_t count, float *to,
                 int64_t stride) {
    const int64_t bytes = fn_dtypes[from->dtype].bytes;
    const char *data = from->data + row * from->row_stride + k * from->k_stride;
    if (from->k_stride == bytes || count == 1) {
        for (int64_t i = 0; i < rows; i++)
            p->kernels->widen(data + i * from->row_stride, from->dtype, count, to + i * stride);
        return;
    }
    const int64_t whole_rows = from->row_stride == bytes ? rows / 16 * 16 : 0, whole_count = count / 16 * 16;
    for (int64_t j = 0; j < whole_count; j += 16)
        for (int64_t i = 0; i < whole_rows; i += 16)
            p->kernels->widen16(data + i * bytes + j * from->k_stride, from->k_stride, from->dtype, to + i * stride + j,
                                stride);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < whole_rows ? whole_count : 0; j < count; j++)
            to[i * stride + j] = fn_load_element(data + i * from->row_stride + j * from->k_stride, from->dtype);
}

/* What tiles read: where the rows lie, and how far apart. Packs them if they must be. */
static operand chunk_of(const product *p, const operand *from, int64_t row, int64_t rows, int64_t k, int64_t count,
                        float *packed) {
    if (from->direct) {
        operand there = *from;
        there.data += row * from->row_stride + k * from->k_stride;
        return there;
    }
    pack(p, from, row, rows, k, count, packed, PACKED_STRIDE);
    return (operand){(const char *)packed, PACKED_STRIDE * (int64_t)sizeof(float), sizeof(float), FN_FLOAT32, true};
}

/* ---- blocks --------------------------------------------------------------------------------------------------------- */

static void run_tiles(const fn_mm_kernels *kernels, const operand *a, const operand *b, int64_t rows, int64_t columns,
                      int64_t count, float *sums, bool first) {
    for (int64_t j = 0; j < columns;) {
        const bool wide = j + kernels->tile_columns <= columns;
        for (int64_t i = 0; i < rows; i += kernels->tile_rows) {
            const int64_t tile_rows = at_most(rows - i, kernels->tile_rows);
            kernels->tile[b->dtype][tile_rows - 1][wide](a->data + i * a->row_stride, a->row_stride,
                                                         b->data + j * b->row_stride, b->row_stride, count,
                                                         sums + i * BLOCK_COLUMNS + j, BLOCK_COLUMNS, first);
        }
        j += wide ? kernels->tile_columns : 1;
    }
}

/* out = round(sums + bias) */
static void finish(const product *p, int64_t row, int64_t rows, int64_t column, int64_t columns, float *sums) {
    const fn_matrix *out = &p->plan->out, *bias = &p->plan->bias;
    float widened[BLOCK_COLUMNS];
    if (bias->data)
        for (int64_t j = 0; j < columns; j++)
            widened[j] = fn_load_element(bias->data + (column + j) * bias->stride[1], bias->dtype);
    for (int64_t i = 0; i < rows; i++) {
        float *total = sums + i * BLOCK_COLUMNS;
        char *to = out->data + (row + i) * out->stride[0] + column * out->stride[1];
        if (bias->data)
            for (int64_t j = 0; j < columns; j++) total[j] = fn_add(total[j], widened[j]);
        if (out->stride[1] != fn_dtypes[out->dtype].bytes)
            for (int64_t j = 0; j < columns; j++) fn_store_element(to + j * out->stride[1], total[j], out->dtype);
        else if (out->dtype == FN_FLOAT32) memcpy(to, total, (size_t)columns * sizeof(float));
        else p->norm_kernels->narrow(total, out->dtype, to, columns, false);
    }
}

/* 16 MiB at most. */
static bool packs_whole_rows(int64_t rows, int64_t k) { return rows <= DIRECT_ROWS && k <= (int64_t)1 << 17; }

static void run_part(const product *p, int64_t m, int64_t m_end, int64_t n, int64_t n_end, float *scratch) {
    float *sums = scratch, *a_packed = sums + p->sums_size, *b_packed = a_packed + p->a_size;
    const int64_t k_end = p->plan->k;
    operand a = p->a;
    if (k_end > 0) a.data += m * a.row_stride;
    if (!a.direct && packs_whole_rows(m_end - m, k_end)) { /* once for all columns */
        pack(p, &a, 0, m_end - m, 0, k_end, a_packed, k_end);
        a = (operand){(const char *)a_packed, k_end * (int64_t)sizeof(float), sizeof(float), FN_FLOAT32, true};
    }
    for (int64_t column = n; column < n_end; column += p->block_columns) {
        const int64_t columns = at_most(n_end - column, p->block_columns);
        for (int64_t group = m; group < m_end; group += GROUP_ROWS) {
            const int64_t group_rows = at_most(m_end - group, GROUP_ROWS);
            if (k_end == 0) memset(sums, 0, (size_t)(group_rows * BLOCK_COLUMNS) * sizeof *sums);
            for (int64_t k = 0; k < k_end; k += FN_MM_CHUNK) {
                const int64_t count = at_most(k_end - k, FN_MM_CHUNK);
                const operand b = chunk_of(p, &p->b, column, columns, k, count, b_packed);
                for (int64_t i = 0; i < group_rows; i += BLOCK_ROWS) {
                    const int64_t rows = at_most(group_rows - i, BLOCK_ROWS);
                    const operand block = chunk_of(p, &a, group - m + i, rows, k, count, a_packed);
                    run_tiles(p->kernels, &block, &b, rows, columns, count, sums + i * BLOCK_COLUMNS, k == 0);
                }
            }
            finish(p, group, group_rows, column, columns, sums);
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

static void prepare(product *p, const fn_mm_plan *plan, fn_path path) {
    p->kernels = paths[path];
    p->norm_kernels = fn_norm_paths[path];
    p->plan = plan;
    p->a = (operand){plan->a.data, plan->a.stride[0], plan->a.stride[1], plan->a.dtype, false};
    p->b = (operand){plan->b.data, plan->b.stride[1], plan->b.stride[0], plan->b.dtype, false};
    const bool a_rows = plan->k <= 1 || p->a.k_stride == fn_dtypes[p->a.dtype].bytes;
    const bool b_rows = plan->k <= 1 || p->b.k_stride == fn_dtypes[p->b.dtype].bytes;
    p->a.direct = p->a.dtype == FN_FLOAT32 && a_rows;
    p->b.direct = b_rows && (p->b.dtype == FN_FLOAT32 || plan->m <= DIRECT_ROWS);
    p->block_columns = p->b.direct && plan->m <= STREAM_ROWS ? p->kernels->tile_columns : BLOCK_COLUMNS;
    p->sums_size = at_most(plan->m, GROUP_ROWS) * BLOCK_COLUMNS;
    const int64_t a_block = at_most(plan->m, BLOCK_ROWS) * PACKED_STRIDE, rows = at_most(plan->m, DIRECT_ROWS);
    const int64_t a_whole = packs_whole_rows(rows, plan->k) ? rows * plan->k : 0;
    p->a_size = p->a.direct ? 0 : a_block > a_whole ? a_block : a_whole;
    p->b_size = p->b.direct ? 0 : at_most(plan->n, BLOCK_COLUMNS) * PACKED_STRIDE;
}

fn_status fn_mm_run_cpu(const fn_mm_plan *plan) {
    fn_path path;
    FN_TRY(fn_cpu_path(&path));
    const int64_t threads = threads_for(plan);
    product p = {0};
    float *heap = NULL, stack[STACK_FLOATS];
    if (path != FN_PATH_SCALAR) {
        prepare(&p, plan, path);
        const int64_t each = p.sums_size + p.a_size + p.b_size;
        if (threads > 1 || each > STACK_FLOATS) {
            heap = malloc((size_t)(each * threads) * sizeof *heap);
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
        else if (begin < end)
            run_part(&p, m, m_end, n, n_end, heap ? heap + (p.sums_size + p.a_size + p.b_size) * thread : stack);
        fn_fp_leave(saved);
    }
    free(heap);
    return FN_OK;
}
