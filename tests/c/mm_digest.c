/* mm_digest.c: what bits_digest.c is for norms: one digest for each CPU path of the results of a fixed set of products.
 *
 * The calls go through every combination of dtypes and of layouts, K around lanes and chunks, N and M around tiles and
 * blocks, and values that make roundings, subnormals, signed zeros, infinities and NaNs; NaNs of one dtype count as one.
 */
#include "mm_case.h"

static uint64_t digest_output(uint64_t digest, const product_case *c) {
    const matrix *const out = &c->arrays[OUT];
    const int bytes = fn_dtypes[out->tensor.dtype].bytes;
    for (int64_t i = 0; i < c->m; i++)
        for (int64_t j = 0; j < c->n; j++) {
            const unsigned char *at = (const unsigned char *)out->tensor.data + i * out->stride[0] + j * out->stride[1];
            uint32_t word = UINT32_C(0xffffffff);
            uint16_t half;
            if (!isnan(load_number(out, i, j))) {
                if (bytes == 4) memcpy(&word, at, sizeof word);
                else word = (memcpy(&half, at, sizeof half), half);
            }
            for (int byte = 0; byte < bytes; byte++) /* FNV-1a */
                digest = (digest ^ (word >> 8 * byte & 0xff)) * UINT64_C(0x100000001b3);
        }
    return digest;
}

int main(int argc, char **argv) {
    const check_options options =
        check_parse(argc, argv, "a digest of the results of a fixed set of products, for each path");
    static const int64_t lengths[] = {0, 1, 7, 15, 16, 17, 40, 100, 257, 1023, 1024, 1025, 1100, 2050, 3000};
    static const int64_t rows[] = {1, 2, 3, 4, 5, 8, 17, 33, 70}, columns[] = {1, 2, 3, 5, 8, 16, 19, 65, 130};
    enum { CALLS = 27 * LAYOUTS * LAYOUTS };
    uint64_t digest[FN_PATH_COUNT], random = hash64(options.seed);
    int64_t elements = 0;
    exact_prepare();
    for (int path = 0; path < FN_PATH_COUNT; path++) digest[path] = UINT64_C(0xcbf29ce484222325);

    for (int n = 0; n < CALLS; n++) {
        if (options.sample && n % 5 != 0) continue;
        product_case c = {0};
        c.m = PICK(rows, &random); /* one after the other: an initialiser's parts have no order */
        c.n = PICK(columns, &random);
        c.k = PICK(lengths, &random);
        c.has_bias = random_below(&random, 2);
        c.values = choose_values(&random);
        c.layout[A] = n / 27 % LAYOUTS;
        c.layout[B] = n / 27 / LAYOUTS;
        c.layout[BIAS] = (int)random_below(&random, LAYOUTS);
        c.layout[OUT] = (int)random_below(&random, LAYOUTS);
        build_case(&c, n % 27, &random);
        for (int path = 0; path < FN_PATH_COUNT; path++) {
            if (!fn_path_is_available((fn_path)path)) continue;
            fn_status status = fn_cpu_force_path(fn_path_name((fn_path)path));
            if (status == FN_OK) status = fn_mm(&c.args);
            if (status != FN_OK)
                CHECK_FAIL("%s: status %d: %s", fn_path_name((fn_path)path), (int)status, fn_error_text());
            digest[path] = digest_output(digest[path], &c);
        }
        elements += c.m * c.n;
        free_case(&c);
    }

    for (int path = 0; path < FN_PATH_COUNT; path++) {
        if (!fn_path_is_available((fn_path)path)) continue;
        printf("digest %s %016llx %lld\n", fn_path_name((fn_path)path), (unsigned long long)digest[path],
               (long long)elements);
        if (digest[path] != digest[FN_PATH_SCALAR]) CHECK_FAIL("%s differs from scalar", fn_path_name((fn_path)path));
    }
    return 0;
}
