/* norm_errors.c: calls of the C ABI that must be refused: with which status, with a text that names the argument, and
 * with every byte of every array as it was.
 */
#include <math.h>

#include "check.h"
#include "fusednorm.h"

enum { ROWS = 3, COLUMNS = 8, BYTES = 4 * ROWS * COLUMNS };
enum { X, RESIDUAL, POST, WEIGHT, OUT, RESIDUAL_OUT, ROLES };

typedef struct {
    unsigned char memory[ROLES][BYTES + 64];
    int64_t shape[ROLES][2], stride_bytes[ROLES][2];
    fn_tensor tensor[ROLES];
    fn_norm_args args;
} call;

/* Rows lie `gap` bytes apart. */
static void build(call *c, int64_t gap) {
    static const char *const names[ROLES] = {"x",      "residual", "post_residual_addition",
                                             "weight", "out",      "residual_out"};
    for (int role = 0; role < ROLES; role++) {
        memset(c->memory[role], 0x3f, sizeof c->memory[role]);
        const int ndim = role == WEIGHT ? 1 : 2;
        c->shape[role][0] = ROWS;
        c->shape[role][ndim - 1] = COLUMNS;
        c->stride_bytes[role][0] = 4 * COLUMNS + gap;
        c->stride_bytes[role][ndim - 1] = 4;
        c->tensor[role] = (fn_tensor){.name = names[role],
                                      .data = c->memory[role],
                                      .shape = c->shape[role],
                                      .stride_bytes = c->stride_bytes[role],
                                      .ndim = ndim,
                                      .dtype = FN_FLOAT32,
                                      .device_type = FN_CPU};
    }
    fn_tensor *const t = c->tensor;
    c->args = (fn_norm_args){.x = t,
                             .residual = t + RESIDUAL,
                             .post_residual_addition = t + POST,
                             .weight = t + WEIGHT,
                             .out = t + OUT,
                             .residual_out = t + RESIDUAL_OUT,
                             .eps = 1e-6};
}

/* Gives `role` the memory of `other`, moved by some bytes. */
static void share(call *c, int role, int other, int64_t moved) { c->tensor[role].data = c->memory[other] + moved; }

static void eps_negative(call *c) { c->args.eps = -1e-6; }
static void eps_nan(call *c) { c->args.eps = NAN; }
static void eps_infinite(call *c) { c->args.eps = INFINITY; }
static void eps_above_float32(call *c) { c->args.eps = 1e39; }
static void offset_nan(call *c) { c->args.weight_offset = NAN; }
static void offset_infinite(call *c) { c->args.weight_offset = -INFINITY; }
static void offset_alone(call *c) {
    c->args.weight = NULL;
    c->args.weight_offset = 1;
}
static void no_x(call *c) { c->args.x = NULL; }
static void no_out(call *c) { c->args.out = NULL; }
static void no_residual_out(call *c) { c->args.residual_out = NULL; }
static void no_residual(call *c) { c->args.residual = NULL; }
static void only_post(call *c) { c->args.residual = c->args.residual_out = NULL; }
static void x_scalar(call *c) { c->tensor[X].ndim = 0; }
static void no_columns(call *c) {
    for (int role = 0; role < ROLES; role++) c->shape[role][c->tensor[role].ndim - 1] = 0;
}
static void residual_rows(call *c) { c->shape[RESIDUAL][0] = ROWS - 1; }
static void residual_columns(call *c) { c->shape[RESIDUAL][1] = COLUMNS - 1; }
static void residual_ndim(call *c) { c->tensor[RESIDUAL].ndim = 1; }
static void post_columns(call *c) { c->shape[POST][1] = 1; }
static void out_rows(call *c) { c->shape[OUT][0] = ROWS - 1; }
static void residual_out_columns(call *c) { c->shape[RESIDUAL_OUT][1] = COLUMNS - 1; }
static void weight_length(call *c) { c->shape[WEIGHT][0] = COLUMNS - 1; }
static void weight_ndim(call *c) {
    c->tensor[WEIGHT].ndim = 2;
    c->shape[WEIGHT][0] = 1;
    c->shape[WEIGHT][1] = COLUMNS;
}
static void out_readonly(call *c) { c->tensor[OUT].readonly = true; }
static void residual_out_readonly(call *c) { c->tensor[RESIDUAL_OUT].readonly = true; }
static void out_repeats(call *c) { c->stride_bytes[OUT][0] = 0; }
static void out_rows_overlap(call *c) { c->stride_bytes[OUT][0] = 4; }
static void out_on_x_shifted(call *c) { share(c, OUT, X, 4); }
static void out_on_x_other_dtype(call *c) {
    share(c, OUT, X, 0);
    c->tensor[OUT].dtype = FN_BFLOAT16; /* and the same strides */
}
static void out_on_x_other_16_bits(call *c) {
    share(c, OUT, X, 0);
    for (int role = X; role <= OUT; role += OUT - X) {
        c->tensor[role].dtype = role == X ? FN_FLOAT16 : FN_BFLOAT16;
        c->stride_bytes[role][0] = 2 * COLUMNS;
        c->stride_bytes[role][1] = 2;
    }
}
static void out_on_x_other_strides(call *c) {
    share(c, OUT, X, 0);
    c->stride_bytes[OUT][0] = 4;
    c->stride_bytes[OUT][1] = 4 * ROWS;
}
static void out_on_residual(call *c) { share(c, OUT, RESIDUAL, 0); }
static void out_on_post(call *c) { share(c, OUT, POST, 0); }
static void out_on_weight(call *c) { share(c, OUT, WEIGHT, 0); }
static void residual_out_on_x(call *c) { share(c, RESIDUAL_OUT, X, 0); }
static void residual_out_on_out(call *c) { share(c, RESIDUAL_OUT, OUT, 16); }
static void out_on_cuda(call *c) { c->tensor[OUT].device_type = FN_CUDA; }
static void all_on_cuda(call *c) {
    for (int role = 0; role < ROLES; role++) c->tensor[role].device_type = FN_CUDA;
}
static void all_on_no_device(call *c) {
    for (int role = 0; role < ROLES; role++) c->tensor[role].device_type = (fn_device_type)7;
}
static void weight_on_no_device(call *c) { c->tensor[WEIGHT].device_type = (fn_device_type)0; }
static void x_without_memory(call *c) { c->tensor[X].data = NULL; }
static void too_many_elements(call *c) {
    for (int role = 0; role < ROLES; role++)
        if (role != WEIGHT) c->shape[role][0] = INT64_MAX / 16;
}

static const struct {
    void (*break_it)(call *c);
    fn_status status;
    const char *text; /* a part of the message */
} wrong_calls[] = {
    {eps_negative, FN_ERROR_VALUE, "eps"},
    {eps_nan, FN_ERROR_VALUE, "eps"},
    {eps_infinite, FN_ERROR_VALUE, "eps"},
    {eps_above_float32, FN_ERROR_VALUE, "eps"},
    {offset_nan, FN_ERROR_VALUE, "weight_offset"},
    {offset_infinite, FN_ERROR_VALUE, "weight_offset"},
    {offset_alone, FN_ERROR_VALUE, "weight_offset"},
    {no_x, FN_ERROR_VALUE, "x"},
    {no_out, FN_ERROR_VALUE, "out"},
    {no_residual_out, FN_ERROR_VALUE, "residual_out"},
    {no_residual, FN_ERROR_VALUE, "residual"},
    {only_post, FN_ERROR_VALUE, "residual"},
    {x_scalar, FN_ERROR_VALUE, "x"},
    {no_columns, FN_ERROR_VALUE, "x"},
    {residual_rows, FN_ERROR_VALUE, "residual"},
    {residual_columns, FN_ERROR_VALUE, "residual"},
    {residual_ndim, FN_ERROR_VALUE, "residual"},
    {post_columns, FN_ERROR_VALUE, "post_residual_addition"},
    {out_rows, FN_ERROR_VALUE, "out"},
    {residual_out_columns, FN_ERROR_VALUE, "residual_out"},
    {weight_length, FN_ERROR_VALUE, "weight"},
    {weight_ndim, FN_ERROR_VALUE, "weight"},
    {out_readonly, FN_ERROR_BUFFER, "out"},
    {residual_out_readonly, FN_ERROR_BUFFER, "residual_out"},
    {out_repeats, FN_ERROR_VALUE, "out"},
    {out_rows_overlap, FN_ERROR_VALUE, "out"},
    {out_on_x_shifted, FN_ERROR_VALUE, "out"},
    {out_on_x_other_dtype, FN_ERROR_VALUE, "out"},
    {out_on_x_other_16_bits, FN_ERROR_VALUE, "out"},
    {out_on_x_other_strides, FN_ERROR_VALUE, "out"},
    {out_on_residual, FN_ERROR_VALUE, "out"},
    {out_on_post, FN_ERROR_VALUE, "out"},
    {out_on_weight, FN_ERROR_VALUE, "out"},
    {residual_out_on_x, FN_ERROR_VALUE, "residual_out"},
    {residual_out_on_out, FN_ERROR_VALUE, "out"},
    {out_on_cuda, FN_ERROR_VALUE, "out"},
    {all_on_cuda, FN_ERROR_RUNTIME, "CUDA"},
    {all_on_no_device, FN_ERROR_VALUE, "x has device type number 7"},
    {weight_on_no_device, FN_ERROR_VALUE, "weight has device type number 0"},
    {x_without_memory, FN_ERROR_TYPE, "x"},
    {too_many_elements, FN_ERROR_VALUE, "x"},
};

static void expect(const char *what, fn_status got, fn_status wanted, const char *text) {
    if (got != wanted)
        CHECK_FAIL("%s: status %d, not %d: %s", what, (int)got, (int)wanted, got == FN_OK ? "" : fn_error_text());
    if (wanted != FN_OK && !strstr(fn_error_text(), text))
        CHECK_FAIL("%s: the text does not say \"%s\": %s", what, text, fn_error_text());
}

int main(int argc, char **argv) {
    check_parse(argc, argv, "calls that the C ABI must refuse, with the right status and nothing written");
    static call c, before;
    enum { WRONG_CALLS = sizeof wrong_calls / sizeof *wrong_calls };

    for (int n = 0; n < 2 * WRONG_CALLS; n++) {
        const int number = n / 2, gap = n % 2 * 4;
        char what[64];
        snprintf(what, sizeof what, "wrong call %d, rows %d bytes apart", number, gap);
        build(&c, gap);
        expect("the right call", fn_norm(&c.args), FN_OK, "");
        build(&c, gap);
        wrong_calls[number].break_it(&c);
        before = c;
        expect(what, fn_norm(&c.args), wrong_calls[number].status, wrong_calls[number].text);
        if (memcmp(before.memory, c.memory, sizeof c.memory) != 0) CHECK_FAIL("%s wrote something", what);
    }

    expect("an unknown path", fn_cpu_force_path("sse9"), FN_ERROR_RUNTIME, "scalar");
    for (int path = 0; path < FN_PATH_COUNT; path++) {
        const bool available = fn_path_is_available((fn_path)path);
        if (available && !fn_path_is_built((fn_path)path))
            CHECK_FAIL("%s: available, not built", fn_path_name((fn_path)path));
        expect(fn_path_name((fn_path)path), fn_cpu_force_path(fn_path_name((fn_path)path)),
               available ? FN_OK : FN_ERROR_RUNTIME, "scalar");
        fn_path now;
        expect("fn_cpu_path", fn_cpu_path(&now), FN_OK, "");
        if (available && now != (fn_path)path)
            CHECK_FAIL("forced %s, got %s", fn_path_name((fn_path)path), fn_path_name(now));
    }
    expect("the automatic path", fn_cpu_force_path(NULL), FN_OK, "");
    expect("no threads", fn_set_num_threads(0), FN_ERROR_VALUE, "0");
    expect("one thread", fn_set_num_threads(1), FN_OK, "");
    printf("norm_errors: %d wrong calls refused, nothing written\n", 2 * WRONG_CALLS);
    return 0;
}
