/* tensor_map.c: maps for the copy engine. The driver encodes them, in host memory; they travel as kernel arguments. */
#include "tensor_map.h"

#include <stdatomic.h>

enum { ENGINE_UNIT = 16 };
static const int64_t most_rows = INT32_MAX / 2, stride_end = (int64_t)1 << 40;

/* One row has no stride: the engine asks for one nevertheless. */
static int64_t stride_of(const fn_tensor_map_source *source) {
    const int64_t bytes = source->columns * fn_dtypes[source->dtype].bytes;
    return source->rows > 1 ? source->row_stride : (bytes + ENGINE_UNIT - 1) / ENGINE_UNIT * ENGINE_UNIT;
}

bool fn_tensor_map_serves(const fn_tensor_map_source *source) {
    if (source->rows < 1 || source->rows > most_rows || source->columns < 1 || source->columns > most_rows)
        return false;
    const int64_t stride = stride_of(source);
    return (uintptr_t)source->data % ENGINE_UNIT == 0 && stride % ENGINE_UNIT == 0 && stride < stride_end &&
           stride >= source->columns * fn_dtypes[source->dtype].bytes;
}

typedef CUresult (*encoder)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                            const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static const CUtensorMapDataType types[] = {
    [FN_FLOAT32] = CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    [FN_FLOAT16] = CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    [FN_BFLOAT16] = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
};
_Static_assert(sizeof types / sizeof types[0] == FN_DTYPE_COUNT, "one for each dtype");

fn_status fn_tensor_map(CUtensorMap *map, const fn_tensor_map_source *source, int box_rows, int row_bytes) {
    static _Atomic(encoder) known;
    encoder encode = atomic_load_explicit(&known, memory_order_relaxed);
    if (!encode) {
        union {
            void *address;
            encoder function;
        } found;
        FN_TRY(fn_cuda_driver_function("cuTensorMapEncodeTiled", 12000, &found.address));
        atomic_store(&known, encode = found.function);
    }
    union {
        const char *read;
        void *passed;
    } const data = {source->data};
    const cuuint64_t size[2] = {(cuuint64_t)source->columns, (cuuint64_t)source->rows};
    const cuuint64_t strides[1] = {(cuuint64_t)stride_of(source)};
    const cuuint32_t box[2] = {(cuuint32_t)(row_bytes / fn_dtypes[source->dtype].bytes), (cuuint32_t)box_rows};
    const cuuint32_t steps[2] = {1, 1};
    const CUtensorMapSwizzle swizzle = row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                       : row_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                         : CU_TENSOR_MAP_SWIZZLE_NONE;
    const CUresult result =
        encode(map, types[source->dtype], 2, data.passed, size, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    FN_REQUIRE(result == CUDA_SUCCESS, FN_ERROR_RUNTIME,
               "CUDA product: cuTensorMapEncodeTiled: error %d for %lld rows of %lld elements, %lld bytes apart",
               (int)result, (long long)source->rows, (long long)source->columns, (long long)strides[0]);
    return FN_OK;
}
