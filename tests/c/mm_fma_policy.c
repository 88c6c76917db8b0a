/* mm_fma_policy.c: which kernel a product with an fp32 operand takes, and in which clusters, without a GPU: csrc/cuda/mm_fma.c,
 * mm_fma_few.c and mm_fma_many.c over tables of kernels that are their names.
 */
#include "cuda/mm_fma.h"
#include "cuda/tensor_map.h"
#include "policy_device.h"

/* ---- kernels: the sizes of mm_fma.cu, mm_fma_few.cu and mm_fma_many_sm90a.cu --------------------------------------------- */

/* The last launch: its kernel, a space, the blocks of a cluster. */
static char last[32];
static int launches, maps;
static fn_cuda_launch launched;

/* By the bytes of an element of the rows. */
#define MANY(BYTES)                                                                                                    \
    {                                                                                                                  \
        {"wide", 32, 64, FN_FMA_MANY_K, 384, 1, 8 * 64 * (32 * (BYTES) + 64 * 4) + 17792},                             \
        {"narrow", 32, 32, FN_FMA_MANY_K, 256, 2, 6 * 64 * (32 * (BYTES) + 32 * 4) + 9472},                            \
    }
const fn_mm_fma_kernel fn_fma_many_kernels[FN_DTYPE_COUNT][FN_FMA_MANY_KERNELS] = {MANY(4), MANY(2), MANY(2)};
const fn_mm_fma_kernel fn_mm_fma_kernels[FN_MM_FMA_KERNELS] = {
    {"any", 4, 16, 256, 128, 2, 90000}, {"any", 16, 16, 128, 128, 3, 70000}, {"any", 32, 64, 64, 256, 1, 90000}};
const fn_fma_few_kernel fn_fma_few_kernels[FN_FMA_FEW_KERNELS] = {{"few", 1, 8, 33024, 4096, 1, 4},
                                                                  {"few", 2, 8, 33024, 8192, 1, 4},
                                                                  {"few", 4, 8, 33024, 16384, 1, 4},
                                                                  {"few", 8, 8, 33024, 32768, 2, 4},
                                                                  {"few", 8, 16, 33024, 32768, 4, 4}};

fn_status fn_cuda_run(const char *function, const fn_cuda_launch *launch) {
    (void)function;
    launched = *launch;
    launches++;
    snprintf(last, sizeof last, "%s %d", (const char *)launch->kernel, launch->cluster);
    const bool many = strcmp(launch->kernel, "wide") == 0 || strcmp(launch->kernel, "narrow") == 0;
    if (maps != (many ? 2 : 0)) CHECK_FAIL("%s: %d maps", last, maps);
    maps = 0;
    return FN_OK;
}

fn_status fn_tensor_map(CUtensorMap *map, const fn_tensor_map_source *source, int box_rows, int row_bytes) {
    (void)map, (void)source;
    if (box_rows < 8 || box_rows > 256 || row_bytes != 128)
        CHECK_FAIL("a box of %d rows of %d bytes", box_rows, row_bytes);
    maps++;
    return FN_OK;
}

bool fn_tensor_map_serves(const fn_tensor_map_source *source) { return source->row_stride % 16 == 0; }

/* ---- questions ----------------------------------------------------------------------------------------------------------- */

static const char *ask(fn_dtype a, fn_dtype b, int64_t m, int64_t n, int64_t k, int gap) {
    static char memory[64] __attribute__((aligned(64)));
    const int64_t a_bytes = fn_dtypes[a].bytes, b_bytes = fn_dtypes[b].bytes, row = (k + 7) / 8 * 8 + gap;
    const fn_mm_plan plan = {.a = {memory, {row * a_bytes, a_bytes}, a},
                             .b = {memory, {b_bytes, row * b_bytes}, b},
                             .out = {memory, {n * 4, 4}, FN_FLOAT32},
                             .m = m,
                             .n = n,
                             .k = k};
    launches = 0;
    if (fn_mm_run_fma(&plan) != FN_OK || launches < 1)
        CHECK_FAIL("%lld x %lld x %lld is not launched", (long long)m, (long long)n, (long long)k);
    if (launched.blocks == 0 || launched.blocks > INT32_MAX || launched.blocks % (unsigned)launched.cluster != 0 ||
        launched.shared_bytes > device.shared_bytes || launched.threads > 1024 || launched.cluster > largest_cluster)
        CHECK_FAIL("%lld x %lld x %lld: %s with %u blocks of %u threads and %d bytes", (long long)m, (long long)n,
                   (long long)k, last, launched.blocks, launched.threads, launched.shared_bytes);
    return last;
}

typedef struct {
    fn_dtype a;
    int64_t m, n, k;
    const char *kernel;
} expectation;

/* What was the fastest on an H200, or took at most 2.5 % more, when all kernels and clusters were measured. */
static const expectation measured[] = {
    {FN_FLOAT32, 17, 256, 7168, "narrow 8"},   {FN_FLOAT32, 64, 256, 7168, "narrow 8"},
    {FN_FLOAT32, 128, 256, 7168, "narrow 8"},  {FN_FLOAT32, 256, 256, 7168, "narrow 2"},
    {FN_FLOAT32, 512, 256, 7168, "narrow 2"},  {FN_FLOAT32, 1024, 256, 7168, "narrow 1"},
    {FN_FLOAT32, 4096, 256, 7168, "narrow 1"}, {FN_FLOAT32, 64, 384, 7168, "narrow 8"},
    {FN_FLOAT32, 128, 384, 7168, "narrow 4"},  {FN_FLOAT32, 256, 384, 7168, "narrow 8"},
    {FN_FLOAT32, 1024, 384, 7168, "narrow 2"}, {FN_FLOAT32, 64, 128, 4096, "narrow 4"},
    {FN_FLOAT32, 256, 128, 4096, "narrow 4"},  {FN_FLOAT32, 1024, 128, 4096, "narrow 2"},
    {FN_FLOAT32, 32, 4096, 4096, "narrow 2"},  {FN_FLOAT32, 64, 4096, 4096, "narrow 1"},
    {FN_FLOAT32, 256, 4096, 4096, "narrow 1"}, {FN_FLOAT32, 1024, 4096, 4096, "narrow 1"},
    {FN_FLOAT32, 300, 1000, 2000, "narrow 2"}, {FN_BFLOAT16, 64, 256, 7168, "wide 8"},
    {FN_BFLOAT16, 256, 256, 7168, "narrow 2"}, {FN_BFLOAT16, 64, 384, 7168, "wide 8"},
    {FN_BFLOAT16, 256, 384, 7168, "narrow 8"}, {FN_BFLOAT16, 64, 128, 4096, "narrow 4"},
    {FN_BFLOAT16, 256, 128, 4096, "wide 4"},   {FN_BFLOAT16, 64, 4096, 4096, "wide 1"},
    {FN_BFLOAT16, 256, 4096, 4096, "wide 1"},
};

static int64_t ask_all(uint64_t *state, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t m = 1 + random_below(state, 1 << random_below(state, 17)),
                      n = 1 + random_below(state, 1 << random_below(state, 15));
        const int64_t k = 1 + random_below(state, 1 << random_below(state, 16));
        const fn_dtype other = (fn_dtype)random_below(state, FN_DTYPE_COUNT);
        const bool turned = random_below(state, 2);
        const int gap = (int)random_below(state, 4) * (int)random_below(state, 2);
        const char *const kernel = ask(turned ? FN_FLOAT32 : other, turned ? other : FN_FLOAT32, m, n, k, gap);
        const bool many = strncmp(kernel, "wide", 4) == 0 || strncmp(kernel, "narrow", 6) == 0;
        if (many && (!device.exactly_90 || gap * fn_dtypes[other].bytes % 16 != 0 || m <= FN_FMA_FEW_ROWS ||
                     n <= FN_FMA_FEW_ROWS))
            CHECK_FAIL("%lld x %lld x %lld, %d elements apart: %s", (long long)m, (long long)n, (long long)k, gap,
                       kernel);
        if (!many && device.exactly_90 && gap == 0 && m > FN_FMA_FEW_ROWS && n > FN_FMA_FEW_ROWS)
            CHECK_FAIL("%lld x %lld x %lld: %s", (long long)m, (long long)n, (long long)k, kernel);
    }
    return count;
}

int main(int argc, char **argv) {
    const check_options options = check_parse(argc, argv, "which kernel a product with an fp32 operand takes");
    uint64_t state = options.seed;
    int64_t questions = 0;
    device = h200;
    largest_cluster = 8;
    for (size_t i = 0; i < sizeof measured / sizeof measured[0]; i++, questions++) {
        const expectation *e = &measured[i];
        const char *const kernel = ask(e->a, FN_FLOAT32, e->m, e->n, e->k, 0);
        if (strcmp(kernel, e->kernel) != 0)
            CHECK_FAIL("%lld rows by %lld x %lld: %s, but %s was measured", (long long)e->m, (long long)e->n,
                       (long long)e->k, kernel, e->kernel);
    }
    questions += ask_all(&state, 100000);
    for (largest_cluster = 7; largest_cluster >= 2; largest_cluster--) questions += ask_all(&state, 10000);
    device = (fn_cuda_properties){170, true, false, 101376}; /* clusters, but not 9.0 */
    largest_cluster = 8;
    questions += ask_all(&state, 50000);
    device = (fn_cuda_properties){84, false, false, 101376};
    largest_cluster = 1;
    questions += ask_all(&state, 50000);
    printf("%lld questions\n", (long long)questions);
    return 0;
}
