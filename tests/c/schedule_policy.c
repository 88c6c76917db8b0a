/* schedule_policy.c: csrc/cuda/schedule.c against the kernels of csrc/cuda/kernels.h, without a GPU: what the policy asks for
 * exists, for every row length that a kernel holds, very many numbers of rows and devices of all sizes.
 */
#include "check.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

/* Its rules are static and constant: here they are seen, and numbered once everything else has been asked. */
#define const
#include "cuda/schedule.c"
#undef const

enum { RULES = sizeof rules / sizeof rules[0], MEASURED_ON = 132, MOST_GROUPS = 20000, BITS_OF_ROWS = 41 };

#define KERNEL(D, W, FUSED_, THREADS, BLOCKS, GROUPS, ROWS, EARLY)                                                     \
    {.threads = THREADS, .blocks = BLOCKS, .groups = GROUPS, .rows = ROWS, .fused = FUSED_, .early = EARLY},

/* What bfloat16 has; the first COMMON_KERNELS are what float16 and fp32 have too. */
static const fn_norm_kernel kernels[] = {FN_FOR_EACH_KERNEL(KERNEL, , ) FN_FOR_EACH_FURTHER_KERNEL(KERNEL, , )
                                             FN_FOR_EACH_EARLY_KERNEL(KERNEL, , )};

#define COUNT(...) +1
enum {
    KERNELS = sizeof kernels / sizeof kernels[0],
    COMMON_KERNELS = FN_FOR_EACH_KERNEL(COUNT, , ),
    UNCONDITIONAL_KERNELS = COMMON_KERNELS FN_FOR_EACH_FURTHER_KERNEL(COUNT, , ) /* the early ones follow */
};

static int64_t groups_held(const fn_norm_kernel *k) { return (int64_t)k->threads * k->blocks * k->groups; }

/* ---- what is asked ------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t rows, groups;
    bool fused, clusters;
    int multiprocessors;
} question;

static fn_norm_schedule ask(question q) {
    return fn_norm_choose_schedule(q.rows, q.groups, q.fused, q.multiprocessors, q.clusters);
}

#define FAIL_AT(q, what, ...)                                                                                          \
    CHECK_FAIL(what ": %lld rows of %lld elements, %s, %d multiprocessors %s clusters", __VA_ARGS__,                   \
               (long long)(q).rows, (long long)(q).groups * 8, (q).fused ? "fused" : "plain", (q).multiprocessors,     \
               (q).clusters ? "with" : "without")

typedef struct {
    int64_t value[MOST_GROUPS];
    int count;
} numbers;

static void add(numbers *n, int64_t value) {
    if (value > 0) n->value[n->count++] = value;
}

static int by_value(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Around every limit of the rules and every power of two, and at random; ascending. */
static void choose_rows(numbers *n, int multiprocessors, uint64_t *random) {
    n->count = 0;
    for (int d = -1; d <= 1; d++) {
        for (int i = 0; i < RULES; i++) add(n, (int64_t)rules[i].most_rows * multiprocessors / MEASURED_ON + d);
        for (int bit = 0; bit < BITS_OF_ROWS; bit++) add(n, (INT64_C(1) << bit) + d);
    }
    for (int i = 0; i < 40; i++) add(n, 1 + random_below(random, INT64_C(1) << (1 + i)));
    qsort(n->value, (size_t)n->count, sizeof n->value[0], by_value);
}

static void choose_groups(numbers *n, bool all, uint64_t *random) {
    n->count = 0;
    if (all) {
        for (int groups = 1; groups <= MOST_GROUPS; groups++) add(n, groups);
        return;
    }
    for (int d = -1; d <= 1; d++) {
        for (int i = 0; i < RULES; i++) add(n, rules[i].most_groups + d);
        for (int i = 0; i < KERNELS; i++) add(n, groups_held(&kernels[i]) + d);
    }
    for (int i = 0; i < 200; i++) add(n, 1 + random_below(random, MOST_GROUPS));
    add(n, INT64_C(1) << 40);
}

/* ---- what must be so ----------------------------------------------------------------------------------------------- */

static bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

/* The longest row that a kernel holds, in groups. */
static int64_t longest(bool fused, bool clusters) {
    int64_t most = 0;
    for (int i = 0; i < UNCONDITIONAL_KERNELS; i++)
        if (kernels[i].fused == fused && (clusters || kernels[i].blocks == 1) && groups_held(&kernels[i]) > most)
            most = groups_held(&kernels[i]);
    return most;
}

/* Whether one of the first `count` kernels is what the schedule asks for and holds the row. */
static bool is_there(int count, const question *q, const fn_norm_schedule *s) {
    for (int i = 0; i < count; i++)
        if (kernels[i].fused == q->fused && kernels[i].threads == s->threads && kernels[i].blocks == s->blocks &&
            kernels[i].rows == s->rows && groups_held(&kernels[i]) >= q->groups)
            return true;
    return false;
}

/* Where a table lacks what the schedule asks for: rows of up to 2048 groups never need the strided kernel. */
static bool another_serves(const question *q) {
    for (int i = 0; i < COMMON_KERNELS; i++)
        if (kernels[i].fused == q->fused && (kernels[i].blocks == 1 || q->clusters) &&
            groups_held(&kernels[i]) >= q->groups)
            return true;
    return q->groups > 2048;
}

static void check_answer(const question *q, const fn_norm_schedule *s, int64_t most_groups) {
    if (s->threads == 0) {
        if (q->groups <= most_groups)
            FAIL_AT(*q, "the strided kernel (kernels hold %lld groups)", (long long)most_groups);
        return;
    }
    if (!is_power_of_two(s->threads) || s->threads > 1024) FAIL_AT(*q, "%d threads", s->threads);
    if (!is_power_of_two(s->blocks) || s->blocks > 8) FAIL_AT(*q, "%d blocks", s->blocks);
    if (s->blocks > 1 && !q->clusters) FAIL_AT(*q, "a cluster of %d", s->blocks);
    if (!is_there(UNCONDITIONAL_KERNELS, q, s))
        FAIL_AT(*q, "a dead rule: no kernel for bfloat16 has %d threads, %d blocks and %d rows, and holds that row",
                s->threads, s->blocks, s->rows);
    if (!is_there(COMMON_KERNELS, q, s) && !another_serves(q))
        FAIL_AT(*q, "no kernel for float16 and fp32 serves in place of %d threads, %d blocks and %d rows", s->threads,
                s->blocks, s->rows);
}

/* Twice the rows on twice the multiprocessors are as many for each. */
static void check_scaling(question q, const fn_norm_schedule *s) {
    const fn_norm_schedule twice = ask((question){2 * q.rows, q.groups, q.fused, q.clusters, 2 * q.multiprocessors});
    if (s->threads != twice.threads || s->blocks != twice.blocks || s->rows != twice.rows ||
        s->weight_prefetch != twice.weight_prefetch || s->dependents_soon != twice.dependents_soon)
        FAIL_AT(q, "%s", "another schedule than twice the rows on twice the multiprocessors");
}

static int64_t check_device(int multiprocessors, bool all_lengths, uint64_t *random) {
    static numbers rows, groups;
    choose_rows(&rows, multiprocessors, random);
    choose_groups(&groups, all_lengths, random);
    question q = {.multiprocessors = multiprocessors};
    for (int kind = 0; kind < 4; kind++) {
        q.fused = kind & 1;
        q.clusters = kind & 2;
        const int64_t most_groups = longest(q.fused, q.clusters);
        for (int g = 0; g < groups.count; g++) {
            bool prefetches = true;
            q.groups = groups.value[g];
            for (int r = 0; r < rows.count; r++) {
                q.rows = rows.value[r];
                const fn_norm_schedule s = ask(q);
                check_answer(&q, &s, most_groups);
                check_scaling(q, &s);
                if (s.weight_prefetch && !prefetches) FAIL_AT(q, "%s", "a prefetch that fewer rows do not have");
                prefetches = s.weight_prefetch;
            }
        }
    }
    return (int64_t)4 * rows.count * groups.count;
}

static void check_known_places(void) {
    question q = {.multiprocessors = MEASURED_ON};
    for (int kind = 0; kind < 4; kind++) {
        q.fused = kind & 1;
        q.clusters = kind & 2;
        q.groups = 1;
        for (q.rows = 1; q.rows < INT64_C(1) << BITS_OF_ROWS; q.rows *= 2) {
            const fn_norm_schedule s = ask(q);
            if (s.threads < 1 || s.threads > FN_WARP || s.blocks != 1) FAIL_AT(q, "%s", "not packed");
        }
        q.groups = 4096 / 8;
        q.rows = 1;
        const fn_norm_schedule s = ask(q);
        if ((s.blocks > 1) != (q.clusters && q.fused)) FAIL_AT(q, "%d blocks", s.blocks);
        if (s.threads <= FN_WARP) FAIL_AT(q, "%d threads", s.threads);
        if (!s.weight_prefetch || (q.clusters && !s.dependents_soon))
            FAIL_AT(q, "%s", "a lone row that does not hurry");
    }
}

/* No kernel twice, and no early one without its twin for weights that may change. */
static void check_kernels(void) {
    for (int i = 0; i < KERNELS; i++) {
        const fn_norm_kernel *a = &kernels[i];
        int equals = 0, twins = 0;
        for (int j = 0; j < KERNELS; j++) {
            const fn_norm_kernel *b = &kernels[j];
            if (a->fused != b->fused || a->threads != b->threads || a->blocks != b->blocks || a->groups != b->groups ||
                a->rows != b->rows)
                continue;
            equals += a->early == b->early;
            twins += a->early && !b->early;
        }
        if (equals != 1 || twins != a->early)
            CHECK_FAIL("kernels.h: %s of %d threads, %d blocks, %d groups, %d rows%s is %s",
                       a->fused ? "fused" : "plain", a->threads, a->blocks, a->groups, a->rows,
                       a->early ? ", early," : "", equals != 1 ? "there twice" : "there only for constant weights");
    }
}

static void check_forced(void) {
    for (int f = 0; f < FN_FORCED_SCHEDULES; f++) {
        const fn_forced_schedule *forced = &fn_forced_schedules[f];
        printf("schedule_policy: forced %s", forced->name);
        for (int fused = 0; forced->most_threads && fused < 2; fused++) {
            int64_t most = 0;
            for (int i = 0; i < KERNELS; i++)
                if (kernels[i].fused == fused && kernels[i].blocks == forced->blocks &&
                    kernels[i].threads >= forced->least_threads && kernels[i].threads <= forced->most_threads &&
                    !kernels[i].early && groups_held(&kernels[i]) > most)
                    most = groups_held(&kernels[i]);
            if (!most) CHECK_FAIL("%s: bfloat16 has no such kernel, %s", forced->name, fused ? "fused" : "plain");
            printf("%s up to %lld elements%s", fused ? "," : "", (long long)most * 8, fused ? " fused" : "");
        }
        printf("\n");
    }
}

/* Numbers the rules in place of their threads, and asks at each one's own corner: where any input reaches a rule, the longest
 * row with the most rows does, since every rule holds for all that is shorter and fewer. */
static void check_rules_are_reached(void) {
    static bool reached[RULES][2];
    for (int i = 0; i < RULES; i++) rules[i].threads = i + 1;
    for (int i = 0; i < RULES; i++)
        for (int kind = 0; kind < 4; kind++) {
            const question q = {rules[i].most_rows, rules[i].most_groups, kind & 1, kind & 2, MEASURED_ON};
            const int rule = ask(q).threads - 1;
            if (rule >= 0) reached[rule][q.fused] = true;
        }
    for (int i = 0; i < RULES; i++)
        for (int fused = 0; fused < 2; fused++)
            if (rules[i].operations & (fused ? FUSED : PLAIN) && !reached[i][fused])
                CHECK_FAIL("a dead rule, which no %s operation reaches: up to %d elements and %d rows, number %d of %d",
                           fused ? "fused" : "plain", rules[i].most_groups * 8, rules[i].most_rows, i + 1, RULES);
}

int main(int argc, char **argv) {
    const check_options options = check_parse(
        argc, argv, "schedule_policy: what the CUDA schedules ask for, against the kernels that there are.");
    static const int multiprocessors[] = {1,  8,   14,  16,  20,  24,  30,  36,  46,  58,  68,  78,  82, 84,
                                          92, 108, 114, 128, 140, 142, 144, 148, 152, 160, 170, 188, 192};
    const double start = check_seconds();
    uint64_t random = options.seed;
    check_kernels();
    check_known_places();
    int64_t asked = check_device(MEASURED_ON, true, &random);
    for (size_t i = 0; i < sizeof multiprocessors / sizeof multiprocessors[0]; i++)
        asked += check_device(multiprocessors[i], false, &random);
    check_forced();
    check_rules_are_reached();
    printf("schedule_policy: rows up to %lld elements with clusters, %lld without\n",
           (long long)longest(true, true) * 8, (long long)longest(true, false) * 8);
    printf("schedule_policy: %lld questions, %d rules reached, %d kernels, %.1f s\n", (long long)asked, (int)RULES,
           (int)KERNELS, check_seconds() - start);
    return 0;
}
