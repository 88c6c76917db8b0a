/* tensor_map.h: what the copy engine of compute capability 9.0 knows of a matrix. */
#ifndef FUSEDNORM_TENSOR_MAP_H
#define FUSEDNORM_TENSOR_MAP_H

#include "cuda.h"

#include <cuda.h>

typedef struct {
    const char *data;
    fn_dtype dtype;
    int64_t rows, columns;
    int64_t row_stride; /* in bytes */
} fn_tensor_map_source;

/* Whether the engine can move such a matrix: whole units of 16 bytes, rows in ascending order that do not overlap. */
bool fn_tensor_map_serves(const fn_tensor_map_source *source);

/* Boxes of row_bytes by box_rows, swizzled by row_bytes (128, 64, 32; 16: as they are); what lies outside of the matrix is read as
 * zeros, and not written. For a source that is served, on the device that fn_cuda_enter made current. */
fn_status fn_tensor_map(CUtensorMap *map, const fn_tensor_map_source *source, int box_rows, int row_bytes);

#endif
