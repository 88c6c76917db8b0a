/* mm_tensor.cuh: the kernels of mm_tensor.h, once for each dtype of the operands. */
#ifndef FUSEDNORM_MM_TENSOR_CUH
#define FUSEDNORM_MM_TENSOR_CUH

#include "mm_gate.cuh"
#include "mm_one.cuh"
#include "mm_tile.cuh"

/* By the tile's tokens, ascending, for each of (chunked, whole). */
#define FN_MM_TENSOR(D)                                                                                                \
    {                                                                                                                  \
        {{FN_MM_TILE(D, 32, 8, 2, 1, 8, false, true)},    {FN_MM_TILE(D, 32, 16, 2, 1, 8, false, true)},               \
         {FN_MM_TILE(D, 32, 32, 2, 1, 8, false, true)},   {FN_MM_TILE(D, 64, 64, 2, 2, 6, false, true)},               \
         {FN_MM_TILE(D, 128, 128, 4, 2, 3, false, true)}, {FN_MM_TILE(D, 16, 8, 1, 1, 8, true, true)},                 \
         {FN_MM_TILE(D, 16, 32, 1, 1, 6, true, true)},    {FN_MM_TILE(D, 64, 64, 2, 2, 4, true, true)},                \
         {FN_MM_TILE(D, 64, 128, 2, 4, 4, true, true)},   {FN_MM_TILE(D, 32, 8, 2, 1, 4, false, false)},               \
         {FN_MM_TILE(D, 64, 64, 2, 2, 3, false, false)},  {FN_MM_TILE(D, 16, 8, 1, 1, 4, true, false)},                \
         {FN_MM_TILE(D, 64, 64, 2, 2, 3, true, false)}},                                                               \
            {{FN_MM_GATE(D, 16, 8)}, {FN_MM_GATE(D, 16, 16)}, {FN_MM_GATE(D, 16, 32)}, {FN_MM_GATE(D, 32, 32)}}, {     \
            FN_MM_ONE(D)                                                                                               \
        }                                                                                                              \
    }

#endif
