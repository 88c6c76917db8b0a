/* mm_dtype_scalar.c: the product's specification, executable. Every other path has these bits.
 *
 *   1. K is cut into chunks of 1024, the last one is shorter. Each chunk is padded with zeros to a multiple of 16
 *   2. lane[l] = +0, then for k = l, l + 16, l + 32, ... of the chunk: lane[l] = fma(a[m, k], b[k, n], lane[l])
 *   3. the chunk's sum: the lanes folded by halves, 16 -> 8 -> 4 -> 2 -> 1
 *   4. total = the first chunk's sum, plus the second's, plus the third's, ...; +0 where K is 0
 *   5. out = round(total + bias)
 *
 * The padding has one effect: where a product underflowed to -0 in a lane, adding +0 makes it +0.
 */
#include "element.h"
#include "mm_dtype.h"

static float element(const fn_matrix *matrix, int64_t row, int64_t column) {
    return fn_load_element(matrix->data + row * matrix->stride[0] + column * matrix->stride[1], matrix->dtype);
}

static float chunk_sum(const fn_mm_plan *plan, int64_t m, int64_t n, int64_t begin, int64_t end) {
    float lane[FN_MM_LANES] = {0};
    for (int64_t k = begin; k < end; k += FN_MM_LANES)
        for (int l = 0; l < FN_MM_LANES; l++) {
            const bool padding = k + l >= end;
            const float a = padding ? 0 : element(&plan->a, m, k + l), b = padding ? 0 : element(&plan->b, k + l, n);
            lane[l] = fn_fma(a, b, lane[l]);
        }
    for (int half = FN_MM_LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lane[l] = fn_add(lane[l], lane[l + half]);
    return lane[0];
}

void fn_mm_scalar(const fn_mm_plan *plan, int64_t m, int64_t m_end, int64_t n, int64_t n_end) {
    for (int64_t row = m; row < m_end; row++)
        for (int64_t column = n; column < n_end; column++) {
            float total = 0;
            for (int64_t begin = 0; begin < plan->k; begin += FN_MM_CHUNK) {
                const int64_t end = plan->k - begin < FN_MM_CHUNK ? plan->k : begin + FN_MM_CHUNK;
                const float sum = chunk_sum(plan, row, column, begin, end);
                total = begin == 0 ? sum : fn_add(total, sum);
            }
            if (plan->bias.data) total = fn_add(total, element(&plan->bias, 0, column));
            fn_store_element(plan->out.data + row * plan->out.stride[0] + column * plan->out.stride[1], total,
                             plan->out.dtype);
        }
}
