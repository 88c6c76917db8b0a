/* mm_paths.c: fn_mm on every available CPU path against the contract written once more, output by output.
 *
 * All combinations of dtypes, with and without bias, K around lanes and chunks, N and M around tiles and blocks,
 * strides of every kind (rows or columns side by side, gaps, negative, zero, odd addresses), operands that end where the
 * memory does, signed zeros, subnormals, infinities and NaNs, one to four threads, a caller with another rounding mode
 * and with flush-to-zero. What is compared is the whole memory of the output: results bit for bit (a NaN with any NaN),
 * the bytes around and between them unchanged.
 */
#include "mm_case.h"
#include "paths.h"

static void compare(product_case *c, unsigned char *before, const char *path) {
    matrix *out = &c->arrays[OUT];
    const fn_dtype dtype = out->tensor.dtype;
    const int64_t item = fn_dtypes[dtype].bytes, to_expected = out->expected - out->memory;
    elements += c->m * c->n;
    for (int64_t i = 0; i < c->m; i++)
        for (int64_t j = 0; j < c->n; j++) {
            unsigned char *at = (unsigned char *)out->tensor.data + i * out->stride[0] + j * out->stride[1];
            const float is = load_number(out, i, j);
            matrix must_be = *out;
            must_be.tensor.data = (unsigned char *)out->tensor.data + to_expected;
            const float must = load_number(&must_be, i, j);
            if (memcmp(at, at + to_expected, (size_t)item) != 0 && !(isnan(is) && isnan(must))) {
                describe(c);
                CHECK_FAIL("%s: out[%lld, %lld] is %a, not %a; seed %llu, call %lld", path, (long long)i, (long long)j,
                           (double)is, (double)must, (unsigned long long)seed, (long long)calls);
            }
            memcpy(at, before + (at - out->memory), (size_t)item);
        }
    if (memcmp(out->memory, before, (size_t)out->bytes) == 0) return;
    describe(c);
    CHECK_FAIL("%s: wrote bytes of out that are no result; seed %llu, call %lld", path, (unsigned long long)seed,
               (long long)calls);
}

/* What out must become, and a copy of what it is, which the caller frees. */
static unsigned char *prepare(product_case *c) {
    matrix *out = &c->arrays[OUT];
    memcpy(out->expected, out->memory, (size_t)out->bytes);
    expect(c);
    unsigned char *before = malloc((size_t)out->bytes);
    if (!before) CHECK_FAIL("no memory for a copy of out");
    memcpy(before, out->memory, (size_t)out->bytes);
    return before;
}

/* On every path, with 1 to most_threads threads. */
static void run_case(product_case *c, int most_threads) {
    unsigned char *before = prepare(c);
    for (int p = 0; p < path_count; p++)
        for (int threads = 1; threads <= most_threads; threads++) {
            require_ok(fn_set_num_threads(threads));
            require_ok(fn_cpu_force_path(fn_path_name(paths[p])));
            calls++;
            const fn_status status = fn_mm(&c->args);
            if (status != FN_OK) describe(c);
            require_ok(status);
            compare(c, before, fn_path_name(paths[p]));
        }
    free(before);
}

/* ---- the parts -------------------------------------------------------------------------------------------------------- */

static void every_dtype_and_layout(int repeats, uint64_t *random) {
    const double start = check_seconds();
    static const int64_t lengths[] = {1,  2,  7,   8,   9,   15,   16,   17,   31,   32,  33,
                                      63, 64, 100, 257, 500, 1023, 1024, 1025, 1040, 1100};
    static const int64_t rows[] = {1, 1, 2, 3, 4, 5, 6, 7, 8, 17, 33},
                         columns[] = {1, 2, 3, 4, 5, 7, 8, 16, 19, 31, 35};
    for (int dtypes = 0; dtypes < 27; dtypes++)
        for (int a = 0; a < LAYOUTS; a++)
            for (int b = 0; b < LAYOUTS; b++)
                for (int n = 0; n < repeats; n++) {
                    product_case c = {.m = PICK(rows, random), .n = PICK(columns, random), .k = PICK(lengths, random)};
                    c.has_bias = random_below(random, 2);
                    c.values = choose_values(random);
                    c.layout[A] = a;
                    c.layout[B] = b;
                    c.layout[BIAS] = (int)random_below(random, LAYOUTS);
                    c.layout[OUT] = (int)random_below(random, LAYOUTS);
                    build_case(&c, dtypes, random);
                    run_case(&c, 1);
                    free_case(&c);
                }
    report("every dtype and layout", start);
}

/* Around the blocks of mm_dtype.c, and enough work for several threads. */
static void large_calls(bool sample, uint64_t *random) {
    const double start = check_seconds();
    static const struct {
        int64_t m, n, k;
    } sizes[] = {{1, 300, 2100}, {4, 70, 5000},    {37, 67, 1500},  {258, 66, 1030}, {300, 5, 2049}, {2, 1000, 1024},
                 {5, 129, 3000}, {40, 1100, 1030}, {40, 600, 1100}, {9, 530, 700},   {3, 1030, 1040}};
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++)
        for (int k = 0; k < (sample ? 1 : 12); k++) {
            if (sample && sizes[n].m * sizes[n].n * sizes[n].k > 4000000) continue;
            product_case c = {.m = sizes[n].m, .n = sizes[n].n, .k = sizes[n].k, .has_bias = k % 2};
            for (int role = 0; role < ROLES; role++) c.layout[role] = (int)random_below(random, k % 3 ? 2 : LAYOUTS);
            build_case(&c, (int)random_below(random, 27), random);
            run_case(&c, 4);
            free_case(&c);
        }
    report("large calls, 1 to 4 threads", start);
}

/* Two operands of bfloat16, with enough rows for panels of pairs, where that is not the only way. */
static void pairs_of_bfloat16(int repeats, uint64_t *random) {
    const double start = check_seconds();
    static const int64_t lengths[] = {1,  2,  15,  16,   17,   31,   32,   33,   47,   48,   49,   63,  64,
                                      65, 80, 100, 1008, 1023, 1024, 1025, 1041, 1500, 2048, 2049, 2100};
    static const int64_t rows[] = {7, 8, 9, 10, 11, 12, 17, 31, 32, 33, 40, 70}, columns[] = {1, 2, 3, 4, 5, 8, 19, 70};
    enum { BOTH = FN_BFLOAT16 + 3 * FN_BFLOAT16 };
    for (int n = 0; n < repeats; n++) {
        product_case c = {.m = PICK(rows, random), .n = PICK(columns, random), .k = PICK(lengths, random)};
        c.has_bias = random_below(random, 4) == 0;
        c.values = n % 4 ? NEAR_SUBNORMAL : n % 8 ? MINUS_ZEROS : choose_values(random);
        for (int role = 0; role < ROLES; role++) c.layout[role] = (int)random_below(random, n % 3 ? 2 : LAYOUTS);
        build_case(&c, BOTH + 9 * (n % 3 ? FN_FLOAT32 : (int)random_below(random, 3)), random);
        run_case(&c, n % 5 ? 1 : 3);
        free_case(&c);
    }
    /* Few rows, packed for all chunks at once: as many chunks as there may be, the last one short. */
    static const int64_t long_sizes[][3] = {{12, 4, 21840}, {9, 3, 29120}, {28, 5, 9360}, {31, 9, 8448}, {32, 4, 8193}};
    enum { LONG_SIZES = sizeof long_sizes / sizeof *long_sizes };
    for (int n = 0; n < 6 * LONG_SIZES; n++) {
        const int64_t *size = long_sizes[n % LONG_SIZES];
        product_case c = {.m = size[0], .n = size[1], .k = size[2], .values = NEAR_SUBNORMAL};
        c.layout[B] = n < 4 * LONG_SIZES ? COLUMNS : GAPS;
        build_case(&c, BOTH + 9 * FN_FLOAT32, random);
        run_case(&c, 1);
        free_case(&c);
    }
    report("pairs of bfloat16", start);
}

static void empty_products(uint64_t *random) {
    const double start = check_seconds();
    for (int dtypes = 0; dtypes < 27; dtypes++)
        for (int empty = 0; empty < 8; empty++) {
            product_case c = {.m = empty & 1 ? 0 : 3, .n = empty & 2 ? 0 : 70, .k = empty & 4 ? 0 : 5};
            c.has_bias = random_below(random, 2);
            build_case(&c, dtypes, random);
            for (int role = 0; role < ROLES; role++)
                if (c.arrays[role].shape[0] == 0 || c.arrays[role].shape[1] == 0) c.arrays[role].tensor.data = NULL;
            run_case(&c, 1);
            free_case(&c);
        }
    report("M, N and K of 0", start);
}

static void other_environments(int repeats, uint64_t *random) {
    const double start = check_seconds();
    require_ok(fn_set_num_threads(POOL_THREADS));
    for (int n = 0; n < repeats; n++) {
        const bool large = n % 64 == 0; /* enough for several threads */
        product_case c = {.m = large ? 70 : 1 + random_below(random, 5),
                          .n = large ? 90 : 1 + random_below(random, 20),
                          .k = large ? 500 : 1 + random_below(random, 100),
                          .has_bias = random_below(random, 2),
                          .values = random_below(random, 2) ? TINY : ORDINARY};
        for (int role = 0; role < ROLES; role++) c.layout[role] = (int)random_below(random, LAYOUTS);
        build_case(&c, (int)random_below(random, 27), random);
        unsigned char *before = prepare(&c);
        const int mode = rounding_modes[large ? 1 + random_below(random, 3) : random_below(random, 4)];
        const bool flush_to_zero = random_below(random, 2);
        for (int p = 0; p < path_count; p++) {
            require_ok(fn_cpu_force_path(fn_path_name(paths[p])));
            calls++;
            enter_environment(mode, flush_to_zero);
            const fn_status status = fn_mm(&c.args);
            leave_environment(fn_path_name(paths[p]));
            require_ok(status);
            compare(&c, before, fn_path_name(paths[p]));
        }
        free(before);
        free_case(&c);
    }
    report("other rounding modes and flush-to-zero", start);
}

int main(int argc, char **argv) {
    const check_options options = check_parse(argc, argv, "fn_mm on every CPU path against the contract, bit for bit");
    const double start = check_seconds();
    uint64_t random = hash64(options.seed);
    exact_prepare();
    find_paths("mm_paths", options.seed);

    empty_products(&random);
    every_dtype_and_layout(options.sample ? 1 : 10, &random);
    large_calls(options.sample, &random);
    pairs_of_bfloat16(options.sample ? 150 : 3000, &random);
    other_environments(options.sample ? 100 : 2000, &random);
    report_all(start);
    return 0;
}
