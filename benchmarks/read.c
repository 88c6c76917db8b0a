/* read.c: how fast memory can be read, which is what limits a product of one row.
 *
 * read(address, bytes, threads) -> a sum of all that was read
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

enum { VECTOR = 64, VECTORS = 4 };
typedef uint64_t vector __attribute__((vector_size(VECTOR)));

static uint64_t sum_of(const char *from, size_t bytes) {
    vector sums[VECTORS] = {{0}};
    size_t i = 0;
    for (; i + sizeof sums <= bytes; i += sizeof sums) {
        __builtin_prefetch(from + i + 1024); /* which an address beyond the end does not harm */
        for (int v = 0; v < VECTORS; v++) {
            vector loaded;
            memcpy(&loaded, from + i + v * VECTOR, VECTOR);
            sums[v] += loaded;
        }
    }
    uint64_t sum = 0;
    for (; i < bytes; i++) sum += (unsigned char)from[i];
    for (int v = 0; v < VECTORS; v++)
        for (int k = 0; k < VECTOR / 8; k++) sum += sums[v][k];
    return sum;
}

static PyObject *read_memory(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_ssize_t address, bytes;
    int threads;
    if (!PyArg_ParseTuple(args, "nni", &address, &bytes, &threads)) return NULL;
    uint64_t sum = 0;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) reduction(+ : sum)
    {
        const size_t team = (size_t)omp_get_num_threads(), thread = (size_t)omp_get_thread_num();
#else
    {
        const size_t team = 1, thread = 0;
#endif
        const size_t begin = (size_t)bytes / VECTOR * thread / team * VECTOR;
        const size_t end = thread + 1 == team ? (size_t)bytes : (size_t)bytes / VECTOR * (thread + 1) / team * VECTOR;
        sum += sum_of((const char *)address + begin, end - begin);
    }
    return PyLong_FromUnsignedLongLong(sum);
}

static PyMethodDef methods[] = {
    {"read", read_memory, METH_VARARGS, "read(address, bytes, threads) -> a sum of all that was read"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "benchmarks_read", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_benchmarks_read(void) { return PyModule_Create(&module); }
