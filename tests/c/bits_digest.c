/* bits_digest.c: one 64-bit digest for each CPU path of the results of a fixed set of calls.
 *
 * Builds by different compilers, at different optimisation levels and for different processors must print the same digest,
 * and so must every path of one build. The calls go through every combination of dtypes, many row lengths and layouts, and
 * values that make roundings, subnormals, infinities and NaNs; NaNs of one dtype count as one.
 */
#define _DEFAULT_SOURCE /* mmap's MAP_ANONYMOUS */
#include "norm_case.h"

static uint64_t digest_bytes(uint64_t digest, uint32_t word, int bytes) { /* FNV-1a */
    for (int i = 0; i < bytes; i++) digest = (digest ^ (word >> 8 * i & 0xff)) * UINT64_C(0x100000001b3);
    return digest;
}

static uint64_t digest_output(uint64_t digest, const norm_case *c, int role) {
    const norm_array *const array = &c->arrays[role];
    const fn_dtype dtype = c->dtype[role];
    for (int64_t row = 0; row < row_count(c); row++) {
        const unsigned char *at = array->memory + row_offset(c, array, row);
        for (int64_t column = 0; column < c->columns; column++, at += array->stride_bytes[array->tensor.ndim - 1]) {
            uint32_t word = 0;
            uint16_t half;
            if (dtype == FN_FLOAT32) {
                memcpy(&word, at, sizeof word);
            } else {
                memcpy(&half, at, sizeof half);
                word = half;
            }
            if (isnan(load_element(at, dtype))) word = UINT32_C(0xffffffff);
            digest = digest_bytes(digest, word, fn_dtypes[dtype].bytes);
        }
    }
    return digest;
}

int main(int argc, char **argv) {
    const check_options options =
        check_parse(argc, argv, "a digest of the results of a fixed set of calls, for each path");
    static const int64_t lengths[] = {1,   2,   7,   8,   9,   15,  63,  64,   65,   100,  111,  127,
                                      128, 129, 255, 256, 257, 511, 768, 1000, 1024, 2880, 3584, 4095};
    enum { LENGTHS = sizeof lengths / sizeof *lengths, ONE_DTYPE = 20 * LENGTHS };
    uint64_t digest[FN_PATH_COUNT], random = hash64(options.seed);
    int64_t elements = 0;
    exact_prepare();
    prepare_arenas();
    for (int path = 0; path < FN_PATH_COUNT; path++) digest[path] = UINT64_C(0xcbf29ce484222325);

    for (int64_t n = 0; n < DTYPE_COMBINATIONS + ONE_DTYPE; n++) {
        if (options.sample && n % 5 != 0) continue;
        norm_case c = {0};
        choose_dtypes(&c, n % DTYPE_COMBINATIONS);
        choose_options(&c, &random);
        c.columns = lengths[n % LENGTHS];
        c.plain = n >= DTYPE_COMBINATIONS;
        if (c.plain) choose_one_dtype(&c, (fn_dtype)(n / LENGTHS % FN_DTYPE_COUNT));
        if (c.columns > 1000) c.leading[0] = 1;
        build_case(&c, &random);
        for (int path = 0; path < FN_PATH_COUNT; path++) {
            if (!fn_path_is_available((fn_path)path)) continue;
            reset_memory(&c);
            fn_status status = fn_cpu_force_path(fn_path_name((fn_path)path));
            if (status == FN_OK) status = fn_norm(&c.args);
            if (status != FN_OK)
                CHECK_FAIL("%s: status %d: %s", fn_path_name((fn_path)path), (int)status, fn_error_text());
            digest[path] = digest_output(digest[path], &c, OUT);
            if (c.used[RESIDUAL]) digest[path] = digest_output(digest[path], &c, RESIDUAL_OUT);
        }
        elements += row_count(&c) * c.columns * (c.used[RESIDUAL] ? 2 : 1);
        free_case(&c);
    }

    uint64_t first = 0;
    for (int path = 0; path < FN_PATH_COUNT; path++) {
        if (!fn_path_is_available((fn_path)path)) continue;
        printf("digest %s %016llx %lld\n", fn_path_name((fn_path)path), (unsigned long long)digest[path],
               (long long)elements);
        if (path == FN_PATH_SCALAR) first = digest[path];
        if (digest[path] != first) CHECK_FAIL("%s differs from scalar", fn_path_name((fn_path)path));
    }
    return 0;
}
