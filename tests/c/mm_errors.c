/* mm_errors.c: calls of fn_mm that must be refused: with which status, with a text that names the argument, and with every
 * byte of every array as it was.
 */
#include "check.h"
#include "fusednorm.h"

enum { M = 3, N = 5, K = 8, BYTES = 512 };
enum { A, B, BIAS, OUT, ROLES };

typedef struct {
    unsigned char memory[ROLES][BYTES + 64];
    int64_t shape[ROLES][3], stride_bytes[ROLES][3];
    fn_tensor tensor[ROLES];
    fn_mm_args args;
} call;

/* Lines lie `gap` bytes apart, of columns if `transposed`. */
static void build(call *c, int64_t gap, bool transposed) {
    static const char *const names[ROLES] = {"a", "b", "bias", "out"};
    static const int64_t shapes[ROLES][2] = {{M, K}, {K, N}, {N, 0}, {M, N}};
    *c = (call){0};
    for (int role = 0; role < ROLES; role++) {
        memset(c->memory[role], 0x3f, sizeof c->memory[role]);
        memcpy(c->shape[role], shapes[role], sizeof shapes[role]);
        const int fastest = role == BIAS || transposed ? 0 : 1;
        c->stride_bytes[role][fastest] = 4;
        c->stride_bytes[role][1 - fastest] = 4 * shapes[role][fastest] + gap;
        c->tensor[role] = (fn_tensor){.name = names[role],
                                      .data = c->memory[role],
                                      .shape = c->shape[role],
                                      .stride_bytes = c->stride_bytes[role],
                                      .ndim = role == BIAS ? 1 : 2,
                                      .dtype = FN_FLOAT32,
                                      .device_type = FN_CPU};
    }
    fn_tensor *const t = c->tensor;
    c->args = (fn_mm_args){.function = "product", .a = t + A, .b = t + B, .bias = t + BIAS, .out = t + OUT};
}

/* Gives `role` the memory of `other`, moved by some bytes. */
static void share(call *c, int role, int other, int64_t moved) { c->tensor[role].data = c->memory[other] + moved; }

static void no_a(call *c) { c->args.a = NULL; }
static void no_b(call *c) { c->args.b = NULL; }
static void no_out(call *c) { c->args.out = NULL; }
static void nothing(call *c) { c->args = (fn_mm_args){0}; }
static void no_name(call *c) {
    c->args.function = NULL;
    c->args.a = NULL;
}
static void a_scalar(call *c) { c->tensor[A].ndim = 0; }
static void a_vector(call *c) { c->tensor[A].ndim = 1; }
static void b_vector(call *c) { c->tensor[B].ndim = 1; }
static void out_vector(call *c) { c->tensor[OUT].ndim = 1; }
static void a_batch(call *c) { c->tensor[A].ndim = 3; }
static void b_batch(call *c) { c->tensor[B].ndim = 3; }
static void out_negative_ndim(call *c) { c->tensor[OUT].ndim = -1; }
static void bias_scalar(call *c) { c->tensor[BIAS].ndim = 0; }
static void bias_row(call *c) {
    c->tensor[BIAS].ndim = 2;
    c->shape[BIAS][0] = 1;
    c->shape[BIAS][1] = N;
}
static void a_longer(call *c) { c->shape[A][1] = K + 1; }
static void b_shorter(call *c) { c->shape[B][0] = K - 1; }
static void b_transposed(call *c) {
    c->shape[B][0] = N;
    c->shape[B][1] = K;
}
static void b_wider(call *c) { c->shape[B][1] = N + 1; }
static void bias_longer(call *c) { c->shape[BIAS][0] = N + 1; }
static void bias_one(call *c) { c->shape[BIAS][0] = 1; }
static void bias_of_rows(call *c) { c->shape[BIAS][0] = M; }
static void out_rows(call *c) { c->shape[OUT][0] = M - 1; }
static void out_columns(call *c) { c->shape[OUT][1] = N - 1; }
static void out_transposed(call *c) {
    c->shape[OUT][0] = N;
    c->shape[OUT][1] = M;
}
static void negative_rows(call *c) { c->shape[A][0] = c->shape[OUT][0] = -1; }
static void negative_columns(call *c) { c->shape[B][1] = c->shape[BIAS][0] = c->shape[OUT][1] = -1; }
static void negative_length(call *c) { c->shape[A][1] = c->shape[B][0] = -1; }
static void negative_everywhere(call *c) {
    negative_rows(c);
    negative_columns(c);
    negative_length(c);
}
static void too_many_outputs(call *c) {
    c->shape[A][0] = c->shape[OUT][0] = INT64_MAX / 16;
    c->shape[A][1] = c->shape[B][0] = 1;
}
static void too_long(call *c) {
    c->shape[A][1] = c->shape[B][0] = INT64_MAX / 8;
    c->shape[B][1] = c->shape[BIAS][0] = c->shape[OUT][1] = 1;
}
static void too_wide(call *c) {
    c->shape[B][1] = c->shape[BIAS][0] = c->shape[OUT][1] = INT64_MAX / 16;
    c->shape[A][0] = c->shape[OUT][0] = 1;
}
static void a_dtype(call *c) { c->tensor[A].dtype = FN_DTYPE_COUNT; }
static void b_dtype(call *c) { c->tensor[B].dtype = (fn_dtype)-1; }
static void bias_dtype(call *c) { c->tensor[BIAS].dtype = (fn_dtype)99; }
static void out_dtype(call *c) { c->tensor[OUT].dtype = FN_DTYPE_COUNT; }
static void out_readonly(call *c) { c->tensor[OUT].readonly = true; }
static void a_without_memory(call *c) { c->tensor[A].data = NULL; }
static void b_without_memory(call *c) { c->tensor[B].data = NULL; }
static void bias_without_memory(call *c) { c->tensor[BIAS].data = NULL; }
static void out_without_memory(call *c) { c->tensor[OUT].data = NULL; }
static void out_without_length_or_memory(call *c) {
    c->shape[A][1] = c->shape[B][0] = 0;
    c->tensor[A].data = c->tensor[B].data = c->tensor[OUT].data = NULL;
}
static void out_repeats_rows(call *c) { c->stride_bytes[OUT][0] = 0; }
static void out_repeats_columns(call *c) { c->stride_bytes[OUT][1] = 0; }
static void out_lines_overlap(call *c) {
    c->stride_bytes[OUT][0] = 8;
    c->stride_bytes[OUT][1] = 4;
}
static void out_elements_overlap(call *c) {
    c->stride_bytes[OUT][0] = 2;
    c->stride_bytes[OUT][1] = 64;
}
static void out_on_a(call *c) { share(c, OUT, A, 0); }
static void out_on_b(call *c) { share(c, OUT, B, 0); }
static void out_on_bias(call *c) { share(c, OUT, BIAS, 0); }
static void out_on_last_byte_of_bias(call *c) { share(c, OUT, BIAS, 4 * N - 1); }
static void out_exactly_a(call *c) {
    c->shape[B][1] = c->shape[BIAS][0] = c->shape[OUT][1] = K;
    c->stride_bytes[B][0] = c->stride_bytes[A][0] = c->stride_bytes[OUT][0] = 4 * K;
    c->stride_bytes[B][1] = c->stride_bytes[A][1] = c->stride_bytes[OUT][1] = 4;
    share(c, OUT, A, 0);
}
static void a_inside_out(call *c) { /* one element of out, repeated */
    share(c, A, OUT, 4);
    c->stride_bytes[A][0] = c->stride_bytes[A][1] = 0;
}
static void b_on_cuda(call *c) { c->tensor[B].device_type = FN_CUDA; }
static void bias_on_cuda(call *c) { c->tensor[BIAS].device_type = FN_CUDA; }
static void out_on_cuda(call *c) { c->tensor[OUT].device_type = FN_CUDA; }
static void out_on_another_device(call *c) { c->tensor[OUT].device_id = 1; }
static void all_on_no_device(call *c) {
    for (int role = 0; role < ROLES; role++) c->tensor[role].device_type = (fn_device_type)7;
}
static void b_on_no_device(call *c) { c->tensor[B].device_type = (fn_device_type)0; }

static const struct {
    void (*break_it)(call *c);
    fn_status status;
    const char *text[2]; /* parts of the message */
} wrong_calls[] = {
    {no_a, FN_ERROR_VALUE, {"a, b and out must be given", "product: "}},
    {no_b, FN_ERROR_VALUE, {"a, b and out must be given", "product: "}},
    {no_out, FN_ERROR_VALUE, {"a, b and out must be given", "product: "}},
    {nothing, FN_ERROR_VALUE, {"a, b and out must be given", "mm: "}},
    {no_name, FN_ERROR_VALUE, {"a, b and out must be given", "mm: "}},
    {a_scalar, FN_ERROR_VALUE, {"a has 0 dimensions", "exactly 2"}},
    {a_vector, FN_ERROR_VALUE, {"a has 1 dimension:", "exactly 2"}},
    {b_vector, FN_ERROR_VALUE, {"b has 1 dimension:", "exactly 2"}},
    {out_vector, FN_ERROR_VALUE, {"out has 1 dimension:", "exactly 2"}},
    {a_batch, FN_ERROR_VALUE, {"a has 3 dimensions", "exactly 2"}},
    {b_batch, FN_ERROR_VALUE, {"b has 3 dimensions", "exactly 2"}},
    {out_negative_ndim, FN_ERROR_VALUE, {"out has -1 dimensions", "exactly 2"}},
    {bias_scalar, FN_ERROR_VALUE, {"bias has 0 dimensions", "exactly 1"}},
    {bias_row, FN_ERROR_VALUE, {"bias has 2 dimensions", "exactly 1"}},
    {a_longer, FN_ERROR_VALUE, {"b has shape (8, 5)", "(3, 9)"}},
    {b_shorter, FN_ERROR_VALUE, {"b has shape (7, 5)", "(3, 8)"}},
    {b_transposed, FN_ERROR_VALUE, {"b has shape (5, 8)", "(3, 8)"}},
    {b_wider, FN_ERROR_VALUE, {"bias has shape (5,)", "(8, 6)"}},
    {bias_longer, FN_ERROR_VALUE, {"bias has shape (6,)", "(5,)"}},
    {bias_one, FN_ERROR_VALUE, {"bias has shape (1,)", "(5,)"}},
    {bias_of_rows, FN_ERROR_VALUE, {"bias has shape (3,)", "(5,)"}},
    {out_rows, FN_ERROR_VALUE, {"out has shape (2, 5)", "(3, 5)"}},
    {out_columns, FN_ERROR_VALUE, {"out has shape (3, 4)", "(3, 5)"}},
    {out_transposed, FN_ERROR_VALUE, {"out has shape (5, 3)", "(3, 5)"}},
    {negative_rows, FN_ERROR_VALUE, {"a has shape (-1, 8)", "negative"}},
    {negative_columns, FN_ERROR_VALUE, {"b has shape (8, -1)", "negative"}},
    {negative_length, FN_ERROR_VALUE, {"a has shape (3, -1)", "negative"}},
    {negative_everywhere, FN_ERROR_VALUE, {"a has shape (-1, -1)", "negative"}},
    {too_many_outputs, FN_ERROR_VALUE, {"out has shape", "more elements than memory could hold"}},
    {too_long, FN_ERROR_VALUE, {"a has shape", "more elements than memory could hold"}},
    {too_wide, FN_ERROR_VALUE, {"b has shape", "more elements than memory could hold"}},
    {a_dtype, FN_ERROR_TYPE, {"a has dtype number", "fn_dtype"}},
    {b_dtype, FN_ERROR_TYPE, {"b has dtype number", "fn_dtype"}},
    {bias_dtype, FN_ERROR_TYPE, {"bias has dtype number 99", "fn_dtype"}},
    {out_dtype, FN_ERROR_TYPE, {"out has dtype number", "fn_dtype"}},
    {out_readonly, FN_ERROR_BUFFER, {"out is read-only", ""}},
    {a_without_memory, FN_ERROR_TYPE, {"a has shape (3, 8)", "no memory"}},
    {b_without_memory, FN_ERROR_TYPE, {"b has shape (8, 5)", "no memory"}},
    {bias_without_memory, FN_ERROR_TYPE, {"bias has shape (5,)", "no memory"}},
    {out_without_memory, FN_ERROR_TYPE, {"out has shape (3, 5)", "no memory"}},
    {out_without_length_or_memory, FN_ERROR_TYPE, {"out has shape (3, 5)", "no memory"}},
    {out_repeats_rows, FN_ERROR_VALUE, {"out", "overlap each other"}},
    {out_repeats_columns, FN_ERROR_VALUE, {"out", "overlap each other"}},
    {out_lines_overlap, FN_ERROR_VALUE, {"out", "overlap each other"}},
    {out_elements_overlap, FN_ERROR_VALUE, {"out", "overlap each other"}},
    {out_on_a, FN_ERROR_VALUE, {"out overlaps a:", ""}},
    {out_on_b, FN_ERROR_VALUE, {"out overlaps b:", ""}},
    {out_on_bias, FN_ERROR_VALUE, {"out overlaps bias:", ""}},
    {out_on_last_byte_of_bias, FN_ERROR_VALUE, {"out overlaps bias:", ""}},
    {out_exactly_a, FN_ERROR_VALUE, {"out overlaps a:", ""}},
    {a_inside_out, FN_ERROR_VALUE, {"out overlaps a:", ""}},
    {b_on_cuda, FN_ERROR_VALUE, {"b is on cuda:0", "a is on cpu:0"}},
    {bias_on_cuda, FN_ERROR_VALUE, {"bias is on cuda:0", "a is on cpu:0"}},
    {out_on_cuda, FN_ERROR_VALUE, {"out is on cuda:0", "a is on cpu:0"}},
    {out_on_another_device, FN_ERROR_VALUE, {"out is on cpu:1", "a is on cpu:0"}},
    {all_on_no_device, FN_ERROR_VALUE, {"a has device type number 7", ""}},
    {b_on_no_device, FN_ERROR_VALUE, {"b has device type number 0", ""}},
};

static void no_bias(call *c) { c->args.bias = NULL; }
static void no_rows(call *c) {
    c->shape[A][0] = c->shape[OUT][0] = 0;
    c->tensor[A].data = c->tensor[OUT].data = NULL;
}
static void no_columns(call *c) {
    c->shape[B][1] = c->shape[BIAS][0] = c->shape[OUT][1] = 0;
    c->tensor[B].data = c->tensor[BIAS].data = c->tensor[OUT].data = NULL;
}
static void no_length(call *c) {
    c->shape[A][1] = c->shape[B][0] = 0;
    c->tensor[A].data = c->tensor[B].data = NULL;
}
static void out_between_a(call *c) { /* rows of a whose ends out uses */
    c->stride_bytes[A][0] = 4 * (K + N);
    c->stride_bytes[OUT][0] = 4 * (K + N);
    c->stride_bytes[A][1] = c->stride_bytes[OUT][1] = 4;
    share(c, OUT, A, 4 * K);
}
static void inputs_share_and_are_readonly(call *c) {
    share(c, B, A, 4);
    share(c, BIAS, A, 8);
    c->tensor[A].readonly = c->tensor[B].readonly = c->tensor[BIAS].readonly = true;
}
static void as_it_is(call *c) { (void)c; }
static void (*const right_calls[])(call *c) = {
    as_it_is, no_bias, no_rows, no_columns, no_length, out_between_a, inputs_share_and_are_readonly,
};

static void expect(const char *what, fn_status got, fn_status wanted, const char *const *text) {
    if (got != wanted)
        CHECK_FAIL("%s: status %d, not %d: %s", what, (int)got, (int)wanted, got == FN_OK ? "" : fn_error_text());
    for (int i = 0; wanted != FN_OK && i < 2; i++)
        if (!strstr(fn_error_text(), text[i]))
            CHECK_FAIL("%s: the text does not say \"%s\": %s", what, text[i], fn_error_text());
}

int main(int argc, char **argv) {
    check_parse(argc, argv, "products that the C ABI must refuse, with the right status and nothing written");
    static call c, before;
    enum {
        WRONG_CALLS = sizeof wrong_calls / sizeof *wrong_calls,
        RIGHT_CALLS = sizeof right_calls / sizeof *right_calls
    };
    char what[64];
    for (int layout = 0; layout < 4; layout++) {
        const int gap = layout % 2 * 4;
        const bool transposed = layout / 2;
        for (int number = 0; number < WRONG_CALLS; number++) {
            snprintf(what, sizeof what, "wrong call %d, layout %d", number, layout);
            build(&c, gap, transposed);
            wrong_calls[number].break_it(&c);
            before = c;
            expect(what, fn_mm(&c.args), wrong_calls[number].status, wrong_calls[number].text);
            if (memcmp(before.memory, c.memory, sizeof c.memory) != 0) CHECK_FAIL("%s wrote something", what);
        }
        for (int number = 0; number < RIGHT_CALLS; number++) {
            snprintf(what, sizeof what, "right call %d, layout %d", number, layout);
            build(&c, gap, transposed);
            right_calls[number](&c);
            expect(what, fn_mm(&c.args), FN_OK, NULL);
        }
    }
    printf("mm_errors: %d wrong calls refused, nothing written\n", 4 * WRONG_CALLS);
    return 0;
}
