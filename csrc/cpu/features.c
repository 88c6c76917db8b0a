#include "features.h"

#include "cpu.h"

#include <stdio.h>
#include <unistd.h>

#if defined(FN_X86)
#include <cpuid.h>

/* The operating system saves a register file across task switches only if its bits in XCR0 are set. */
static uint64_t xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

bool fn_cpu_supports(fn_path path) {
    unsigned a, b, c, d, b7 = 0, ignored;
    if (path == FN_PATH_SCALAR) return true;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    if (!(c & bit_OSXSAVE) || !(c & bit_AVX)) return false;
    if (!__get_cpuid_count(7, 0, &ignored, &b7, &ignored, &ignored)) return false;
    const uint64_t ymm = 0x06, zmm = 0xe6, enabled = xcr0();
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    /* FMA is a feature of its own, though every processor with AVX2 that was sold widely has it; AVX512F includes it. */
    if (path == FN_PATH_AVX2) return (enabled & ymm) == ymm && (b7 & bit_AVX2) && (c & bit_F16C) && (c & bit_FMA);
    const bool has_avx512 = (enabled & zmm) == zmm && (b7 & avx512) == avx512;
    if (path == FN_PATH_AVX512) return has_avx512;
#if defined(FN_AVX512_BF16)
    if (path == FN_PATH_AVX512_BF16)
        return has_avx512 && __get_cpuid_count(7, 1, &a, &ignored, &ignored, &ignored) && (a & bit_AVX512BF16);
#endif
    return false;
}
#else
bool fn_cpu_supports(fn_path path) {
#if defined(FN_ARM64)
    if (path == FN_PATH_NEON) return true;
#endif
    return path == FN_PATH_SCALAR;
}
#endif

/* sysconf() may add up the caches of all processors; Linux says what one processor's last level is. */
static int64_t cache_bytes_of_kernel(void) {
    long kibibytes = 0;
#if defined(__linux__)
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
    if (!file) return 0;
    if (fscanf(file, "%ldK", &kibibytes) != 1 || kibibytes < 0) kibibytes = 0;
    fclose(file);
#endif
    return (int64_t)kibibytes * 1024;
}

int64_t fn_last_level_cache_bytes(void) {
    const int64_t kernel = cache_bytes_of_kernel();
    if (kernel > 0) return kernel;
    long bytes = -1;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return bytes > 0 ? bytes : (int64_t)32 << 20;
}
