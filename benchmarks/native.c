/* native.c: what the benchmarks need from C: a loop of calls without the interpreter's, and copies on several threads.
 *
 * repeat(function, arguments, keywords, calls) -> ns     `arguments` is a tuple, positional ones first; `keywords` None or
 *                                                        the tuple of names of the last of them
 * count(function, arguments, keywords, calls, title)     the same, seen by callgrind, which dumps its counters as `title`
 * borrow(array, ...)                                     asks each for its memory by the DLPack C exchange API
 * copy(to, from, bytes, threads, streaming, both_ways)    addresses; 0 or 1: with stores that go past the caches; 0 or 1:
 *                                                        and back again
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <string.h>
#include <time.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__has_include)
#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#define HAVE_CALLGRIND 1
#endif
#endif

#include "python/dlpack_abi.h"

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* ---- calls ------------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject *function, *arguments, *keywords; /* borrowed; keywords may be NULL */
    Py_ssize_t calls;
    const char *title;
} loop;

static int parse_loop(PyObject *args, loop *l) {
    l->title = "";
    if (!PyArg_ParseTuple(args, "OO!On|s", &l->function, &PyTuple_Type, &l->arguments, &l->keywords, &l->calls,
                          &l->title))
        return -1;
    if (l->keywords == Py_None) l->keywords = NULL;
    return 0;
}

static int call_many(const loop *l, Py_ssize_t calls) {
    PyObject *const *arguments = ((PyTupleObject *)l->arguments)->ob_item;
    const Py_ssize_t positional = PyTuple_GET_SIZE(l->arguments) - (l->keywords ? PyTuple_GET_SIZE(l->keywords) : 0);
    for (Py_ssize_t i = 0; i < calls; i++) {
        PyObject *result = PyObject_Vectorcall(l->function, arguments, (size_t)positional, l->keywords);
        if (!result) return -1;
        Py_DECREF(result);
    }
    return 0;
}

static PyObject *repeat(PyObject *Py_UNUSED(module), PyObject *args) {
    loop l;
    if (parse_loop(args, &l) < 0) return NULL;
    const long long start = now_ns();
    if (call_many(&l, l.calls) < 0) return NULL;
    return PyLong_FromLongLong(now_ns() - start);
}

static PyObject *count(PyObject *Py_UNUSED(module), PyObject *args) {
    loop l;
    if (parse_loop(args, &l) < 0) return NULL;
#if defined(HAVE_CALLGRIND)
    CALLGRIND_START_INSTRUMENTATION;
    const int warm = call_many(&l, 10); /* lazy binding of symbols, caches of types */
    CALLGRIND_ZERO_STATS;
    const int failed = warm < 0 ? warm : call_many(&l, l.calls);
    CALLGRIND_DUMP_STATS_AT(l.title);
    CALLGRIND_STOP_INSTRUMENTATION;
    if (failed < 0) return NULL;
    Py_RETURN_NONE;
#else
    PyErr_SetString(PyExc_RuntimeError, "built without valgrind/callgrind.h");
    return NULL;
#endif
}

/* What the C exchange API takes to lend each argument's memory: the floor under every call that goes through it. */
static PyObject *borrow(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t given) {
    static PyTypeObject *known_type; /* borrowed: the benchmark keeps its arrays */
    static const dl_exchange_api *known;
    for (Py_ssize_t i = 0; i < given; i++) {
        if (Py_TYPE(args[i]) != known_type) {
            PyObject *capsule = PyObject_GetAttrString((PyObject *)Py_TYPE(args[i]), "__dlpack_c_exchange_api__");
            known = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
            Py_XDECREF(capsule); /* the table is immortal */
            if (!known) return NULL;
            known_type = Py_TYPE(args[i]);
        }
        dl_tensor tensor;
        if (known->borrow_from_object(args[i], &tensor) != 0) return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- copies ------------------------------------------------------------------------------------------------------------ */

#if defined(__x86_64__)
/* Both addresses are multiples of 64 here. */
static void copy_streaming(char *destination, const char *source, size_t bytes) {
    size_t done = 0;
    for (; done + 64 <= bytes; done += 64) {
        const __m128i *from = (const __m128i *)(const void *)(source + done);
        __m128i *to = (__m128i *)(void *)(destination + done);
        const __m128i a = _mm_load_si128(from), b = _mm_load_si128(from + 1);
        const __m128i c = _mm_load_si128(from + 2), d = _mm_load_si128(from + 3);
        _mm_stream_si128(to, a);
        _mm_stream_si128(to + 1, b);
        _mm_stream_si128(to + 2, c);
        _mm_stream_si128(to + 3, d);
    }
    memcpy(destination + done, source + done, bytes - done);
    _mm_sfence();
}
#endif

static void copy_part(char *destination, const char *source, size_t bytes, bool streaming) {
#if defined(__x86_64__)
    if (streaming && ((uintptr_t)destination | (uintptr_t)source) % 64 == 0) {
        copy_streaming(destination, source, bytes);
        return;
    }
#else
    (void)streaming;
#endif
    memcpy(destination, source, bytes);
}

static void copy_both(char *to, char *from, size_t begin, size_t end, bool streaming, bool both_ways) {
    copy_part(to + begin, from + begin, end - begin, streaming);
    if (both_ways) copy_part(from + begin, to + begin, end - begin, streaming);
}

static PyObject *copy(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t given) {
    if (given != 6) {
        PyErr_SetString(PyExc_TypeError, "copy(to, from, bytes, threads, streaming, both_ways)");
        return NULL;
    }
    char *to = PyLong_AsVoidPtr(args[0]), *from = PyLong_AsVoidPtr(args[1]);
    const size_t bytes = PyLong_AsSize_t(args[2]);
    const long threads = PyLong_AsLong(args[3]);
    const bool streaming = PyLong_AsLong(args[4]) != 0, both_ways = PyLong_AsLong(args[5]) != 0;
    if (PyErr_Occurred()) return NULL;
    if (threads <= 1) {
        copy_both(to, from, 0, bytes, streaming, both_ways);
        Py_RETURN_NONE;
    }
#if defined(_OPENMP)
    Py_BEGIN_ALLOW_THREADS;
#pragma omp parallel num_threads((int)threads)
    {
        const size_t team = (size_t)omp_get_num_threads(), thread = (size_t)omp_get_thread_num();
        const size_t begin = bytes / 64 * thread / team * 64;
        const size_t end = thread + 1 == team ? bytes : bytes / 64 * (thread + 1) / team * 64;
        copy_both(to, from, begin, end, streaming, both_ways);
    }
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
#else
    PyErr_SetString(PyExc_RuntimeError, "built without OpenMP: copies run on one thread");
    return NULL;
#endif
}

/* ---- the module ---------------------------------------------------------------------------------------------------------- */

static PyObject *features(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    int threads = 0, callgrind = 0, streaming = 0;
#if defined(_OPENMP)
    threads = 1;
#endif
#if defined(HAVE_CALLGRIND)
    callgrind = 1;
#endif
#if defined(__x86_64__)
    streaming = 1;
#endif
    return Py_BuildValue("{sNsNsN}", "threads", PyBool_FromLong(threads), "callgrind", PyBool_FromLong(callgrind),
                         "streaming", PyBool_FromLong(streaming));
}

static PyMethodDef functions[] = {
    {"repeat", repeat, METH_VARARGS, "(function, arguments, keywords, calls) -> ns"},
    {"count", count, METH_VARARGS, "(function, arguments, keywords, calls, title)"},
    {"borrow", (PyCFunction)(void (*)(void))borrow, METH_FASTCALL, "(array, ...)"},
    {"copy", (PyCFunction)(void (*)(void))copy, METH_FASTCALL, "(to, from, bytes, threads, streaming, both_ways)"},
    {"features", features, METH_NOARGS, "what this build can do"},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "benchmarks_native", .m_size = 0,
                                        .m_methods = functions};

PyMODINIT_FUNC PyInit_benchmarks_native(void) { return PyModuleDef_Init(&definition); }
