/* kernels.h: which kernels there are: X(D, W, fused, threads a row, blocks a row, groups a thread, rows a thread, early).
 *
 * schedule.c chooses among them by measured speed. A row that no kernel here can hold, or that is not aligned, takes the one
 * of rms_norm_strided.cu. Where a table lacks what a schedule asks for, its first kernel that can hold the row serves.
 *
 * Each kernel adds about 12 KiB to the module, in code for six architectures and PTX: what few calls need is left out.
 */
#ifndef FUSEDNORM_KERNELS_H
#define FUSEDNORM_KERNELS_H

/* For operands of one dtype D and a weight of dtype W. */
#define FN_FOR_EACH_KERNEL(X, D, W)                                                                                    \
    X(D, W, false, 8, 1, 1, 2, false)                                                                                  \
    X(D, W, false, 16, 1, 1, 2, false)                                                                                 \
    X(D, W, false, 32, 1, 1, 2, false)                                                                                 \
    X(D, W, false, 32, 1, 2, 1, false)                                                                                 \
    X(D, W, false, 128, 1, 1, 1, false)                                                                                \
    X(D, W, false, 128, 1, 1, 2, false)                                                                                \
    X(D, W, false, 128, 1, 2, 1, false)                                                                                \
    X(D, W, false, 128, 1, 3, 1, false)                                                                                \
    X(D, W, false, 128, 1, 4, 1, false)                                                                                \
    X(D, W, false, 128, 1, 5, 1, false)                                                                                \
    X(D, W, false, 256, 1, 2, 1, false)                                                                                \
    X(D, W, false, 256, 1, 3, 1, false)                                                                                \
    X(D, W, false, 256, 1, 4, 1, false)                                                                                \
    X(D, W, false, 256, 1, 6, 1, false)                                                                                \
    X(D, W, false, 256, 1, 8, 1, false)                                                                                \
    X(D, W, false, 128, 4, 1, 1, false)                                                                                \
    X(D, W, false, 256, 2, 2, 1, false)                                                                                \
    X(D, W, false, 256, 4, 1, 1, false)                                                                                \
    X(D, W, false, 256, 4, 2, 1, false)                                                                                \
    X(D, W, false, 256, 8, 2, 1, false)                                                                                \
    X(D, W, false, 256, 8, 8, 1, false)                                                                                \
    X(D, W, true, 8, 1, 1, 1, false)                                                                                   \
    X(D, W, true, 16, 1, 1, 1, false)                                                                                  \
    X(D, W, true, 32, 1, 1, 1, false)                                                                                  \
    X(D, W, true, 32, 1, 2, 1, false)                                                                                  \
    X(D, W, true, 128, 1, 1, 1, false)                                                                                 \
    X(D, W, true, 128, 1, 2, 1, false)                                                                                 \
    X(D, W, true, 128, 1, 3, 1, false)                                                                                 \
    X(D, W, true, 128, 1, 4, 1, false)                                                                                 \
    X(D, W, true, 256, 1, 1, 1, false)                                                                                 \
    X(D, W, true, 256, 1, 2, 1, false)                                                                                 \
    X(D, W, true, 256, 1, 3, 1, false)                                                                                 \
    X(D, W, true, 256, 1, 4, 1, false)                                                                                 \
    X(D, W, true, 256, 1, 6, 1, false)                                                                                 \
    X(D, W, true, 256, 1, 8, 1, false)                                                                                 \
    X(D, W, true, 128, 4, 1, 1, false)                                                                                 \
    X(D, W, true, 256, 2, 1, 1, false)                                                                                 \
    X(D, W, true, 256, 2, 2, 1, false)                                                                                 \
    X(D, W, true, 256, 4, 1, 1, false)                                                                                 \
    X(D, W, true, 256, 4, 2, 1, false)                                                                                 \
    X(D, W, true, 256, 8, 2, 1, false)                                                                                 \
    X(D, W, true, 256, 8, 8, 1, false)

/* Worth a few per cent at some lengths, or too large for the registers of other dtypes: for bfloat16. */
#define FN_FOR_EACH_FURTHER_KERNEL(X, D, W)                                                                            \
    X(D, W, false, 64, 1, 2, 2, false)                                                                                 \
    X(D, W, false, 256, 1, 1, 1, false)                                                                                \
    X(D, W, false, 64, 1, 3, 1, false)                                                                                 \
    X(D, W, false, 512, 1, 7, 1, false)                                                                                \
    X(D, W, false, 256, 2, 3, 1, false)                                                                                \
    X(D, W, true, 128, 8, 2, 1, false)                                                                                 \
    X(D, W, true, 64, 1, 8, 1, false)                                                                                  \
    X(D, W, true, 128, 1, 7, 1, false)                                                                                 \
    X(D, W, true, 128, 1, 8, 1, false)                                                                                 \
    X(D, W, true, 512, 1, 2, 1, false)                                                                                 \
    X(D, W, true, 512, 1, 3, 1, false)                                                                                 \
    X(D, W, true, 512, 1, 7, 1, false)

/* Reading a constant weight early, where the wait for it was found to cost time, at tens to hundreds of rows: for bfloat16. */
#define FN_FOR_EACH_EARLY_KERNEL(X, D, W)                                                                              \
    X(D, W, false, 256, 1, 2, 1, true)                                                                                 \
    X(D, W, false, 256, 1, 4, 1, true)                                                                                 \
    X(D, W, false, 256, 2, 2, 1, true)                                                                                 \
    X(D, W, true, 256, 1, 2, 1, true)                                                                                  \
    X(D, W, true, 256, 1, 4, 1, true)

/* For any dtypes, each operand its own. */
#define FN_FOR_EACH_ANY_KERNEL(X, D, W)                                                                                \
    X(D, W, false, 8, 1, 1, 1, false)                                                                                  \
    X(D, W, false, 32, 1, 1, 1, false)                                                                                 \
    X(D, W, false, 128, 1, 2, 1, false)                                                                                \
    X(D, W, false, 128, 1, 4, 1, false)                                                                                \
    X(D, W, false, 256, 1, 4, 1, false)                                                                                \
    X(D, W, false, 256, 1, 8, 1, false)                                                                                \
    X(D, W, true, 8, 1, 1, 1, false)                                                                                   \
    X(D, W, true, 32, 1, 1, 1, false)                                                                                  \
    X(D, W, true, 128, 1, 2, 1, false)                                                                                 \
    X(D, W, true, 128, 1, 4, 1, false)                                                                                 \
    X(D, W, true, 256, 1, 4, 1, false)                                                                                 \
    X(D, W, true, 256, 1, 8, 1, false)

#endif
