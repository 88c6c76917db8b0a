/* status.h: the one way in which errors travel.
 *
 * Every C function that can fail returns a fn_status. Its text, for people, waits in thread-local storage until the next
 * failure on that thread; fn_error_text() reads it. C code never prints, exits or touches Python: csrc/python/ turns a
 * status into an exception in one place.
 */
#ifndef FUSEDNORM_STATUS_H
#define FUSEDNORM_STATUS_H

typedef enum {
    FN_OK = 0,
    FN_ERROR_TYPE,    /* a wrong kind of thing: dtype, object */
    FN_ERROR_VALUE,   /* the right kind with a wrong value: shape, overlap, eps */
    FN_ERROR_BUFFER,  /* memory that cannot be used as asked: read-only */
    FN_ERROR_RUNTIME, /* the machine or the build cannot do it */
    FN_ERROR_MEMORY,  /* malloc failed */
    FN_STATUS_COUNT
} fn_status;

/* The text of this thread's last failure; never NULL, at most 511 bytes of UTF-8, ASCII when the names given are. */
const char *fn_error_text(void);

/* Keeps the text and returns the status: `return fn_fail(FN_ERROR_VALUE, "%s ...", name);` */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3), cold))
#endif
fn_status
fn_fail(fn_status status, const char *format, ...);

#define FN_REQUIRE(condition, status, ...)                                                                             \
    do {                                                                                                               \
        if (!(condition)) return fn_fail((status), __VA_ARGS__);                                                       \
    } while (0)

#define FN_TRY(expression)                                                                                             \
    do {                                                                                                               \
        const fn_status fn_try_status_ = (expression);                                                                 \
        if (fn_try_status_ != FN_OK) return fn_try_status_;                                                            \
    } while (0)

#endif
