/* dtypes.h: the one list of element types.
 *
 * A new dtype is one row here and one conversion pair in numerics.h (fn_NAME_to_f32, fn_f32_to_NAME);
 * the static_asserts and the missing switch cases then name every other place that has to learn it.
 */
#ifndef FUSEDNORM_DTYPES_H
#define FUSEDNORM_DTYPES_H

/* X(symbol, name, bytes, DLPack code, finfo.eps) */
#define FN_FOR_EACH_DTYPE(X)                                                                                           \
    X(FN_FLOAT32, "float32", 4, 2, 0x1p-23)                                                                            \
    X(FN_FLOAT16, "float16", 2, 2, 0x1p-10)                                                                            \
    X(FN_BFLOAT16, "bfloat16", 2, 4, 0x1p-7)

#define FN_DTYPES_ALLOWED "float32, float16 or bfloat16"

#define FN_DTYPE_SYMBOL(symbol, name, bytes, code, eps) symbol,
typedef enum { FN_FOR_EACH_DTYPE(FN_DTYPE_SYMBOL) FN_DTYPE_COUNT } fn_dtype;
#undef FN_DTYPE_SYMBOL

typedef struct {
    const char *name;
    int bytes;
    int dlpack_code;
    double eps; /* distance from 1 to the next number: finfo(dtype).eps */
} fn_dtype_info;

extern const fn_dtype_info fn_dtypes[FN_DTYPE_COUNT];

#endif
