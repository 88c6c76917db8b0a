/* ndarray.c: NumPy arrays by NumPy's C API, the one import of it. bfloat16 is ml_dtypes' type, known by its type object:
 * its type number differs from process to process. */
#include "binding.h"

#define NPY_NO_DEPRECATED_API NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

_Static_assert(sizeof(npy_intp) == sizeof(int64_t), "fusednorm needs a 64-bit platform");
_Static_assert(NPY_MAXDIMS <= FN_MAX_NDIM, "an ndarray's dimensions fit a fn_array");

int fn_ndarray_ready(fn_state *state) {
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    PyObject *numpy = PyImport_ImportModule("numpy");
    state->memmap = numpy ? (PyTypeObject *)PyObject_GetAttrString(numpy, "memmap") : NULL;
    Py_XDECREF(numpy);
    return state->memmap ? 0 : -1;
}

bool fn_is_exact_ndarray(PyObject *object) { return PyArray_CheckExact(object); }
bool fn_is_ndarray(PyObject *object) { return PyArray_Check(object); }

/* ml_dtypes.bfloat16, if something has imported it; borrowed, or NULL without an exception. */
static PyTypeObject *bfloat16_type(fn_state *state) {
    if (state->bfloat16) return state->bfloat16;
    PyObject *modules = PyImport_GetModuleDict();                     /* borrowed */
    PyObject *ml_dtypes = PyDict_GetItemString(modules, "ml_dtypes"); /* borrowed */
    PyObject *type = ml_dtypes ? PyObject_GetAttrString(ml_dtypes, "bfloat16") : NULL;
    PyErr_Clear();
    if (type && PyType_Check(type)) state->bfloat16 = (PyTypeObject *)type;
    else Py_XDECREF(type);
    return state->bfloat16;
}

/* 1, or 0 for a dtype that is not ours. */
static int dtype_of(fn_state *state, PyArray_Descr *descr, fn_dtype *dtype) {
    if (!PyArray_ISNBO(descr->byteorder)) return 0;
    if (descr->type_num == NPY_FLOAT) *dtype = FN_FLOAT32;
    else if (descr->type_num == NPY_HALF) *dtype = FN_FLOAT16;
    else if (descr->type_num >= NPY_USERDEF && descr->typeobj == bfloat16_type(state)) *dtype = FN_BFLOAT16;
    else return 0;
    return 1;
}

int fn_dtype_from_descriptor(fn_state *state, PyObject *object, fn_dtype *dtype) {
    if (!PyArray_DescrCheck(object)) return 0;
    return dtype_of(state, (PyArray_Descr *)object, dtype) ? 1 : -1;
}

int fn_import_ndarray(fn_state *state, const char *function, fn_array *array) {
    PyArrayObject *ndarray = (PyArrayObject *)array->object; /* borrowed */
    PyArray_Descr *descr = PyArray_DESCR(ndarray);           /* borrowed */
    fn_tensor *view = &array->view;
    if (!dtype_of(state, descr, &view->dtype)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: %s has dtype %R: it must be float32, float16 or ml_dtypes.bfloat16, in native byte order",
                     function, view->name, (PyObject *)descr);
        return -1;
    }
    if (fn_array_reserve(array, PyArray_NDIM(ndarray)) < 0) return -1;
    view->data = PyArray_DATA(ndarray);
    view->device_type = FN_CPU;
    view->device_id = 0;
    view->readonly = !PyArray_ISWRITEABLE(ndarray);
    for (int32_t i = 0; i < view->ndim; i++) {
        array->shape[i] = PyArray_DIM(ndarray, i);
        array->stride_bytes[i] = PyArray_STRIDE(ndarray, i);
    }
    return 0;
}

static PyArray_Descr *new_descriptor(fn_state *state, const char *function, fn_dtype dtype) {
    switch (dtype) {
    case FN_FLOAT32: return PyArray_DescrFromType(NPY_FLOAT);
    case FN_FLOAT16: return PyArray_DescrFromType(NPY_HALF);
    case FN_BFLOAT16:
    case FN_DTYPE_COUNT: break;
    }
    PyObject *type = (PyObject *)bfloat16_type(state); /* borrowed */
    if (!type) {
        PyObject *module = PyImport_ImportModule("ml_dtypes"); /* the caller asked for its dtype */
        if (!module) {
            PyErr_Format(PyExc_TypeError,
                         "%s: out_dtype is bfloat16, which NumPy has from the package ml_dtypes: install ml_dtypes",
                         function);
            return NULL;
        }
        Py_DECREF(module);
        type = (PyObject *)bfloat16_type(state);
    }
    PyArray_Descr *descr = NULL;
    if (type && !PyArray_DescrConverter(type, &descr)) return NULL;
    if (!type) PyErr_Format(PyExc_TypeError, "%s: ml_dtypes has no bfloat16", function);
    return descr;
}

PyObject *fn_new_descriptor(fn_state *state, const char *function, fn_dtype dtype) {
    return (PyObject *)new_descriptor(state, function, dtype);
}

PyObject *fn_ndarray_allocate(fn_state *state, const char *function, const fn_result *result) {
    PyArray_Descr *descr = new_descriptor(state, function, result->dtype);
    if (!descr) return NULL;
    npy_intp shape[FN_MAX_NDIM];
    for (int32_t i = 0; i < result->ndim; i++) shape[i] = result->shape[i];
    return PyArray_NewFromDescr(&PyArray_Type, descr, result->ndim, shape, NULL, NULL, 0, NULL); /* steals descr */
}
