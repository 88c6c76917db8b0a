/* rsqrt_exhaustive.c: fn_rsqrt is the correctly rounded 1/sqrt for every non-negative float.
 *
 * The statement has no floating point in it. A float r is the one nearest to 1/sqrt(v) if and only if the midpoints
 * a < r < b between r and its neighbours enclose 1/sqrt(v), that is a * a * v < 1 < b * b * v. With v = mv * 2^ev and
 * midpoints q * 2^(er - 2), q an integer, that compares the integer q * q * mv (at most 2^77) with a power of two.
 * Equality, a tie, cannot happen: q is odd or twice an odd number greater than 1, so the product is no power of two.
 */
#include "check.h"
#include "numerics.h"

#define CHUNK 4096
#define CHUNKS (INT64_C(0x80000000) / CHUNK)
#define FP32_INFINITY UINT32_C(0x7f800000)

/* (q * 2^(er - 2))^2 * mv * 2^ev against 1: -1, 0 or 1. */
static int compare_with_one(uint64_t q, int er, uint64_t mv, int ev) {
    const unsigned __int128 product = (unsigned __int128)(q * q) * mv;
    const int power = -(2 * (er - 2) + ev);
    if (power < 0) return 1;
    if (power > 127) return -1;
    const unsigned __int128 one = (unsigned __int128)1 << power;
    return product > one ? 1 : product < one ? -1 : 0;
}

static bool is_correct(uint32_t v, uint32_t r) {
    if (v == 0) return r == FP32_INFINITY;
    if (v == FP32_INFINITY) return r == 0;
    if (v > FP32_INFINITY) return (r & 0x7fffffff) > FP32_INFINITY;

    /* 1/sqrt of a positive finite float lies between 2^-64 and 2^74.5, so r must be a normal number. */
    const int r_exponent = (int)(r >> 23);
    if (r_exponent <= 0 || r_exponent >= 255) return false;
    const uint64_t mr = (r & 0x7fffff) | 0x800000;
    const int er = r_exponent - 150;
    const int v_exponent = (int)(v >> 23);
    const uint64_t mv = v_exponent == 0 ? v : ((v & 0x7fffff) | 0x800000);
    const int ev = (v_exponent == 0 ? 1 : v_exponent) - 150;

    /* Below a power of two the floats lie twice as dense. */
    const uint64_t below = 4 * mr - (mr == 0x800000 ? 1 : 2);
    const uint64_t above = 4 * mr + 2;
    return compare_with_one(below, er, mv, ev) < 0 && compare_with_one(above, er, mv, ev) > 0;
}

static void check_encoding(check_first *first, uint32_t v, uint32_t r) {
    if (is_correct(v, r)) return;
    CHECK_KEEP(first, (int64_t)v, "fn_rsqrt(%a, 0x%08x) gave %a, 0x%08x, which is not the correctly rounded 1/sqrt",
               (double)float_of(v), v, (double)float_of(r), r);
}

int main(int argc, char **argv) {
    const check_options options =
        check_parse(argc, argv, "fn_rsqrt is the correctly rounded 1/sqrt for every non-negative float");
    const double start = check_seconds();
    check_first first = CHECK_FIRST_NONE;
    int64_t checked = 0;

    OPENMP(omp parallel for schedule(dynamic, 64) reduction(+ : checked))
    for (int64_t chunk = 0; chunk < CHUNKS; chunk++) {
        const uint32_t base = (uint32_t)(chunk * CHUNK);
        if (options.sample) {
            /* Both ends of each stretch and places in it that the seed chooses. */
            for (uint32_t i = 0; i < 12; i++) {
                const uint32_t random = (uint32_t)hash64(options.seed << 32 ^ (base + i)) % CHUNK;
                const uint32_t v = base + (i < 2 ? i : i < 4 ? CHUNK - (i - 1) : random);
                check_encoding(&first, v, bits_of(fn_rsqrt(float_of(v))));
                checked++;
            }
            continue;
        }
        float r[CHUNK];
        for (uint32_t i = 0; i < CHUNK; i++) r[i] = fn_rsqrt(float_of(base + i));
        for (uint32_t i = 0; i < CHUNK; i++) check_encoding(&first, base + i, bits_of(r[i]));
        checked += CHUNK;
    }

    /* NaNs with the sign bit set; -0 and negative numbers never reach fn_rsqrt, which sees a sum of squares plus eps. */
    for (uint32_t payload = 1; payload < 0x800000; payload += options.sample ? 4099 : 1) {
        const uint32_t v = UINT32_C(0xff800000) | payload;
        check_encoding(&first, v, bits_of(fn_rsqrt(float_of(v))));
        checked++;
    }

    if (first.place != INT64_MAX) CHECK_FAIL("%s", first.text);
    printf("rsqrt: %lld encodings, %s, %d threads, %.1f s: all correctly rounded\n", (long long)checked,
           options.sample ? "a sample of the non-negative floats" : "every non-negative float and every NaN",
           options.threads, check_seconds() - start);
    return 0;
}
