/* fp_environment.h: the caller's rounding mode and flush-to-zero, set aside while we compute and put back afterwards.
 *
 *     const fn_fp_environment saved = fn_fp_enter();
 *     ...
 *     fn_fp_leave(saved);
 *
 * The environment belongs to a thread: every thread that computes enters it. Sticky exception flags are not restored.
 */
#ifndef FUSEDNORM_FP_ENVIRONMENT_H
#define FUSEDNORM_FP_ENVIRONMENT_H

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#define FN_X86 1
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 10)
#define FN_AVX512_BF16 1 /* the compiler knows its instructions */
#endif
#elif defined(__aarch64__)
#define FN_ARM64 1
#else
#include <fenv.h>
#endif

typedef uint64_t fn_fp_environment;

#if defined(FN_X86)
enum { FN_MXCSR_DEFAULT = 0x1f80, FN_MXCSR_FLAGS = 0x003f };

static inline fn_fp_environment fn_fp_enter(void) {
    const unsigned saved = _mm_getcsr();
    if ((saved & ~(unsigned)FN_MXCSR_FLAGS) != FN_MXCSR_DEFAULT) _mm_setcsr(FN_MXCSR_DEFAULT);
    return saved;
}

static inline void fn_fp_leave(fn_fp_environment saved) {
    if ((saved & ~(uint64_t)FN_MXCSR_FLAGS) != FN_MXCSR_DEFAULT) _mm_setcsr((unsigned)saved);
}

#elif defined(FN_ARM64)
static inline fn_fp_environment fn_fp_enter(void) {
    uint64_t saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    if (saved != 0) __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0) : "memory");
    return saved;
}

static inline void fn_fp_leave(fn_fp_environment saved) {
    if (saved != 0) __asm__ volatile("msr fpcr, %0" : : "r"(saved) : "memory");
}

#else
static inline fn_fp_environment fn_fp_enter(void) {
    const int saved = fegetround();
    fesetround(FE_TONEAREST);
    return (fn_fp_environment)saved;
}

static inline void fn_fp_leave(fn_fp_environment saved) { fesetround((int)saved); }
#endif

#endif
