/* mm_policy.c: which kernel a product of 16-bit operands takes, without a GPU: csrc/cuda/mm_tensor.c, mm_hopper.c,
 * mm_chain.c and mm_split.c over tables of kernels that are their names.
 */
#include "cuda/mm_hopper.h"
#include "cuda/tensor_map.h"
#include "policy_device.h"

static fn_cuda_launch last;
static int launches;
static int64_t asked_columns;
static fn_dtype asked_out = FN_FLOAT32;
static int boxes[3], maps; /* rows of the tokens' box, the weights' and out's, of the launch to come */

/* A barrier waits for the bytes that are announced: with others than those that come, for ever. */
static void check_bytes(const fn_cuda_launch *launch) {
    const char *const kernel = launch->kernel;
    uint32_t announced, come;
    if (strncmp(kernel, "decode", 6) == 0) {
        const fn_mm_decode_args *const args = launch->args;
        announced = args->stage_bytes;
        come = FN_DECODE_BLOCKS * FN_ATOM_BYTES * (uint32_t)(boxes[0] + launch->cluster * boxes[1]);
        if (args->stages < 2 || (launch->cluster > 1 && boxes[1] % 8)) CHECK_FAIL("%s: stages or boxes", kernel);
    } else if (strncmp(kernel, "split", 5) == 0) {
        const fn_mm_split_args *const args = launch->args;
        announced = args->stage_bytes;
        come = FN_ATOM_BYTES * (uint32_t)(boxes[0] + boxes[1]);
    } else return;
    if (announced != come) CHECK_FAIL("%s: %u bytes are announced, %u come", kernel, announced, come);
}

fn_status fn_cuda_run(const char *function, const fn_cuda_launch *launch) {
    (void)function;
    check_bytes(launch);
    /* Where a row of out ends within 16 bytes the copy engine would write them all. */
    if (maps == 3 && asked_columns * fn_dtypes[asked_out].bytes % 16 != 0)
        CHECK_FAIL("%s: %lld columns are the copy engine's", (const char *)launch->kernel, (long long)asked_columns);
    last = *launch;
    launches++;
    maps = 0;
    return FN_OK;
}

fn_status fn_tensor_map(CUtensorMap *map, const fn_tensor_map_source *source, int box_rows, int row_bytes) {
    if (box_rows < 1 || box_rows > 256 || (row_bytes != 128 && row_bytes != 64 && row_bytes != 32 && row_bytes != 16))
        CHECK_FAIL("a box of %d rows of %d bytes", box_rows, row_bytes);
    (void)map, (void)source;
    boxes[maps++] = box_rows;
    return FN_OK;
}

bool fn_tensor_map_serves(const fn_tensor_map_source *source) { return source->row_stride % 16 == 0; }

/* ---- kernels: the sizes of mm_bf16.cu and mm_hopper_bf16_sm90a.cu -------------------------------------------------------- */

/* The fields of a kernel, as the macros of the same names give them there. */
#define SUMS(W, T) ((T) * ((W) + 4) * 4)
#define TILE(W, T, THREADS, STAGES, CHUNKED, WHOLE)                                                                    \
    "tile " #W "x" #T, W, T, THREADS, (STAGES) * ((W) + (T)) * 128 + ((CHUNKED) ? 2 * SUMS(W, T) : 0), SUMS(W, T),     \
        CHUNKED, WHOLE
#define GATE(W, T) "gate " #W "x" #T, W, T, 32, 4 * ((W) + (T)) * 128, SUMS(W, T), true, true
#define FEW(W, T) "few " #W "x" #T, W, T, 32, ((W) + (T)) * 4096, 8 * (W) * (T) * 32, true, true
/* Weights x tokens; STAGES of a ring, and behind it room for sums. */
#define SPLIT(W, T, STAGES, BLOCKS, RESIDENT, SUMS_KIB)                                                                \
    "" #W "x" #T "_by" #BLOCKS, "split " #W "x" #T " by " #BLOCKS, T, W,                                               \
        ((W) % 64 || (BLOCKS) == 1 ? (T) : (W)) / 64 * 128 + ((BLOCKS) < 8 && (RESIDENT) == 1 ? 128 : 32), BLOCKS,     \
        RESIDENT, ((STAGES) * ((T) + (W)) / 8 + (SUMS_KIB)) * 1024 + 1200, (BLOCKS) < 8 ? 16 : 0, 32

/* Tokens x weights of a tile, two in a cluster. */
#define PREFILL(T, W) 2 * (T), W, T, (W) / 2, 230000, 2

const fn_mm_tensor_kernels fn_mm_bf16 = {
    {{TILE(32, 8, 64, 8, false, true)},
     {TILE(32, 16, 64, 8, false, true)},
     {TILE(32, 32, 64, 8, false, true)},
     {TILE(64, 64, 128, 6, false, true)},
     {TILE(128, 128, 256, 3, false, true)},
     {TILE(16, 8, 32, 8, true, true)},
     {TILE(16, 32, 32, 6, true, true)},
     {TILE(64, 64, 128, 4, true, true)},
     {TILE(64, 128, 256, 4, true, true)},
     {TILE(32, 8, 64, 4, false, false)},
     {TILE(64, 64, 128, 3, false, false)},
     {TILE(16, 8, 32, 4, true, false)},
     {TILE(64, 64, 128, 3, true, false)}},
    {{GATE(16, 8)}, {GATE(16, 16)}, {GATE(16, 32)}, {GATE(32, 32)}},
    {{FEW(2, 1)}, {FEW(4, 1)}, {FEW(2, 2)}, {FEW(4, 2)}, {FEW(2, 4)}},
};

const fn_mm_hopper_kernels fn_mm_hopper_bf16 = {
    {{"decode", 8, 1},
     {"decode", 16, 1},
     {"decode", 32, 1},
     {"decode", 64, 1},
     {"decode 48", 48, 2},
     {"decode 96", 96, 2}},
    {{"prefill", PREFILL(128, 128)},
     {"prefill 160", PREFILL(128, 160)},
     {"prefill 64x64", PREFILL(64, 64)},
     {"prefill 64x96", PREFILL(64, 96)},
     {"prefill 64x128", PREFILL(64, 128)},
     {"prefill 64x160", PREFILL(64, 160)},
     {"prefill 64x192", PREFILL(64, 192)},
     {"prefill 64x224", PREFILL(64, 224)}},
    {{SPLIT(64, 16, 8, 8, 2, 16)},
     {SPLIT(64, 32, 7, 8, 2, 16)},
     {SPLIT(48, 64, 6, 8, 2, 16)},
     {SPLIT(64, 64, 5, 8, 2, 16)},
     {SPLIT(128, 64, 3, 8, 2, 32)},
     {SPLIT(128, 128, 5, 8, 1, 64)},
     {SPLIT(128, 72, 6, 4, 1, 72)},
     {SPLIT(80, 128, 5, 4, 1, 72)},
     {SPLIT(128, 64, 7, 2, 1, 32)},
     {SPLIT(96, 64, 8, 2, 1, 24)},
     {SPLIT(96, 64, 9, 1, 1, 24)},
     {SPLIT(64, 128, 9, 1, 1, 0)},
     {SPLIT(80, 128, 7, 1, 1, 40)},
     {SPLIT(96, 128, 8, 1, 1, 0)},
     {SPLIT(128, 128, 7, 1, 1, 0)}},
};

/* Only bfloat16 is asked for. */
const fn_mm_tensor_kernels fn_mm_f16;
const fn_mm_hopper_kernels fn_mm_hopper_f16;

/* ---- questions --------------------------------------------------------------------------------------------------------- */

/* The last launch's kernel; `gap`: elements between rows, for layouts that the copy engine cannot read. */
static const char *ask_of(int32_t number, int64_t m, int64_t n, int64_t k, int gap) {
    static char memory[64] __attribute__((aligned(64)));
    const int out_bytes = fn_dtypes[asked_out].bytes;
    const int64_t row = (k + 7) / 8 * 16 + 2 * gap, out_row = (n * out_bytes + 15) / 16 * 16;
    const fn_mm_plan plan = {.a = {memory, {row, 2}, FN_BFLOAT16},
                             .b = {memory, {2, row}, FN_BFLOAT16},
                             .out = {memory, {out_row, out_bytes}, asked_out},
                             .m = m,
                             .n = n,
                             .k = k,
                             .device_id = number};
    launches = 0;
    asked_columns = n;
    if (fn_mm_run_tensor(&plan) != FN_OK || launches < 1)
        CHECK_FAIL("%lld x %lld x %lld is not launched", (long long)m, (long long)n, (long long)k);
    if (last.blocks == 0 || last.blocks > INT32_MAX || last.outer_blocks == 0 || last.outer_blocks > 65535 ||
        last.blocks % (unsigned)last.cluster != 0 || last.shared_bytes > device.shared_bytes || last.threads > 1024)
        CHECK_FAIL("%lld x %lld x %lld: %s with %u x %u blocks of %u threads and %d bytes, clusters of %d",
                   (long long)m, (long long)n, (long long)k, (const char *)last.kernel, last.blocks, last.outer_blocks,
                   last.threads, last.shared_bytes, last.cluster);
    return (const char *)last.kernel;
}

/* Answers are kept by device. */
static const char *ask(int64_t m, int64_t n, int64_t k, int gap) { return ask_of(largest_cluster, m, n, k, gap); }

typedef struct {
    int64_t m, n, k;
    const char *kernel;
} expectation;

/* What was the fastest, or within 10 % of it, when all were measured; one to have every kernel of `split` asked for. */
static const expectation measured[] = {
    {1, 256, 7168, "few 2x1"},
    {1, 128, 4096, "few 2x1"},
    {1, 384, 7168, "few 4x1"},
    {2, 256, 7168, "few 2x2"},
    {2, 384, 7168, "few 4x2"},
    {4, 256, 7168, "few 2x4"},
    {4, 128, 4096, "few 2x4"},
    {4, 384, 7168, "gate 16x8"},
    {8, 256, 7168, "gate 16x8"},
    {16, 256, 7168, "gate 16x16"},
    {32, 256, 7168, "gate 16x32"},
    {64, 128, 4096, "split 64x16 by 8"},
    {64, 256, 7168, "split 64x32 by 8"},
    {64, 384, 7168, "split 48x64 by 8"},
    {128, 256, 7168, "split 64x64 by 8"},
    {256, 256, 7168, "split 128x64 by 8"},
    {256, 384, 7168, "split 128x64 by 8"},
    {512, 256, 7168, "split 128x128 by 8"},
    {1024, 256, 7168, "split 128x72 by 4"},
    {1024, 160, 5120, "split 128x72 by 4"},
    {1536, 160, 5120, "split 80x128 by 4"},
    {2048, 256, 7168, "split 128x64 by 2"},
    {4096, 128, 4096, "split 128x64 by 2"},
    {2048, 384, 7168, "split 96x64 by 1"},
    {1536, 384, 7168, "split 96x64 by 1"},
    {4096, 160, 5120, "split 96x64 by 1"},
    {2048, 160, 5120, "split 96x64 by 2"},
    {2048, 192, 7168, "split 96x64 by 2"},
    {1024, 384, 7168, "split 96x64 by 2"},
    {768, 384, 7168, "split 80x128 by 4"},
    {4096, 256, 7168, "split 64x128 by 1"},
    {8192, 128, 4096, "split 64x128 by 1"},
    {8192, 160, 5120, "split 80x128 by 1"},
    {384, 160, 5120, "split 128x64 by 8"},
    {3072, 384, 7168, "split 80x128 by 1"},
    {4096, 384, 7168, "split 96x128 by 1"},
    {8192, 384, 7168, "split 96x128 by 1"},
    {8192, 256, 7168, "split 128x128 by 1"},
    {1, 4096, 4096, "decode"},
    {64, 28672, 8192, "decode"},
    {1024, 4096, 4096, "prefill"},
    {1024, 28672, 8192, "prefill"},
    {8192, 8192, 8192, "prefill"}, /* its rounds were taken for a reason to decode */
    {8192, 4096, 4096, "prefill"},
};

/* Of few tokens, by the estimate: FEW_TOKENS of tests/cuda_cases.py; then shapes that were measured, where these were the fastest, or
 * took at most 2 % more. */
static const expectation estimated[] = {
    {70, 1001, 2104, "decode 48"},        {190, 2050, 2104, "decode 48"},      {161, 4001, 1104, "decode 96"},
    {127, 4095, 1104, "prefill 64x64"},   {99, 6001, 840, "prefill 64x96"},    {101, 8003, 840, "prefill 64x128"},
    {99, 10003, 600, "prefill 64x160"},   {350, 4099, 600, "prefill 64x192"},  {99, 14503, 600, "prefill 64x224"},
    {231, 10003, 600, "prefill 160"},     {201, 8003, 400, "prefill"},         {96, 4096, 4096, "decode 48"},
    {128, 4096, 4096, "prefill 64x64"},   {192, 4096, 4096, "decode 96"},      {256, 4096, 4096, "prefill 64x128"},
    {384, 4096, 4096, "prefill 64x192"},  {512, 4096, 4096, "prefill"},        {96, 10240, 8192, "prefill 64x160"},
    {128, 10240, 8192, "prefill 64x160"}, {192, 10240, 8192, "prefill 160"},   {256, 10240, 8192, "prefill 160"},
    {384, 10240, 8192, "prefill 64x160"}, {512, 10240, 8192, "prefill 160"},   {96, 6144, 4096, "prefill 64x96"},
    {128, 6144, 4096, "prefill 64x96"},   {192, 6144, 4096, "prefill 64x192"}, {256, 6144, 4096, "prefill 64x192"},
    {384, 6144, 4096, "prefill 64x160"},  {512, 6144, 4096, "prefill 64x192"}, {96, 8192, 8192, "prefill 64x128"},
    {128, 8192, 8192, "prefill 64x128"},  {192, 8192, 8192, "decode 96"},      {256, 8192, 8192, "prefill"},
    {384, 8192, 8192, "prefill 64x192"},  {512, 8192, 8192, "prefill"},        {96, 28672, 8192, "prefill 64x224"},
    {128, 28672, 8192, "prefill 64x224"}, {192, 28672, 8192, "decode 96"},     {256, 28672, 8192, "prefill 64x224"},
    {384, 28672, 8192, "prefill 64x224"}, {512, 28672, 8192, "prefill"},
};

static int64_t ask_all(uint64_t *state, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t m = 1 + random_below(state, 1 << random_below(state, 21)),
                      n = 1 + random_below(state, 1 << random_below(state, 16));
        const int64_t k = 1 + random_below(state, 1 << random_below(state, 15));
        const int gap = (int)random_below(state, 8);
        asked_out = random_below(state, 2) ? FN_FLOAT32 : FN_BFLOAT16;
        const char *const kernel = ask(m, n, k, gap);
        if (kernel != ask_of(FN_CUDA_MOST_DEVICES, m, n, k, gap)) /* whose answers are not kept */
            CHECK_FAIL("%lld x %lld x %lld: %s is kept, but is not the answer", (long long)m, (long long)n,
                       (long long)k, kernel);
        const bool hopper = strncmp(kernel, "tile", 4) != 0 && strncmp(kernel, "gate", 4) != 0;
        if ((hopper && !device.exactly_90) || last.cluster > largest_cluster)
            CHECK_FAIL("%s, clusters of %d, on a device that has none", kernel, last.cluster);
        const bool few = strncmp(kernel, "decode", 6) == 0 || strncmp(kernel, "prefill 64x", 11) == 0;
        if ((few && m > 512) || (strcmp(kernel, "decode") == 0 && m > 64))
            CHECK_FAIL("%s of %lld rows", kernel, (long long)m);
    }
    asked_out = FN_FLOAT32;
    return count;
}

int main(int argc, char **argv) {
    const check_options options = check_parse(argc, argv, "which kernel a product of 16-bit operands takes");
    uint64_t state = options.seed;
    int64_t questions = 0;
    device = h200;
    largest_cluster = 8;
    for (size_t i = 0; i < sizeof measured / sizeof measured[0]; i++, questions++) {
        const expectation *e = &measured[i];
        const char *const kernel = ask(e->m, e->n, e->k, 0);
        if (strcmp(kernel, e->kernel) != 0)
            CHECK_FAIL("%lld rows by %lld x %lld: %s, but %s was measured", (long long)e->m, (long long)e->n,
                       (long long)e->k, kernel, e->kernel);
    }
    for (size_t i = 0; i < sizeof estimated / sizeof estimated[0]; i++, questions++) {
        const expectation *e = &estimated[i];
        const char *const kernel = ask(e->m, e->n, e->k, 0);
        if (strcmp(kernel, e->kernel) != 0)
            CHECK_FAIL("%lld rows by %lld x %lld: %s, not %s", (long long)e->m, (long long)e->n, (long long)e->k,
                       kernel, e->kernel);
    }
    for (int i = 0; i < FN_MM_SPLIT_KERNELS; i++, questions += 2) {
        const fn_mm_split_kernel *kernel = &fn_mm_hopper_bf16.split[i];
        if (fn_cuda_force_product(kernel->name) != FN_OK || ask(1, 33, 2880, 0) != kernel->function ||
            ask(8192, 512, 7168, 0) != kernel->function || strcmp(ask(1, 513, 2880, 0), "decode") != 0)
            CHECK_FAIL("%s is forced, but is not taken", kernel->name);
    }
    if (fn_cuda_force_product("64x17_by8") == FN_OK) CHECK_FAIL("a kernel that there is not is forced");
    if (fn_cuda_force_product(NULL) != FN_OK || strcmp(ask(1, 256, 7168, 0), "few 2x1") != 0)
        CHECK_FAIL("a kernel stays forced");
    questions += ask_all(&state, 200000);
    for (largest_cluster = 7; largest_cluster >= 2; largest_cluster--) questions += ask_all(&state, 20000);
    device = (fn_cuda_properties){170, true, false, 101376}; /* clusters, but not 9.0 */
    largest_cluster = 8;
    questions += ask_all(&state, 100000);
    device = (fn_cuda_properties){84, false, false, 101376};
    largest_cluster = 1;
    questions += ask_all(&state, 100000);
    printf("%lld questions\n", (long long)questions);
    return 0;
}
