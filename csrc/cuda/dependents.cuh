/* dependents.cuh: programmatic dependent launch, compute capability 9.0 and newer: a kernel may start while the one before it
 * in the stream is still at work. Until wait_for_previous() returns nothing that another kernel may write is read. */
#ifndef FUSEDNORM_DEPENDENTS_CUH
#define FUSEDNORM_DEPENDENTS_CUH

#include "vector.cuh"

FN_DEVICE void wait_for_previous(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

FN_DEVICE void let_dependents_start(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

FN_DEVICE void prefetch_to_l2(const char *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

#endif
