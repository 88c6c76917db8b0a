#include "status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char error_text[512];

const char *fn_error_text(void) { return error_text; }

fn_status fn_fail(fn_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return status;
}
