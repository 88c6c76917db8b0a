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
 *   stream_f32, stream_f16, stream_bf16   the same past the cache, to an address that is a multiple of LANES elements
 *   fold8                            from 8 vectors of neighbours (8 * LANES columns): LANES group sums, in order
 *   fold_lanes                       the lanes of one vector folded by halves
 *   PATH, PATH_NAME                  the table to define and its name
 *
 * Work goes by blocks of 8 vectors, which the registers hold; a row's tail, and rows whose columns do not lie side by
 * side, go through a block-sized copy on the stack.
 */
enum { BLOCK = 8 * LANES };
_Static_assert(FN_COLUMN_QUANTUM % BLOCK == 0, "a thread's share of a row is a whole number of blocks");

#define INLINE static inline __attribute__((always_inline))
#define FOR_BLOCK _Pragma("GCC unroll 8") for (int k = 0; k < 8; k++)

/* Where one block of each operand begins. */
typedef struct {
    char *at[FN_OPERANDS];
} block;

/* `s = load(p)` and `s = s + load(p)`, 8 vectors. */
#define DEFINE_READ(function, combine)                                                                                 \
    INLINE void function(vector s[8], const char *p, fn_dtype dtype) {                                                 \
        switch (dtype) {                                                                                               \
        case FN_FLOAT16: FOR_BLOCK s[k] = combine(s[k], load_f16(p + k * LANES * 2)); return;                          \
        case FN_BFLOAT16: FOR_BLOCK s[k] = combine(s[k], load_bf16(p + k * LANES * 2)); return;                        \
        case FN_FLOAT32:                                                                                               \
        case FN_DTYPE_COUNT: break;                                                                                    \
        }                                                                                                              \
        FOR_BLOCK s[k] = combine(s[k], load_f32(p + k * LANES * 4));                                                   \
    }
#define SECOND(a, b) (b)
DEFINE_READ(load_block, SECOND)
DEFINE_READ(add_block, add)
DEFINE_READ(mul_block, mul)

INLINE void mul_offset_block(vector y[8], const char *p, fn_dtype dtype, vector offset) {
    vector weight[8];
    FOR_BLOCK weight[k] = offset;
    load_block(weight, p, dtype);
    FOR_BLOCK y[k] = mul(y[k], add(weight[k], offset));
}

#define DEFINE_WRITE(function, verb)                                                                                   \
    INLINE void function(char *p, const vector s[8], fn_dtype dtype) {                                                 \
        switch (dtype) {                                                                                               \
        case FN_FLOAT16: FOR_BLOCK verb##_f16(p + k * LANES * 2, s[k]); return;                                        \
        case FN_BFLOAT16: FOR_BLOCK verb##_bf16(p + k * LANES * 2, s[k]); return;                                      \
        case FN_FLOAT32:                                                                                               \
        case FN_DTYPE_COUNT: break;                                                                                    \
        }                                                                                                              \
        FOR_BLOCK verb##_f32(p + k * LANES * 4, s[k]);                                                                 \
    }
DEFINE_WRITE(store_block, store)
DEFINE_WRITE(stream_block, stream)

INLINE void round_block(vector s[8], fn_dtype dtype) {
    switch (dtype) {
    case FN_FLOAT16: FOR_BLOCK s[k] = round_f16(s[k]); return;
    case FN_BFLOAT16: FOR_BLOCK s[k] = round_bf16(s[k]); return;
    case FN_FLOAT32:
    case FN_DTYPE_COUNT: return;
    }
}

/* ---- one block ------------------------------------------------------------------------------------------------------ */

/* Step 1: s = (x + residual) + post. */
INLINE void sum_block(const fn_norm_plan *plan, const block *b, vector s[8]) {
    load_block(s, b->at[FN_X], plan->operand[FN_X].dtype);
    if (b->at[FN_RESIDUAL]) add_block(s, b->at[FN_RESIDUAL], plan->operand[FN_RESIDUAL].dtype);
    if (b->at[FN_POST]) add_block(s, b->at[FN_POST], plan->operand[FN_POST].dtype);
}

/* Step 2, the part within groups of 8 neighbours. */
INLINE vector groups_of_block(const fn_norm_plan *plan, const block *b) {
    vector s[8];
    sum_block(plan, b, s);
    if (plan->round_sum == FN_SUM_ROUNDED) round_block(s, plan->operand[FN_RESIDUAL_OUT].dtype);
    FOR_BLOCK s[k] = mul(s[k], s[k]);
    return fold8(s);
}

/* Steps 4 and 5, and residual_out. */
INLINE void finish_block(const fn_norm_plan *plan, const block *b, vector r, bool stream_out, bool stream_residual) {
    vector s[8];
    sum_block(plan, b, s);
    if (b->at[FN_RESIDUAL_OUT]) {
        const fn_dtype dtype = plan->operand[FN_RESIDUAL_OUT].dtype;
        if (plan->round_sum != FN_SUM_FP32) round_block(s, dtype);
        if (stream_residual) stream_block(b->at[FN_RESIDUAL_OUT], s, dtype);
        else store_block(b->at[FN_RESIDUAL_OUT], s, dtype);
    }
    FOR_BLOCK s[k] = mul(s[k], r);
    if (plan->cast_x_before_out_mul) round_block(s, plan->operand[FN_X].dtype);
    if (b->at[FN_WEIGHT]) {
        const fn_dtype dtype = plan->operand[FN_WEIGHT].dtype;
        if (plan->weight_offset == 0) mul_block(s, b->at[FN_WEIGHT], dtype);
        else mul_offset_block(s, b->at[FN_WEIGHT], dtype, set1(plan->weight_offset));
    }
    if (stream_out) stream_block(b->at[FN_OUT], s, plan->operand[FN_OUT].dtype);
    else store_block(b->at[FN_OUT], s, plan->operand[FN_OUT].dtype);
}

/* ---- blocks where they lie, and blocks by way of the stack ------------------------------------------------------------ */

typedef struct {
    char bytes[FN_OPERANDS][BLOCK * sizeof(float)];
} stage;

INLINE char *operand_data(const fn_norm_plan *plan, const fn_row *row, int operand) {
    return operand == FN_WEIGHT ? plan->operand[FN_WEIGHT].data : row->data[operand];
}

INLINE void point_block(const fn_norm_plan *plan, const fn_row *row, int64_t column, block *b) {
    for (int operand = 0; operand < FN_OPERANDS; operand++) {
        char *data = operand_data(plan, row, operand);
        b->at[operand] = data ? data + column * fn_dtypes[plan->operand[operand].dtype].bytes : NULL;
    }
}

/* memcpy of one element, as two loops that the compiler can see through. */
static void copy_elements(char *to, int64_t to_stride, const char *from, int64_t from_stride, int bytes,
                          int64_t count) {
    if (to_stride == bytes && from_stride == bytes) memcpy(to, from, (size_t)(count * bytes));
    else if (bytes == 4)
        for (int64_t i = 0; i < count; i++) memcpy(to + i * to_stride, from + i * from_stride, 4);
    else
        for (int64_t i = 0; i < count; i++) memcpy(to + i * to_stride, from + i * from_stride, 2);
}

/* Copies `count` <= BLOCK columns of the inputs, and +0 behind them. */
static void stage_block(const fn_norm_plan *plan, const fn_row *row, int64_t column, int64_t count, stage *staged,
                        block *b) {
    for (int operand = 0; operand < FN_OPERANDS; operand++) {
        const fn_operand *o = &plan->operand[operand];
        const char *data = operand_data(plan, row, operand);
        const int bytes = fn_dtypes[o->dtype].bytes;
        b->at[operand] = data ? staged->bytes[operand] : NULL;
        if (!data || operand == FN_OUT || operand == FN_RESIDUAL_OUT) continue;
        if (count < BLOCK) memset(staged->bytes[operand], 0, sizeof staged->bytes[operand]);
        copy_elements(staged->bytes[operand], bytes, data + column * o->column_stride, o->column_stride, bytes, count);
    }
}

static void unstage_block(const fn_norm_plan *plan, const fn_row *row, int64_t column, int64_t count,
                          const stage *staged) {
    static const int outputs[] = {FN_RESIDUAL_OUT, FN_OUT};
    for (int i = 0; i < 2; i++) {
        const fn_operand *o = &plan->operand[outputs[i]];
        char *data = row->data[outputs[i]];
        const int bytes = fn_dtypes[o->dtype].bytes;
        if (data)
            copy_elements(data + column * o->column_stride, o->column_stride, staged->bytes[outputs[i]], bytes, bytes,
                          count);
    }
}

static __attribute__((noinline)) vector groups_staged(const fn_norm_plan *plan, const fn_row *row, int64_t column,
                                                      int64_t count) {
    stage staged;
    block b;
    stage_block(plan, row, column, count, &staged, &b);
    return groups_of_block(plan, &b);
}

static __attribute__((noinline)) void finish_staged(const fn_norm_plan *plan, const fn_row *row, int64_t column,
                                                    int64_t count, vector r) {
    stage staged;
    block b;
    stage_block(plan, row, column, count, &staged, &b);
    finish_block(plan, &b, r, false, false);
    unstage_block(plan, row, column, count, &staged);
}

/* ---- one row ---------------------------------------------------------------------------------------------------------- */

INLINE void sum_groups_inline(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float *sums) {
    int64_t column = begin;
    if (plan->contiguous) {
        for (; column + BLOCK <= end; column += BLOCK) {
            block b;
            point_block(plan, row, column, &b);
            store_f32(sums + column / 8, groups_of_block(plan, &b));
        }
    }
    for (; column < end; column += BLOCK) {
        const int64_t count = end - column < BLOCK ? end - column : BLOCK;
        store_f32(sums + column / 8, groups_staged(plan, row, column, count));
    }
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

INLINE void finish_inline(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float r,
                          bool stream) {
    const vector scale = set1(r);
    int64_t column = begin;
    if (plan->contiguous) {
        bool stream_out = false, stream_residual = false;
        if (stream && row->data[FN_OUT] != row->data[FN_X]) {
            const int out_bytes = fn_dtypes[plan->operand[FN_OUT].dtype].bytes;
            const int64_t lead = columns_to_line(row->data[FN_OUT] + column * out_bytes, out_bytes);
            if (lead > 0 && lead <= end - column) {
                finish_staged(plan, row, column, lead, scale);
                column += lead;
            }
            stream_out = lead >= 0;
        }
        if (stream && row->data[FN_RESIDUAL_OUT] && row->data[FN_RESIDUAL_OUT] != row->data[FN_RESIDUAL]) {
            const int bytes = fn_dtypes[plan->operand[FN_RESIDUAL_OUT].dtype].bytes;
            stream_residual = columns_to_line(row->data[FN_RESIDUAL_OUT] + column * bytes, bytes) == 0;
        }
        for (; column + BLOCK <= end; column += BLOCK) {
            block b;
            point_block(plan, row, column, &b);
            finish_block(plan, &b, scale, stream_out, stream_residual);
        }
    }
    for (; column < end; column += BLOCK) {
        const int64_t count = end - column < BLOCK ? end - column : BLOCK;
        finish_staged(plan, row, column, count, scale);
    }
}

static void sum_groups(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float *sums) {
    sum_groups_inline(plan, row, begin, end, sums);
}

static float fold(float *sums, int64_t columns) { return fold_inline(sums, columns); }

static void finish(const fn_norm_plan *plan, const fn_row *row, int64_t begin, int64_t end, float r, bool stream) {
    finish_inline(plan, row, begin, end, r, stream);
}

static void rows(const fn_norm_plan *plan, int64_t begin, int64_t end, bool stream, float *sums) {
    fn_row row;
    fn_row_seek(plan, begin, &row);
    for (int64_t number = begin; number < end; number++, fn_row_next(plan, &row)) {
        sum_groups_inline(plan, &row, 0, plan->columns, sums);
        const float r = fn_norm_scale(fold_inline(sums, plan->columns), plan);
        finish_inline(plan, &row, 0, plan->columns, r, stream);
    }
}

/* ---- the path's conversions alone --------------------------------------------------------------------------------------- */

static void widen(const void *source, fn_dtype dtype, float *target, int64_t count) {
    const int bytes = fn_dtypes[dtype].bytes;
    for (int64_t i = 0; i < count; i += BLOCK) {
        const int64_t part = count - i < BLOCK ? count - i : BLOCK;
        char in[BLOCK * sizeof(float)] = {0}, out[BLOCK * sizeof(float)];
        vector s[8];
        memcpy(in, (const char *)source + i * bytes, (size_t)(part * bytes));
        FOR_BLOCK s[k] = set1(0);
        load_block(s, in, dtype);
        store_block(out, s, FN_FLOAT32);
        memcpy(target + i, out, (size_t)part * sizeof(float));
    }
}

static void narrow(const float *source, fn_dtype dtype, void *target, int64_t count) {
    const int bytes = fn_dtypes[dtype].bytes;
    for (int64_t i = 0; i < count; i += BLOCK) {
        const int64_t part = count - i < BLOCK ? count - i : BLOCK;
        char in[BLOCK * sizeof(float)] = {0}, out[BLOCK * sizeof(float)];
        vector s[8];
        memcpy(in, source + i, (size_t)part * sizeof(float));
        FOR_BLOCK s[k] = set1(0);
        load_block(s, in, FN_FLOAT32);
        store_block(out, s, dtype);
        memcpy((char *)target + i * bytes, out, (size_t)(part * bytes));
    }
}

const fn_norm_kernels PATH = {PATH_NAME, rows, sum_groups, fold, finish, widen, narrow};
