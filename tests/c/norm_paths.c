/* norm_paths.c: fn_norm on every available CPU path against the contract written once more (norm_reference.h).
 *
 * All combinations of dtypes and of used arrays, row lengths to 2^20, random strides, addresses and options, in place and
 * not, rows in parts, one to four threads, and a caller with another rounding mode and with flush-to-zero. What is compared
 * is the whole memory of every array: outputs bit for bit (a NaN with any NaN), everything else unchanged.
 */
#define _DEFAULT_SOURCE /* mmap's MAP_ANONYMOUS */
#include "cpu/cpu.h"
#include "norm_check.h"
#include "norm_reference.h"
#include "paths.h"

static uint32_t encoding_at(const unsigned char *at, fn_dtype dtype) {
    uint32_t bits = 0;
    uint16_t half;
    if (dtype == FN_FLOAT32) {
        memcpy(&bits, at, 4);
        return bits;
    }
    memcpy(&half, at, 2);
    return half;
}

static void describe(const norm_case *c) {
    for (int role = 0; role < ROLES; role++) {
        const fn_tensor *const t = &c->arrays[role].tensor;
        if (!c->used[role]) continue;
        fprintf(stderr, "  %s: %s, address %% 64 = %d, shape", role_names[role], fn_dtypes[c->dtype[role]].name,
                (int)((uintptr_t)t->data % 64));
        for (int d = 0; d < t->ndim; d++) fprintf(stderr, " %lld", (long long)t->shape[d]);
        fprintf(stderr, ", strides in bytes");
        for (int d = 0; d < t->ndim; d++) fprintf(stderr, " %lld", (long long)t->stride_bytes[d]);
        fputc('\n', stderr);
    }
    fprintf(
        stderr, "  eps %g, weight_offset %g, cast_x_before_out_mul %d, round_sum %d, in place: out %d, residual %d\n",
        c->eps, c->weight_offset, c->cast_x_before_out_mul, (int)c->round_sum, c->out_in_place, c->residual_in_place);
}

static void compare_output(norm_case *c, int role, const char *path) {
    const norm_array *const array = &c->arrays[role];
    const int64_t stride = array->stride_bytes[array->tensor.ndim - 1];
    const size_t item = (size_t)fn_dtypes[c->dtype[role]].bytes;
    elements += row_count(c) * c->columns;
    if (memcmp(array->memory, array->after, (size_t)array->bytes) == 0) return;
    for (int64_t row = 0; row < row_count(c); row++) {
        const int64_t first = row_offset(c, array, row);
        for (int64_t column = 0; column < c->columns; column++) {
            unsigned char *const at = array->memory + first + column * stride;
            const unsigned char *const expected = array->after + first + column * stride;
            if (memcmp(at, expected, item) == 0) continue;
            const float is = load_element(at, c->dtype[role]), must = load_element(expected, c->dtype[role]);
            if (isnan(is) && isnan(must)) {
                memcpy(at, expected, item);
                continue;
            }
            fprintf(stderr, "%s: %s[%lld, %lld] is %a, 0x%x, not %a, 0x%x\n", path, role_names[role], (long long)row,
                    (long long)column, (double)is, encoding_at(at, c->dtype[role]), (double)must,
                    encoding_at(expected, c->dtype[role]));
            describe(c);
            CHECK_FAIL("seed %llu, call %lld", (unsigned long long)seed, (long long)calls);
        }
    }
}

static void compare_case(norm_case *c, const char *path) {
    compare_output(c, OUT, path);
    if (c->used[RESIDUAL]) compare_output(c, RESIDUAL_OUT, path);
    for (int role = 0; role < ROLES; role++) {
        const norm_array *const array = &c->arrays[role];
        if (!c->used[role] || memcmp(array->memory, array->after, (size_t)array->bytes) == 0) continue;
        describe(c);
        CHECK_FAIL("%s: wrote bytes of %s that are no result; seed %llu, call %lld", path, role_names[role],
                   (unsigned long long)seed, (long long)calls);
    }
}

static void run_on_path(norm_case *c, fn_path path) {
    reset_memory(c);
    require_ok(fn_cpu_force_path(fn_path_name(path)));
    calls++;
    const fn_status status = fn_norm(&c->args);
    if (status != FN_OK) {
        describe(c);
        CHECK_FAIL("%s: status %d: %s", fn_path_name(path), (int)status, fn_error_text());
    }
    compare_case(c, fn_path_name(path));
}

static void run_on_all_paths(norm_case *c) {
    for (int p = 0; p < path_count; p++) run_on_path(c, paths[p]);
}

/* ---- the parts ------------------------------------------------------------------------------------------------------ */

static void every_dtype_combination(int repeats, uint64_t *random) {
    const double start = check_seconds();
    static const int64_t lengths[] = {1,  2,  3,  7,   8,   9,   15,  16,  17,  24,  31,  32,  33,  63, 64,
                                      65, 72, 96, 100, 111, 127, 128, 129, 191, 192, 193, 255, 256, 257};
    for (int64_t n = 0; n < DTYPE_COMBINATIONS * (int64_t)repeats; n++) {
        norm_case c = {0};
        choose_dtypes(&c, n % DTYPE_COMBINATIONS);
        choose_options(&c, random);
        c.columns = lengths[random_below(random, (int64_t)(sizeof lengths / sizeof *lengths))];
        build_case(&c, random);
        expect_case(&c);
        run_on_all_paths(&c);
        free_case(&c);
    }
    report("every dtype combination", start);
}

static void every_row_length(bool sample, uint64_t *random) {
    const double start = check_seconds();
    static const int64_t longer[] = {511,  512,  513,  768,  1000, 1023,  1024,  1025,  2047,   2048,   2880,   3584,
                                     4095, 4096, 5120, 7168, 8192, 12288, 16384, 28672, 131072, 300001, 1048576};
    const int64_t shorter = sample ? 70 : 520;
    for (int64_t n = 1; n < shorter + (int64_t)(sizeof longer / sizeof *longer); n++) {
        const int64_t columns = n < shorter ? n : longer[n - shorter];
        if (sample && columns > 30000) continue;
        for (int k = 0; k < 8; k++) {
            norm_case c = {0};
            choose_dtypes(&c, k < 3 ? random_below(random, 36) : 36 + random_below(random, DTYPE_COMBINATIONS - 36));
            if (k < 6) choose_one_dtype(&c, (fn_dtype)(k % 3));
            choose_options(&c, random);
            c.columns = columns;
            const bool any_layout = random_below(random, 4) == 0;
            c.plain = !any_layout;
            if (columns > 4096) c.leading[0] = c.leading[1] = 1;
            build_case(&c, random);
            expect_case(&c);
            run_on_all_paths(&c);
            free_case(&c);
        }
    }
    report("row lengths", start);
}

/* A path's functions as fn_norm uses them for large calls, on small ones: rows stored past the cache, and the steps of one
 * row in parts, as threads share it. The first step's parts begin at multiples of FN_COLUMN_QUANTUM, the last one's
 * anywhere. */
static void kernels_in_parts(int repeats, uint64_t *random) {
    const double start = check_seconds();
    enum { LONGEST = 1500 };
    static float sums[LONGEST / 8 + FN_COLUMN_QUANTUM];
    for (int n = 0; n < repeats; n++) {
        norm_case c = {0};
        choose_dtypes(&c, random_below(random, DTYPE_COMBINATIONS));
        const int64_t dtype = random_below(random, 2 * FN_DTYPE_COUNT);
        if (dtype < FN_DTYPE_COUNT) choose_one_dtype(&c, (fn_dtype)dtype);
        choose_options(&c, random);
        c.columns = 1 + random_below(random, LONGEST);
        c.plain = n % 4 != 0;
        build_case(&c, random);
        expect_case(&c);
        const int hints = (int)random_below(random, (FN_STREAM | FN_PREFETCH) + 1);
        const int64_t quanta = c.columns / FN_COLUMN_QUANTUM + 1;
        const int64_t shared_at = random_below(random, quanta) * FN_COLUMN_QUANTUM;
        const int64_t finished_at = random_below(random, c.columns);
        for (int p = 0; p < path_count; p++) {
            const fn_norm_kernels *const kernels = fn_norm_paths[paths[p]];
            fn_norm_plan plan;
            reset_memory(&c);
            require_ok(fn_norm_check(&c.args, &plan));
            calls++;
            if (n % 2 == 0) {
                kernels->rows(&plan, 0, plan.rows, hints, sums);
            } else {
                for (int64_t number = 0; number < plan.rows; number++) {
                    fn_walk walk;
                    fn_walk_to(&plan, number, &walk);
                    kernels->sum_groups(&plan, &walk.row, shared_at, c.columns, sums);
                    kernels->sum_groups(&plan, &walk.row, 0, shared_at, sums);
                    const float total = kernels->fold(sums, c.columns);
                    if (bits_of(total) != bits_of(c.totals[number]) && !(isnan(total) && isnan(c.totals[number])))
                        CHECK_FAIL("%s: the squares of row %lld add up to %a, not %a; seed %llu, call %lld",
                                   kernels->name, (long long)number, (double)total, (double)c.totals[number],
                                   (unsigned long long)seed, (long long)calls);
                    const float r = fn_norm_scale(total, &plan);
                    kernels->finish(&plan, &walk.row, finished_at, c.columns, r, hints);
                    kernels->finish(&plan, &walk.row, 0, finished_at, r, hints);
                }
            }
            compare_case(&c, kernels->name);
        }
        free_case(&c);
    }
    report("rows in parts and past the cache", start);
}

/* Calls that are shared by threads; the last one exceeds most caches. */
static void large_calls(bool sample, uint64_t *random) {
    const double start = check_seconds();
    static const struct {
        int64_t rows, columns;
        bool huge;
    } sizes[] = {{300, 1000, false}, {2, 262147, false}, {1, 1048576, false},
                 {2048, 129, false}, {7, 65536, false},  {12000, 1031, true}};
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++) {
        if (sample && n > 0) break;
        for (int k = 0; k < (sizes[n].huge ? 1 : 3); k++) {
            norm_case c = {0};
            choose_dtypes(&c, (int)n % 2 != k % 2 ? 36 + random_below(random, DTYPE_COMBINATIONS - 36)
                                                  : random_below(random, 36));
            choose_options(&c, random);
            if (sizes[n].huge) { /* for every cache */
                c.out_in_place = c.residual_in_place = false;
                c.dtype[OUT] = FN_FLOAT32;
            }
            c.ndim = 2;
            c.leading[0] = 1;
            c.leading[1] = sizes[n].rows;
            c.columns = sizes[n].columns;
            c.plain = sizes[n].huge || k < 2;
            build_case(&c, random);
            expect_case(&c);
            for (int threads = 1; threads <= 4; threads++) {
                require_ok(fn_set_num_threads(threads));
                if (fn_get_num_threads() != threads) CHECK_FAIL("fn_get_num_threads: %d", fn_get_num_threads());
                run_on_all_paths(&c);
            }
            free_case(&c);
        }
    }
    report("large calls, 1 to 4 threads", start);
}

static void other_environments(int repeats, uint64_t *random) {
    const double start = check_seconds();
    require_ok(fn_set_num_threads(POOL_THREADS));
    for (int n = 0; n < repeats; n++) {
        norm_case c = {0};
        choose_dtypes(&c, random_below(random, DTYPE_COMBINATIONS));
        choose_options(&c, random);
        c.columns = 1 + random_below(random, 300);
        if (n % 64 == 0) { /* enough for several threads */
            c.ndim = 2;
            c.leading[0] = 1;
            c.leading[1] = (1 << 18) / c.columns;
        }
        build_case(&c, random);
        expect_case(&c);
        const int mode = rounding_modes[random_below(random, 4)];
        const bool flush_to_zero = random_below(random, 2) != 0;
        for (int p = 0; p < path_count; p++) {
            reset_memory(&c);
            require_ok(fn_cpu_force_path(fn_path_name(paths[p])));
            calls++;
            enter_environment(mode, flush_to_zero);
            const fn_status status = fn_norm(&c.args);
            leave_environment(fn_path_name(paths[p]));
            require_ok(status);
            compare_case(&c, fn_path_name(paths[p]));
        }
        free_case(&c);
    }
    report("other rounding modes and flush-to-zero", start);
}

static void no_rows(uint64_t *random) {
    for (int p = 0; p < path_count; p++) {
        norm_case c = {0};
        choose_dtypes(&c, random_below(random, DTYPE_COMBINATIONS));
        choose_options(&c, random);
        c.out_in_place = c.residual_in_place = false;
        c.ndim = 2;
        c.leading[0] = c.leading[1] = 1;
        c.columns = 8;
        build_case(&c, random);
        for (int role = 0; role < ROLES; role++) {
            if (role == WEIGHT || !c.used[role]) continue;
            c.arrays[role].shape[0] = 0;
            c.arrays[role].tensor.data = NULL;
        }
        require_ok(fn_cpu_force_path(fn_path_name(paths[p])));
        require_ok(fn_norm(&c.args));
        calls++;
        free_case(&c);
    }
}

int main(int argc, char **argv) {
    const check_options options =
        check_parse(argc, argv, "fn_norm on every CPU path against the contract, bit for bit");
    const double start = check_seconds();
    uint64_t random = hash64(options.seed);
    exact_prepare();
    prepare_arenas();
    find_paths("norm_paths", options.seed);

    no_rows(&random);
    every_dtype_combination(options.sample ? 1 : 8, &random);
    every_row_length(options.sample, &random);
    other_environments(options.sample ? 100 : 2000, &random);
    kernels_in_parts(options.sample ? 200 : 2000, &random);
    large_calls(options.sample, &random);
    report_all(start);
    return 0;
}
