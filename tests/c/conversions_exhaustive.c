/* conversions_exhaustive.c: the conversions of every available CPU path, over their whole domains.
 *
 * fp32 -> fp16 and fp32 -> bf16: all 2^32 encodings, against the intervals of exact_dtypes.h. fp16 and bf16 -> fp32: all
 * 65536 encodings. Then every length up to 130 at odd addresses, since a vector path converts the end of a row by other
 * instructions. A NaN must stay a NaN; which one is not fixed.
 */
#include "check.h"
#include "cpu/cpu.h"
#include "exact_dtypes.h"

#define BLOCK 16384
#define BLOCKS ((INT64_C(1) << 32) / BLOCK)
#define LONGEST_TAIL 130

static const exact_format *const formats[] = {&exact_fp16, &exact_bf16};

/* Each path's conversions in the natural order, then those of bfloat16 in the paired order; the scalar path has one. */
static struct {
    const fn_norm_kernels *path;
    bool paired;
} ways[2 * FN_PATH_COUNT];
static int natural_ways, all_ways;

static int way_count(const exact_format *format) { return format->dtype == FN_BFLOAT16 ? all_ways : natural_ways; }

/* Narrows `count` floats on every path and compares with what is expected; a place is an fp32 encoding. */
static void check_narrow(const exact_format *format, const float *source, const uint16_t *expected, int64_t count,
                         check_first *first) {
    uint16_t target[BLOCK];
    for (int way = 0; way < way_count(format); way++) {
        const fn_norm_kernels *const path = ways[way].path;
        memset(target, 0x5a, sizeof target);
        path->narrow(source, format->dtype, target, count, ways[way].paired);
        if (memcmp(target, expected, (size_t)count * sizeof *target) == 0) continue;
        for (int64_t i = 0; i < count; i++) {
            const uint32_t bits = bits_of(source[i]);
            const bool is_nan = (bits & FP32_MAGNITUDE) > FP32_INFINITY;
            if (is_nan ? exact_is_nan16(format, target[i]) : target[i] == expected[i]) continue;
            CHECK_KEEP(first, (int64_t)bits, "%s%s: %s of %a, 0x%08x, gave 0x%04x, not 0x%04x%s", path->name,
                       ways[way].paired ? ", paired" : "", fn_dtypes[format->dtype].name, (double)source[i], bits,
                       target[i], expected[i], is_nan ? " or another NaN" : "");
            break;
        }
    }
}

/* Expected encodings of BLOCK consecutive fp32 encodings of one sign: the interval changes rarely, so it is stepped. */
static void expect_block(const exact_format *format, uint32_t base, uint16_t *expected) {
    const uint16_t sign = (uint16_t)(base >> 16 & 0x8000);
    uint32_t magnitude = base & FP32_MAGNITUDE;
    uint32_t h = exact_narrow(format, magnitude);
    for (int i = 0; i < BLOCK;) {
        const uint32_t next = magnitude > FP32_INFINITY ? UINT32_MAX
                              : h == format->infinity   ? FP32_INFINITY + 1
                                                        : format->lowest[h + 1];
        for (; i < BLOCK && magnitude < next; i++, magnitude++) expected[i] = (uint16_t)(sign | h);
        h = magnitude > FP32_INFINITY ? 0x7fff : h + 1;
    }
}

static int64_t narrow_everything(check_first *first) {
    OPENMP(omp parallel for schedule(dynamic, 16))
    for (int64_t block = 0; block < BLOCKS; block++) {
        float source[BLOCK];
        uint16_t expected[BLOCK];
        const uint32_t base = (uint32_t)(block * BLOCK);
        for (uint32_t i = 0; i < BLOCK; i++) source[i] = float_of(base + i);
        for (int f = 0; f < 2; f++) {
            expect_block(formats[f], base, expected);
            check_narrow(formats[f], source, expected, BLOCK, first);
        }
    }
    return 2 * BLOCKS * BLOCK;
}

/* Both ends of each interval, of both signs, the encodings beside them, and places in it that the seed chooses; NaNs. */
static int64_t narrow_sample(uint64_t seed, check_first *first) {
    enum { PER_INTERVAL = 16, STEP = BLOCK / PER_INTERVAL };
    int64_t checked = 0;
    for (int f = 0; f < 2; f++) {
        const exact_format *const format = formats[f];
    OPENMP(omp parallel for schedule(dynamic) reduction(+ : checked))
    for (uint32_t begin = 0; begin < 0x8000; begin += STEP) {
        float source[BLOCK];
        uint16_t expected[BLOCK];
        int64_t count = 0;
        for (uint32_t h = begin; h < begin + STEP; h++) {
            const bool is_nan = h > format->infinity;
            const uint32_t low = is_nan ? FP32_INFINITY + 1 : format->lowest[h];
            const uint32_t high = is_nan                  ? FP32_MAGNITUDE
                                  : h == format->infinity ? FP32_INFINITY
                                                          : format->lowest[h + 1] - 1;
            for (uint32_t k = 0; k < PER_INTERVAL / 2; k++) {
                const uint64_t random = hash64(hash64(seed) ^ ((uint64_t)h << 8 | k << 1 | (unsigned)f));
                const uint32_t inside = low + (uint32_t)(random % (high - low + 1));
                const uint32_t bits = k == 0   ? low
                                      : k == 1 ? high
                                      : k == 2 ? low + (low < high)
                                      : k == 3 ? high - (low < high)
                                               : inside;
                source[count] = float_of(bits);
                expected[count++] = (uint16_t)(is_nan ? 0x7fff : h);
                source[count] = float_of(bits | 0x80000000u);
                expected[count++] = (uint16_t)(is_nan ? 0x7fff : h | 0x8000);
            }
        }
        check_narrow(format, source, expected, count, first);
        checked += count;
    }
    }
    return checked;
}

static void require_same_float(const char *path, const exact_format *format, uint32_t encoding, float got) {
    const float expected = format->number[encoding];
    if (isnan(expected) ? isnan(got) : bits_of(got) == bits_of(expected)) return;
    CHECK_FAIL("%s: float32 of the %s 0x%04x gave %a, 0x%08x, not %a", path, fn_dtypes[format->dtype].name, encoding,
               (double)got, bits_of(got), (double)expected);
}

static int64_t widen_everything(void) {
    static uint16_t source[0x10000];
    static float target[0x10000];
    for (uint32_t encoding = 0; encoding < 0x10000; encoding++) source[encoding] = (uint16_t)encoding;
    for (int f = 0; f < 2; f++) {
        for (int way = 0; way < way_count(formats[f]); way++) {
            const fn_norm_kernels *const path = ways[way].path;
            memset(target, 0x5a, sizeof target);
            path->widen(source, formats[f]->dtype, target, 0x10000, ways[way].paired);
            for (uint32_t encoding = 0; encoding < 0x10000; encoding++)
                require_same_float(path->name, formats[f], encoding, target[encoding]);
        }
    }
    return 2 * 0x10000;
}

/* One length at one address: what is converted, and that the bytes around the target stay. */
static void check_tail(int way, const exact_format *format, int64_t count, int offset, uint64_t *random) {
    const fn_norm_kernels *const path = ways[way].path;
    const bool paired = ways[way].paired;
    unsigned char narrow_memory[2 * LONGEST_TAIL + 32];
    float wide_memory[LONGEST_TAIL + 16], wide[LONGEST_TAIL];
    uint16_t narrow[LONGEST_TAIL];

    /* Half of the floats lie in the 16-bit range, the others are any encoding, and a few are NaNs beside numbers: those that
     * a carry makes an infinity or a zero. */
    static const uint32_t nans[] = {0x7f800001, 0x7fffffff, 0xff800001, 0xffffffff};
    for (int i = 0; i < LONGEST_TAIL; i++) {
        const uint64_t word = random64(random);
        wide[i] = word & 1 ? float_of((uint32_t)(word >> 32)) : format->number[word >> 48];
        if (word & 2) wide[i] *= 1.0f + (float)(word >> 4 & 0xfff) * 0x1p-12f;
        if ((word >> 16 & 31) == 0) wide[i] = float_of(nans[word >> 21 & 3]);
    }
    memset(narrow_memory, 0x5a, sizeof narrow_memory);
    path->narrow(wide, format->dtype, narrow_memory + offset, count, paired);
    memcpy(narrow, narrow_memory + offset, (size_t)count * 2);
    for (int64_t i = 0; i < count; i++) {
        const uint16_t expected = exact_narrow(format, bits_of(wide[i]));
        if (isnan(wide[i]) ? exact_is_nan16(format, narrow[i]) : narrow[i] == expected) continue;
        CHECK_FAIL("%s: %s number %lld of %lld at offset %d: %a gave 0x%04x, not 0x%04x", path->name,
                   fn_dtypes[format->dtype].name, (long long)i, (long long)count, offset, (double)wide[i], narrow[i],
                   expected);
    }
    for (int64_t at = 0; at < (int64_t)sizeof narrow_memory; at++)
        if ((at < offset || at >= offset + 2 * count) && narrow_memory[at] != 0x5a)
            CHECK_FAIL("%s: narrow to %s wrote outside its %lld elements, at byte %lld", path->name,
                       fn_dtypes[format->dtype].name, (long long)count, (long long)(at - offset));

    for (int i = 0; i < LONGEST_TAIL; i++) narrow[i] = (uint16_t)random64(random);
    memcpy(narrow_memory + offset, narrow, sizeof narrow);
    memset(wide_memory, 0x5a, sizeof wide_memory);
    path->widen(narrow_memory + offset, format->dtype, wide_memory, count, paired);
    for (int64_t i = 0; i < count; i++) require_same_float(path->name, format, narrow[i], wide_memory[i]);
    for (int64_t i = count; i < LONGEST_TAIL + 16; i++)
        if (bits_of(wide_memory[i]) != 0x5a5a5a5a)
            CHECK_FAIL("%s: widen from %s wrote outside its %lld elements, at number %lld", path->name,
                       fn_dtypes[format->dtype].name, (long long)count, (long long)i);
}

static int64_t check_tails(uint64_t *random) {
    int64_t checked = 0;
    for (int f = 0; f < 2; f++) {
        for (int way = 0; way < way_count(formats[f]); way++) {
            for (int64_t count = 0; count <= LONGEST_TAIL; count++) {
                for (int offset = 0; offset < 4; offset++) check_tail(way, formats[f], count, offset, random);
                checked += 4;
            }
        }
    }
    return checked;
}

int main(int argc, char **argv) {
    const check_options options = check_parse(
        argc, argv, "fp32 <-> fp16 and fp32 <-> bf16 of every available CPU path, over their whole domains");
    const double start = check_seconds();
    uint64_t random = hash64(options.seed);
    check_first first = CHECK_FIRST_NONE;
    exact_prepare();

    printf("conversions: paths");
    for (int path = 0; path < FN_PATH_COUNT; path++) {
        bool skip = !fn_path_is_available((fn_path)path);
        for (int way = 0; way < natural_ways; way++) skip = skip || ways[way].path == fn_norm_paths[path];
        if (skip) continue;
        ways[natural_ways++].path = fn_norm_paths[path];
        printf(" %s", fn_norm_paths[path]->name);
    }
    all_ways = natural_ways;
    for (int way = 0; way < natural_ways; way++) {
        if (ways[way].path == &fn_norm_scalar) continue;
        ways[all_ways].path = ways[way].path;
        ways[all_ways++].paired = true;
    }
    printf(", %d threads, seed %llu\n", options.threads, (unsigned long long)options.seed);

    const int64_t widened = widen_everything();
    const int64_t tails = check_tails(&random);
    const int64_t narrowed = options.sample ? narrow_sample(options.seed, &first) : narrow_everything(&first);
    if (first.place != INT64_MAX) CHECK_FAIL("%s", first.text);
    printf("conversions: %lld 16-bit encodings widened and %lld fp32 encodings narrowed (%s) on each path,\n"
           "             %lld lengths and addresses: all exact or correctly rounded, %.1f s\n",
           (long long)widened, (long long)narrowed, options.sample ? "a sample" : "all, to two types", (long long)tails,
           check_seconds() - start);
    return 0;
}
