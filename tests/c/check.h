/* check.h: what the C test programs share: options, the clock, random numbers, and the report of a counterexample.
 *
 * A program prints what it checked, how many and how long it took, and exits with 0; or prints the first counterexample
 * and exits with 1. Options are the same everywhere; a program ignores those that mean nothing to it.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(_OPENMP)
#include <omp.h>
#define OPENMP(...) _Pragma(#__VA_ARGS__)
#else
#define OPENMP(...)
#endif

#define UNUSED_IN_SOME_PROGRAMS __attribute__((unused))

typedef struct {
    bool sample;
    int threads; /* 0: as many as OpenMP gives */
    uint64_t seed;
} check_options;

static inline double check_seconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The finaliser of splitmix64: a bijection of 64 bits, so a counter gives random numbers without a state. */
static inline uint64_t hash64(uint64_t x) {
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static inline uint64_t random64(uint64_t *state) { return hash64((*state)++); }

/* Uniform in 0 .. limit - 1; limit is small against 2^64, so the bias of the remainder does not matter here. */
static inline int64_t random_below(uint64_t *state, int64_t limit) {
    return (int64_t)(random64(state) % (uint64_t)limit);
}

UNUSED_IN_SOME_PROGRAMS static check_options check_parse(int argc, char **argv, const char *what) {
    check_options options = {.seed = 1};
    for (int i = 1; i < argc; i++) {
        const bool has_value = i + 1 < argc;
        if (strcmp(argv[i], "--sample") == 0) {
            options.sample = true;
        } else if (strcmp(argv[i], "--threads") == 0 && has_value) {
            options.threads = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--seed") == 0 && has_value) {
            options.seed = strtoull(argv[++i], NULL, 0);
        } else {
            const bool asked = strcmp(argv[i], "--help") == 0;
            FILE *const stream = asked ? stdout : stderr;
            if (!asked) fprintf(stream, "unknown option, or one without its value: %s\n", argv[i]);
            fprintf(stream,
                    "%s\n\nusage: %s [--sample] [--threads N] [--seed N]\n"
                    "  --sample     a part of the cases, for slow machines such as an emulator\n"
                    "  --threads N  OpenMP threads (default: all that there are)\n"
                    "  --seed N     seed of the random cases (default: 1)\n",
                    what, argv[0]);
            exit(asked ? 0 : 2);
        }
    }
#if defined(_OPENMP)
    if (options.threads > 0) omp_set_num_threads(options.threads);
    options.threads = omp_get_max_threads();
#else
    options.threads = 1;
#endif
    return options;
}

/* Ends the program at a counterexample that only one thread can find. */
#define CHECK_FAIL(...)                                                                                                \
    do {                                                                                                               \
        fflush(stdout);                                                                                                \
        fprintf(stderr, "FAILED: " __VA_ARGS__);                                                                       \
        fputc('\n', stderr);                                                                                           \
        exit(1);                                                                                                       \
    } while (0)

/* The lowest counterexample of a parallel loop over 64-bit places. */
typedef struct {
    int64_t place; /* INT64_MAX: none yet */
    char text[256];
} check_first;

#define CHECK_FIRST_NONE {.place = INT64_MAX}

/* Keeps the counterexample if its place is lower than the one kept so far. */
#define CHECK_KEEP(first, at, ...)                                                                                     \
    do {                                                                                                               \
        OPENMP(omp critical(check_keep)) if ((at) < (first)->place) {                                                  \
            (first)->place = (at);                                                                                     \
            snprintf((first)->text, sizeof(first)->text, __VA_ARGS__);                                                 \
        }                                                                                                              \
    } while (0)

#endif
