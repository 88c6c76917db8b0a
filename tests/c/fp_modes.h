/* fp_modes.h: the floating-point modes of the calling thread, which no call may obey or change. */
#ifndef FP_MODES_H
#define FP_MODES_H

#include <fenv.h>
#include <stdbool.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* The control word: rounding mode, flush-to-zero, and which exceptions trap. */
static uint64_t control_word(void) {
#if defined(__x86_64__)
    return _mm_getcsr() & ~0x3fu; /* without the flags of exceptions that have happened */
#elif defined(__aarch64__)
    uint64_t word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    return word;
#else
    return (uint64_t)fegetround();
#endif
}

static void set_environment(int rounding_mode, bool flush_to_zero) {
    fesetround(rounding_mode);
#if defined(__x86_64__)
    _mm_setcsr(flush_to_zero ? _mm_getcsr() | 0x8040u : _mm_getcsr() & ~0x8040u);
#elif defined(__aarch64__)
    const uint64_t bit = UINT64_C(1) << 24;
    const uint64_t word = flush_to_zero ? control_word() | bit : control_word() & ~bit;
    __asm__ volatile("msr fpcr, %0" : : "r"(word) : "memory");
#else
    (void)flush_to_zero;
#endif
}

#endif
