/* rms_norm_lanes.h: the norm written once for every instruction set with vectors of LANES floats.
 *
 * A file such as rms_norm_avx2.c defines the vocabulary below and includes this file last; the bits are those of
 * rms_norm_scalar.c because the order of every sum is the same and each intrinsic is one scalar statement a lane.
 *
 *   LANES                            floats in a vector, a power of two, at most 16
 *   vector                           the vector type
 *   set1, add, mul                   arithmetic, a lane at a time
 *   load_f32, load_f16, load_bf16    LANES elements from any address, widened
 *   store_f32, store_f16, store_bf16 LANES elements to any address, narrowed
 *   round_f16, round_bf16            a vector narrowed and widened again
 *   stream_f32, stream_f16, stream_bf16   as store_, past the cache, to an address that is a multiple of LANES elements
 *   load2_bf16, store2_bf16, stream2_bf16   2 * LANES elements as two vectors in the paired order
 *   fold8, fold8_paired              from 8 vectors of neighbours (8 * LANES columns): LANES group sums, in order
 *   fold_lanes                       the lanes of one vector folded by halves
 *   PATH, PATH_NAME                  the table to define and its name
 *
 * The paired order, for calls whose every operand is bfloat16: of each 8 neighbours, 0 to 3 lie in the first vector and 4 to
 * 7 at the same place of the second. Interleaving with zeros makes it in one instruction a vector, packing undoes it, and
 * the first halving of a group is a plain addition.
 *
 * Work goes by blocks of 8 vectors, which the registers hold, and behind the last whole block by half a block (a head of
 * 64 columns is one in AVX-512) and by single vectors. Columns that do not fill a vector, or do not lie side by side, go
 * through a copy of one vector on the stack.
 */
enum { BLOCK = 8 * LANES, HALF_BLOCK = 4 * LANES };
_Static_assert(FN_COLUMN_QUANTUM % BLOCK == 0, "a thread's share of a row is a whole number of blocks");

#define INLINE static inline __attribute__((always_inline))
/* `count` is 8, 4 or 1 and known to the compiler. */
#define FOR_VECTORS(count) _Pragma("GCC unroll 8") for (int k = 0; k < (count); k++)
#define FOR_PAIRS(count) _Pragma("GCC unroll 4") for (int k = 0; k < (count); k += 2)

/* Where the next columns of each operand begin. */
typedef struct {
    char *at[FN_OPERANDS];
} columns_at;

/* `s = load(p)`, `s = s + load(p)`, `s = s * load(p)`. */
#define DEFINE_READ(function, combine)                                                                                 \
    INLINE void function(vector *s, int count, const char *p, fn_dtype dtype, bool paired) {                           \
        if (paired) {                                                                                                  \
            FOR_PAIRS(count) {                                                                                         \
                vector first, second;                                                                                  \
                load2_bf16(p + k * LANES * 2, &first, &second);                                                        \
                s[k] = combine(s[k], first);                                                                           \
                s[k + 1] = combine(s[k + 1], second);                                                                  \
            }                                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        switch (dtype) {                                                                                               \
        case FN_FLOAT16: FOR_VECTORS(count) s[k] = combine(s[k], load_f16(p + k * LANES * 2)); return;                 \
        case FN_BFLOAT16: FOR_VECTORS(count) s[k] = combine(s[k], load_bf16(p + k * LANES * 2)); return;               \
        case FN_FLOAT32:                                                                                               \
        case FN_DTYPE_COUNT: break;                                                                                    \
        }                                                                                                              \
        FOR_VECTORS(count) s[k] = combine(s[k], load_f32(p + k * LANES * 4));                                          \
    }
#define SECOND(a, b) (b)
DEFINE_READ(read, SECOND)
DEFINE_READ(read_add, add)
DEFINE_READ(read_mul, mul)

#define DEFINE_WRITE(function, verb)                                                                                   \
    INLINE void function(char *p, const vector *s, int count, fn_dtype dtype, bool paired) {                           \
        if (paired) {                                                                                                  \
            FOR_PAIRS(count) verb##2_bf16(p + k * LANES * 2, s[k], s[k + 1]);                                          \
            return;                                                                                                    \
        }                                                                                                              \
        switch (dtype) {                                                                                               \
        case FN_FLOAT16: FOR_VECTORS(count) verb##_f16(p + k * LANES * 2, s[k]); return;                               \
        case FN_BFLOAT16: FOR_VECTORS(count) verb##_bf16(p + k * LANES * 2, s[k]); return;                             \
        case FN_FLOAT32:                                                                                               \
        case FN_DTYPE_COUNT: break;                                                                                    \
        }                                                                                                              \
        FOR_VECTORS(count) verb##_f32(p + k * LANES * 4, s[k]);                                                        \
    }
DEFINE_WRITE(write, store)
DEFINE_WRITE(write_past_cache, stream)

INLINE void round_to(vector *s, int count, fn_dtype dtype) {
    switch (dtype) {
    case FN_FLOAT16: FOR_VECTORS(count) s[k] = round_f16(s[k]); return;
    case FN_BFLOAT16: FOR_VECTORS(count) s[k] = round_bf16(s[k]); return;
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: return;
    }
}

/* ---- the five steps on 8 vectors, 4 or 1 -------------------------------------------------------------------------------- */

/* Step 1: s = (x + residual) + post. */
INLINE void sum(const fn_norm_plan *plan, const columns_at *c, vector *s, int count, bool paired) {
    read(s, count, c->at[FN_X], plan->operand[FN_X].dtype, paired);
    if (c->at[FN_RESIDUAL]) read_add(s, count, c->at[FN_RESIDUAL], plan->operand[FN_RESIDUAL].dtype, paired);
    if (c->at[FN_POST]) read_add(s, count, c->at[FN_POST], plan->operand[FN_POST].dtype, paired);
}

/* Step 2, the squares. */
INLINE void squares(const fn_norm_plan *plan, const columns_at *c, vector *p, int count, bool paired) {
    sum(plan, c, p, count, paired);
    if (plan->round_sum == FN_SUM_ROUNDED) round_to(p, count, plan->operand[FN_RESIDUAL_OUT].dtype);
    FOR_VECTORS(count) p[k] = mul(p[k], p[k]);
}

/* Steps 4 and 5, and residual_out. */
INLINE void finish_columns(const fn_norm_plan *plan, const columns_at *c, vector r, int count, bool paired,
                           bool stream_out, bool stream_residual) {
    vector s[8];
    sum(plan, c, s, count, paired);
    if (c->at[FN_RESIDUAL_OUT]) {
        const fn_dtype dtype = plan->operand[FN_RESIDUAL_OUT].dtype;
        if (plan->round_sum != FN_SUM_FP32) round_to(s, count, dtype);
        if (stream_residual) write_past_cache(c->at[FN_RESIDUAL_OUT], s, count, dtype, paired);
        else write(c->at[FN_RESIDUAL_OUT], s, count, dtype, paired);
    }
    FOR_VECTORS(count) s[k] = mul(s[k], r);
    if (plan->cast_x_before_out_mul) round_to(s, count, plan->operand[FN_X].dtype);
    if (c->at[FN_WEIGHT]) {
        const fn_dtype dtype = plan->operand[FN_WEIGHT].dtype;
        if (plan->weight_offset == 0) {
            read_mul(s, count, c->at[FN_WEIGHT], dtype, paired);
        } else {
            const vector offset = set1(plan->weight_offset);
            vector weight[8];
            read(weight, count, c->at[FN_WEIGHT], dtype, paired);
            FOR_VECTORS(count) s[k] = mul(s[k], add(weight[k], offset));
        }
    }
    if (stream_out) write_past_cache(c->at[FN_OUT], s, count, plan->operand[FN_OUT].dtype, paired);
    else write(c->at[FN_OUT], s, count, plan->operand[FN_OUT].dtype, paired);
}

/* ---- columns where they lie, and columns by way of the stack ------------------------------------------------------------- */

INLINE char *operand_data(const fn_norm_plan *plan, const fn_row *row, int operand) {
    return operand == FN_WEIGHT ? plan->operand[FN_WEIGHT].data : row->data[operand];
}

INLINE void point_at(const fn_norm_plan *plan, const fn_row *row, int64_t column, columns_at *c) {
    for (int operand = 0; operand < FN_OPERANDS; operand++) {
        char *data = operand_data(plan, row, operand);
        c->at[operand] = data ? data + column * fn_dtypes[plan->operand[operand].dtype].bytes : NULL;
    }
}

/* One vector of each operand. */
typedef struct {
    char bytes[FN_OPERANDS][LANES * sizeof(float)];
} stage;

static void copy_elements(char *to, int64_t to_stride, const char *from, int64_t from_stride, int bytes,
                          int64_t count) {
    if (to_stride == bytes && from_stride == bytes) memcpy(to, from, (size_t)(count * bytes));
    else if (bytes == 4)
        for (int64_t i = 0; i < count; i++) memcpy(to + i * to_stride, from + i * from_stride, 4);
    else if (bytes == 2)
        for (int64_t i = 0; i < count; i++) memcpy(to + i * to_stride, from + i * from_stride, 2);
    else
        for (int64_t i = 0; i < count; i++) memcpy(to + i * to_stride, from + i * from_stride, (size_t)bytes);
}

/* Copies `count` <= LANES columns of the inputs, and +0 behind them. */
static void stage_in(const fn_norm_plan *plan, const fn_row *row, int64_t column, int64_t count, stage *staged,
                     columns_at *c) {
    for (int operand = 0; operand < FN_OPERANDS; operand++) {
        const fn_operand *o = &plan->operand[operand];
        const char *data = operand_data(plan, row, operand);
        const int bytes = fn_dtypes[o->dtype].bytes;
        c->at[operand] = data ? staged->bytes[operand] : NULL;
        if (!data || operand == FN_OUT || operand == FN_RESIDUAL_OUT) continue;
        memset(staged->bytes[operand], 0, sizeof staged->bytes[operand]);
        copy_elements(staged->bytes[operand], bytes, data + column * o->column_stride, o->column_stride, bytes, count);
    }
}

static void stage_out(const fn_norm_plan *plan, const fn_row *row, int64_t column, int64_t count, const stage *staged) {
    static const int outputs[] = {FN_RESIDUAL_OUT, FN_OUT};
    for (int i = 0; i < 2; i++) {
        const fn_operand *o = &plan->operand[outputs[i]];
        char *data = row->data[outputs[i]];
        const int bytes = fn_dtypes[o->dtype].bytes;
        if (!data) continue;
        copy_elements(data + column * o->column_stride, o->column_stride, staged->bytes[outputs[i]], bytes, bytes,
                      count);
    }
}

/* ---- columns [begin, end) by single vectors ------------------------------------------------------------------------------- */

/* At most a block: its group sums. */
static __attribute__((noinline)) vector groups_by_vectors(const fn_norm_plan *plan, const fn_row *row, int64_t begin,
                                                          int64_t end) {
    vector p[8];
    for (int k = 0; k < 8; k++) {
        const int64_t column = begin + k * LANES;
        stage staged;
        columns_at c;
        if (column >= end) {
            p[k] = set1(0);
            continue;
        }
        if (plan->contiguous && column + LANES <= end) point_at(plan, row, column, &c);
        else stage_in(plan, row, column, end - column < LANES ? end - column : LANES, &staged, &c);
        squares(plan, &c, &p[k], 1, false);
    }
    return fold8(p);
}

static __attribute__((noinline)) void finish_by_vectors(const fn_norm_plan *plan, const fn_row *row, int64_t begin,
                                                        int64_t end, vector r) {
    for (int64_t column = begin; column < end; column += LANES) {
        const int64_t count = end - column < LANES ? end - column : LANES;
        stage staged;
        columns_at c;
        if (plan->contiguous && count == LANES) {
            point_at(plan, row, column, &c);
            finish_columns(plan, &c, r, 1, false, false, false);
        } else {
            stage_in(plan, row, column, count, &staged, &c);
            finish_columns(plan, &c, r, 1, false, false, false);
            stage_out(plan, row, column, count, &staged);
        }
    }
}

/* ---- one row ---------------------------------------------------------------------------------------------------------- */

INLINE void sum_groups_inline(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float *sums,
                              bool paired) {
    int64_t column = begin;
    for (; plan->contiguous && column + BLOCK <= end; column += BLOCK) {
        columns_at c;
        vector p[8];
        point_at(plan, row, column, &c);
        squares(plan, &c, p, 8, paired);
        store_f32(sums + column / 8, paired ? fold8_paired(p) : fold8(p));
    }
    if (plan->contiguous && column + HALF_BLOCK == end) {
        columns_at c;
        vector p[8];
        point_at(plan, row, column, &c);
        squares(plan, &c, p, 4, paired);
        for (int k = 4; k < 8; k++) p[k] = set1(0);
        store_f32(sums + column / 8, paired ? fold8_paired(p) : fold8(p));
        return;
    }
    for (; column < end; column += BLOCK)
        store_f32(sums + column / 8, groups_by_vectors(plan, row, column, column + BLOCK < end ? column + BLOCK : end));
}

INLINE float fold_inline(float *sums, int64_t columns) {
    const int64_t vectors = (columns + BLOCK - 1) / BLOCK; /* of LANES group sums each */
    int64_t width = 1;
    while (width < vectors) width *= 2;
    for (int64_t half = width / 2; half >= 1; half /= 2) {
        const int64_t present = vectors - half < half ? vectors - half : half;
        for (int64_t i = 0; i < present; i++) {
            float *low = sums + i * LANES;
            store_f32(low, add(load_f32(low), load_f32(low + half * LANES)));
        }
    }
    return fold_lanes(load_f32(sums));
}

/* Columns to do before `p` is a multiple of 64 bytes; -1 if no number of whole elements gets there. */
INLINE int64_t columns_to_line(const char *p, int bytes) {
    const int64_t distance = (int64_t)(-(uintptr_t)p % 64);
    return distance % bytes == 0 ? distance / bytes : -1;
}

/* Asks for a block of the next row's inputs, into the second cache: the memory would else be idle while a row is
 * finished, and the first cache holds that row. Where a dimension wraps the guess is wrong, which costs nothing else. */
INLINE void prefetch_block(const fn_norm_plan *plan, const fn_row *row, int64_t column) {
    static const int inputs[] = {FN_X, FN_RESIDUAL, FN_POST};
    for (int i = 0; i < 3; i++) {
        if (!row->data[inputs[i]]) continue;
        const int64_t bytes = fn_dtypes[plan->operand[inputs[i]].dtype].bytes;
        const int64_t distance = plan->leading_stride[inputs[i]][plan->leading_ndim - 1];
        const char *at = row->data[inputs[i]] + column * bytes + distance;
        for (int64_t line = 0; line < BLOCK * bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
    }
}

INLINE void finish_inline(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float r, int hints,
                          bool paired) {
    const vector scale = set1(r);
    int64_t column = begin;
    const bool prefetch = hints & FN_PREFETCH && plan->leading_ndim > 0;
    bool stream_out = false, stream_residual = false;
    if (hints & FN_STREAM && plan->contiguous && row->data[FN_OUT] != row->data[FN_X]) {
        const int bytes = fn_dtypes[plan->operand[FN_OUT].dtype].bytes;
        const int64_t lead = columns_to_line(row->data[FN_OUT] + column * bytes, bytes);
        if (lead > 0 && lead <= end - column) {
            finish_by_vectors(plan, row, column, column + lead, scale);
            column += lead;
        }
        stream_out = lead >= 0;
    }
    if (hints & FN_STREAM && plan->contiguous && row->data[FN_RESIDUAL_OUT] != row->data[FN_RESIDUAL]) {
        const int bytes = fn_dtypes[plan->operand[FN_RESIDUAL_OUT].dtype].bytes;
        stream_residual = columns_to_line(row->data[FN_RESIDUAL_OUT] + column * bytes, bytes) == 0;
    }
    for (; plan->contiguous && column + BLOCK <= end; column += BLOCK) {
        columns_at c;
        point_at(plan, row, column, &c);
        if (prefetch) prefetch_block(plan, row, column);
        finish_columns(plan, &c, scale, 8, paired, stream_out, stream_residual);
    }
    if (plan->contiguous && column + HALF_BLOCK <= end) {
        columns_at c;
        point_at(plan, row, column, &c);
        finish_columns(plan, &c, scale, 4, paired, stream_out, stream_residual);
        column += HALF_BLOCK;
    }
    if (column < end) finish_by_vectors(plan, row, column, end, scale);
}

/* ---- the table's functions, each in both orders ------------------------------------------------------------------------- */

static bool all_bf16(const fn_norm_plan *plan) {
    for (int operand = 0; operand < FN_OPERANDS; operand++)
        if (plan->operand[operand].data && plan->operand[operand].dtype != FN_BFLOAT16) return false;
    return true;
}

static void sum_groups(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float *sums) {
    if (all_bf16(plan)) sum_groups_inline(plan, row, begin, end, sums, true);
    else sum_groups_inline(plan, row, begin, end, sums, false);
}

static float fold(float *sums, int64_t columns) { return fold_inline(sums, columns); }

static void finish(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float r, int hints) {
    hints &= ~FN_PREFETCH;
    if (all_bf16(plan)) finish_inline(plan, row, begin, end, r, hints, true);
    else finish_inline(plan, row, begin, end, r, hints, false);
}

INLINE void rows_inline(const fn_norm_plan *plan, int64_t begin, int64_t end, int hints, float *sums, bool paired) {
    fn_walk walk;
    fn_walk_to(plan, begin, &walk);
    for (int64_t number = begin; number < end; number++, fn_walk_on(plan, &walk)) {
        sum_groups_inline(plan, &walk.row, 0, plan->columns, sums, paired);
        const float r = fn_norm_scale(fold_inline(sums, plan->columns), plan);
        finish_inline(plan, &walk.row, 0, plan->columns, r, hints, paired);
    }
}

static void rows(const fn_norm_plan *plan, int64_t begin, int64_t end, int hints, float *sums) {
    if (all_bf16(plan)) rows_inline(plan, begin, end, hints, sums, true);
    else rows_inline(plan, begin, end, hints, sums, false);
}

/* ---- the path's conversions alone --------------------------------------------------------------------------------------- */

/* Between the natural order and the paired one, through memory: the tests' own business, so it need not be fast. */
static void reorder(vector s[8], bool to_paired) {
    float natural[BLOCK], paired[BLOCK];
    FOR_VECTORS(8) store_f32((to_paired ? natural : paired) + k * LANES, s[k]);
    for (int column = 0; column < BLOCK; column++) {
        const int pair = column / (2 * LANES), group = column % (2 * LANES) / 8, place = column % 8;
        const int at = pair * 2 * LANES + place / 4 * LANES + group * 4 + place % 4;
        if (to_paired) paired[at] = natural[column];
        else natural[column] = paired[at];
    }
    FOR_VECTORS(8) s[k] = load_f32((to_paired ? paired : natural) + k * LANES);
}

static void widen(const void *source, fn_dtype dtype, float *target, int64_t count, bool paired) {
    const int64_t bytes = fn_dtypes[dtype].bytes;
    for (int64_t i = 0; i < count; i += BLOCK) {
        const int64_t part = count - i < BLOCK ? count - i : BLOCK;
        char in[BLOCK * sizeof(float)] = {0}, out[BLOCK * sizeof(float)];
        vector s[8];
        memcpy(in, (const char *)source + i * bytes, (size_t)(part * bytes));
        read(s, 8, in, dtype, paired);
        if (paired) reorder(s, false);
        write(out, s, 8, FN_FLOAT32, false);
        memcpy(target + i, out, (size_t)part * sizeof(float));
    }
}

static void narrow(const float *source, fn_dtype dtype, void *target, int64_t count, bool paired) {
    const int64_t bytes = fn_dtypes[dtype].bytes;
    for (int64_t i = 0; i < count; i += BLOCK) {
        const int64_t part = count - i < BLOCK ? count - i : BLOCK;
        char in[BLOCK * sizeof(float)] = {0}, out[BLOCK * sizeof(float)];
        vector s[8];
        memcpy(in, source + i, (size_t)part * sizeof(float));
        read(s, 8, in, FN_FLOAT32, false);
        if (paired) reorder(s, true);
        write(out, s, 8, dtype, paired);
        memcpy((char *)target + i * bytes, out, (size_t)(part * bytes));
    }
}

const fn_norm_kernels PATH = {PATH_NAME, rows, sum_groups, fold, finish, widen, narrow};
