/* arguments.c: from a vectorcall to C values. Keywords that the caller spelled in source are interned, so that a pointer
 * comparison finds nearly all of them. */
#include "binding.h"

int fn_signature_ready(fn_state *state, const fn_signature *signature) {
    PyObject **names = PyMem_Calloc((size_t)signature->count, sizeof(PyObject *));
    if (!names) {
        PyErr_NoMemory();
        return -1;
    }
    state->parameter_names[signature->number] = names;
    for (int i = 0; i < signature->count; i++)
        if (!(names[i] = PyUnicode_InternFromString(signature->names[i]))) return -1;
    return 0;
}

static int parameter_index(PyObject *const *names, int count, PyObject *keyword) {
    for (int i = 0; i < count; i++)
        if (names[i] == keyword) return i;
    for (int i = 0; i < count; i++)
        if (PyUnicode_Compare(names[i], keyword) == 0) return i;
    return -1;
}

int fn_parse(fn_state *state, const fn_signature *signature, PyObject *const *args, Py_ssize_t positional,
             PyObject *keywords, PyObject **values) {
    if (positional > signature->positional) {
        PyErr_Format(PyExc_TypeError, "%s: %zd positional arguments given: at most %d are taken, the others by keyword",
                     signature->function, positional, signature->positional);
        return -1;
    }
    for (Py_ssize_t i = 0; i < positional; i++) values[i] = args[i];
    for (Py_ssize_t i = positional; i < signature->count; i++) values[i] = NULL;

    PyObject *const *names = state->parameter_names[signature->number];
    const Py_ssize_t keyword_count = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    for (Py_ssize_t i = 0; i < keyword_count; i++) {
        PyObject *keyword = PyTuple_GET_ITEM(keywords, i); /* borrowed */
        const int index = parameter_index(names, signature->count, keyword);
        if (index < 0) {
            PyErr_Format(PyExc_TypeError, "%s: '%U' is not a keyword argument of this function", signature->function,
                         keyword);
            return -1;
        }
        if (values[index]) {
            PyErr_Format(PyExc_TypeError, "%s: %s is given twice, by position and by keyword", signature->function,
                         signature->names[index]);
            return -1;
        }
        values[index] = args[positional + i];
    }
    for (int i = 0; i < signature->required; i++)
        if (!values[i]) {
            PyErr_Format(PyExc_TypeError, "%s: the argument %s is missing", signature->function, signature->names[i]);
            return -1;
        }
    return 0;
}

/* A number, not an array of one element: float() of a tensor would drop its gradient and wait for its device. */
static bool is_array(fn_state *state, PyObject *object) {
    PyObject *attribute = PyObject_GetAttr((PyObject *)Py_TYPE(object), state->text_dlpack);
    PyErr_Clear();
    Py_XDECREF(attribute);
    return attribute != NULL;
}

void fn_raise_out_of_range(const char *function, const char *name, PyObject *number, const char *allowed) {
    PyErr_Clear();
    PyObject *text = PyObject_Repr(number);
    if (!text) { /* Python prints no integer of more than some thousand digits */
        PyErr_Clear();
        text = PyUnicode_FromString("an integer too long to print");
    }
    if (text) PyErr_Format(PyExc_ValueError, "%s: %s is %U: %s", function, name, text, allowed);
    Py_XDECREF(text);
}

int fn_parse_double(fn_state *state, const char *function, const char *name, PyObject *object, double *value) {
    if (!object) return 0;
    if (PyFloat_CheckExact(object)) {
        *value = PyFloat_AS_DOUBLE(object);
        return 0;
    }
    if (!PyBool_Check(object) && !is_array(state, object)) {
        *value = PyFloat_AsDouble(object);
        if (*value != -1.0 || !PyErr_Occurred()) return 0;
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            fn_raise_out_of_range(function, name, object, "it must be finite in float32");
            return -1;
        }
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
    }
    PyErr_Format(PyExc_TypeError, "%s: %s is %s%s: it must be a real number", function, name, fn_article(object),
                 fn_type_name(object));
    return -1;
}

int fn_parse_flag(const char *function, const char *name, PyObject *object, bool *value) {
    if (!object) return 0;
    if (object != Py_True && object != Py_False) {
        PyErr_Format(PyExc_TypeError, "%s: %s is %s%s: it must be True or False", function, name, fn_article(object),
                     fn_type_name(object));
        return -1;
    }
    *value = object == Py_True;
    return 0;
}

static int dtype_from_text(const char *text, fn_dtype *dtype) {
    static const char torch_prefix[] = "torch.";
    if (strncmp(text, torch_prefix, sizeof torch_prefix - 1) == 0) text += sizeof torch_prefix - 1;
    for (int i = 0; i < FN_DTYPE_COUNT; i++)
        if (strcmp(text, fn_dtypes[i].name) == 0) {
            *dtype = (fn_dtype)i;
            return 1;
        }
    return 0;
}

/* The object's own name for itself: str is it, a dtype has .name, a scalar type __name__, torch.float32 only a repr. */
static PyObject *text_of_dtype(fn_state *state, PyObject *object) {
    if (PyUnicode_Check(object)) return Py_NewRef(object);
    if (PyType_Check(object)) return PyObject_GetAttrString(object, "__name__");
    PyObject *text = PyObject_GetAttr(object, state->text_name);
    if (text && !PyUnicode_Check(text)) Py_CLEAR(text);
    if (text) return text;
    PyErr_Clear();
    return PyObject_Str(object);
}

int fn_parse_dtype(fn_state *state, const char *function, const char *name, PyObject *object, fn_dtype *dtype) {
    for (int i = 0; i < FN_DTYPE_COUNT; i++)
        if (object == state->torch.dtypes[i]) {
            *dtype = (fn_dtype)i;
            return 0;
        }
    int found = fn_dtype_from_descriptor(state, object, dtype);
    if (found == 0) {
        PyObject *text = text_of_dtype(state, object);
        Py_ssize_t length = 0;
        const char *utf8 = text ? PyUnicode_AsUTF8AndSize(text, &length) : NULL;
        if (utf8 && (Py_ssize_t)strlen(utf8) == length) found = dtype_from_text(utf8, dtype);
        Py_XDECREF(text);
    }
    if (found == 1) return 0;
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return -1;
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: %s is %R: it must be " FN_DTYPES_ALLOWED, function, name, object);
    return -1;
}
