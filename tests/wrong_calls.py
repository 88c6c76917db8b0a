"""The table of wrong calls: test_errors.py checks what they raise and leave alone, test_memory.py that nothing leaks.

A row changes a right call (RIGHT) in some arguments. A value that is a function or a partial makes a fresh argument for
each test; the parameters of a lambda, if any, name other arguments of the same call that it is made from.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import array_makers as make
import numpy as np
import pytest
from array_makers import bf16, f32, fp8, j32, readonly, strided, stub, t32

import fusednorm

OMITTED = object()


@dataclass(frozen=True)
class Row:
    """One wrong call. Its message must begin with the function, hold the argument's name, and match every pattern."""

    function: str
    argument: str
    what: str
    exception: type[BaseException]
    patterns: tuple[str, ...]
    changes: dict[str, Any]
    right: dict[str, Any]
    required: list[str]
    optional: list[str]  # that may be given by position
    extra: tuple[Any, ...] = ()  # more positional arguments
    keywords: dict[str, Any] = field(default_factory=dict)  # names that are also given by position
    foreign: bool = False  # raised by the array's own package, so the message is not ours

    @property
    def id(self) -> str:
        return "-".join(part for part in (self.function, self.argument, self.what) if part)

    def make(self) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
        """The function, its positional arguments and its keyword arguments; skips where a package is missing."""
        values = resolve({**self.right, **self.changes})
        given = {name: value for name, value in values.items() if value is not OMITTED}
        names = [*self.required, *(self.optional if self.extra else [])]
        positional = [given.pop(name) for name in names if name in given]
        return getattr(fusednorm, self.function), [*positional, *self.extra], {**given, **self.keywords}


def resolve(values: dict[str, Any]) -> dict[str, Any]:
    """Makes the arguments, each after those that it is made from."""
    made: dict[str, Any] = {}

    def finish(name: str) -> Any:
        if name not in made:
            value = values[name]
            if isinstance(value, partial):
                value = value()
            elif isinstance(value, FunctionType):
                value = value(*[finish(other) for other in inspect.signature(value).parameters])
            made[name] = value
        return made[name]

    return {name: finish(name) for name in values}


def snapshot(value: Any) -> Any:
    """The bytes of `value` and of the memory that it is a view of; None where no memory can be read."""
    if isinstance(value, np.ndarray):
        whole = value
        while isinstance(getattr(whole, "base", None), np.ndarray):
            whole = whole.base
        return value.tobytes(), whole.tobytes()
    if isinstance(value, (str, bytes, type)):
        return repr(value)
    if hasattr(value, "untyped_storage"):
        try:
            return bytes(value.untyped_storage())
        except (RuntimeError, NotImplementedError):  # sparse, meta, fake, nested: nothing that could be written
            return None
    if hasattr(value, "is_deleted"):
        return None if value.is_deleted() else repr(value)
    if hasattr(value, "tobytes"):
        return value.tobytes()
    return repr(value)


def check_wrong_call(row: Row) -> None:
    """It raises what the row says, and leaves every byte of every argument alone."""
    function, positional, named = row.make()
    arguments = [*positional, *named.values()]
    before = [snapshot(value) for value in arguments]
    threads = fusednorm.get_num_threads()

    with pytest.raises(row.exception) as caught:
        function(*positional, **named)

    assert type(caught.value) is row.exception or row.foreign, f"a {type(caught.value).__name__}"
    text = str(caught.value)
    if not row.foreign:
        assert text.startswith((f"{row.function}: ", f"{row.function}()")), f"does not begin with the function: {text}"
        assert re.search(rf"\b{row.argument}\b", text), f"does not name {row.argument}: {text}"
        assert "\n" not in text
    for pattern in row.patterns:
        assert re.search(pattern, text), f"no {pattern!r} in: {text}"
    assert [snapshot(value) for value in arguments] == before, "a wrong call wrote to an argument"
    assert fusednorm.get_num_threads() == threads


REQUIRED = {
    "rms_norm": ["x"],
    "fused_add_rmsnorm": ["x", "residual"],
    "rms_norm_batch_invariant": ["input", "normalized_shape"],
    "set_num_threads": ["n"],
}
_x, _w = partial(f32, 4, 8), partial(f32, 8)
RIGHT: dict[str, dict[str, Any]] = {
    "rms_norm": {"x": _x, "weight": _w, "eps": 1e-6, "out": _x},
    "fused_add_rmsnorm": {"x": _x, "residual": _x, "weight": _w, "eps": 1e-6, "post_residual_addition": _x},
    "rms_norm_batch_invariant": {"input": _x, "normalized_shape": [8], "weight": _w, "eps": 1e-6, "out": _x},
    "set_num_threads": {"n": 1},
}
R, F, B, S = RIGHT
SLOTS = [(R, "x"), (R, "weight"), (R, "out"), (F, "x"), (F, "residual"), (F, "post_residual_addition"), (F, "weight")]
SLOTS += [(F, "out"), (F, "residual_out"), (B, "input"), (B, "weight"), (B, "out")]
DTYPES = "float32.*float16.*bfloat16"
OVERLAP, UNKNOWN = "overlap|same memory", "unexpected|unknown|not a keyword"
TWICE, MISSING = "twice|multiple|both", "missing|required"
ROWS: list[Row] = []


def row(
    function: str, argument: str, what: str, exception: type[BaseException], *patterns: str, **changes: Any
) -> None:
    special = {name: changes.pop(name) for name in ("extra", "keywords", "foreign") if name in changes}
    right, required = RIGHT[function], REQUIRED[function]
    optional = ["weight", "eps"]
    ROWS.append(Row(function, argument, what, exception, patterns, changes, right, required, optional, **special))


# What is wrong wherever an array is expected.
for f, a in SLOTS:
    n = (8,) if a == "weight" else (4, 8)
    output = a in ("out", "residual_out")
    row(f, a, "float64", TypeError, "float64", DTYPES, **{a: partial(f32, *n, dtype=np.float64)})
    row(f, a, "int32", TypeError, "int32", DTYPES, **{a: partial(f32, *n, dtype=np.int32)})
    row(f, a, "big-endian", TypeError, ">f4|big.endian|byte.order", **{a: partial(f32, *n, dtype=">f4")})
    row(f, a, "list", TypeError, "list", "array", **{a: partial(list, [1.0] * 8)})
    row(f, a, "0-d", ValueError, r"\(\)|0.d|dimension", **{a: partial(np.array, 1.5, np.float32)})
    row(f, a, "torch-float64", TypeError, "float64", DTYPES, **{a: partial(make.torch_dtype, "float64", *n)})
    row(f, a, "requires-grad", RuntimeError, "no_grad", "detach", **{a: partial(t32, *n, requires_grad=True)})
    row(f, a, "fake-tensor", TypeError, "FakeTensor", **{a: partial(make.fake_tensor, *n)})
    if a in ("x", "residual", "input"):
        row(f, a, "none", TypeError, "None", "array", **{a: None})
        zero = {"normalized_shape": [0]} if f == B else {}
        row(f, a, "empty-rows", ValueError, r"\(4, 0\)", **{a: partial(f32, 4, 0)}, **zero)
    if output:
        row(f, a, "readonly", BufferError, "read-only", **{a: partial(readonly, *n)})
        row(f, a, "jax", BufferError, "jax", **{a: partial(j32, *n)})
        row(f, a, "stride-0", ValueError, "stride|itself|overlap", **{a: partial(strided, f32(8), n, (0, 4))})
        row(f, a, "rows-overlap", ValueError, "stride|itself|overlap", **{a: partial(strided, f32(16), n, (4, 4))})
        row(f, a, "capsule-readonly", BufferError, "read-only", **{a: partial(stub, "Capsule", *n, flags=1)})
for f, a in SLOTS:
    if a in ("weight",):
        row(f, a, "too-long", ValueError, r"\(9,\)", r"\(8,\)", weight=partial(f32, 9))
        row(f, a, "one", ValueError, r"\(1,\)", r"\(8,\)", weight=partial(f32, 1))
        row(f, a, "two-dimensions", ValueError, r"\(1, 8\)", r"\(8,\)", weight=partial(f32, 1, 8))
    elif a not in ("x", "input"):
        row(f, a, "more-rows", ValueError, r"\(5, 8\)", r"\(4, 8\)", **{a: partial(f32, 5, 8)})
        row(f, a, "longer-rows", ValueError, r"\(4, 9\)", r"\(4, 8\)", **{a: partial(f32, 4, 9)})
        row(f, a, "flat", ValueError, r"\(32,\)", r"\(4, 8\)", **{a: partial(f32, 32)})
        row(f, a, "one-row", ValueError, r"\(1, 8\)", r"\(4, 8\)", **{a: partial(f32, 1, 8)})  # nothing broadcasts

# Kinds of arrays.
for dtype in ("uint8", "int64", "bool", "complex64", "S4", "object", "datetime64[s]", "longdouble"):
    seen = re.escape(repr(np.dtype(dtype)))
    row(R, "x", f"numpy-{dtype}", TypeError, seen, DTYPES, x=partial(make.numpy_dtype, dtype, 4, 8))
row(R, "x", "structured", TypeError, "void|'a'", DTYPES, x=partial(np.zeros, (4, 8), [("a", "f4")]))
row(R, "x", "fp8", TypeError, "float8_e4m3fn", DTYPES, x=partial(fp8, 4, 8))
row(R, "x", "masked", TypeError, "[Mm]asked", x=lambda: np.ma.masked_less(f32(4, 8), 1))
row(R, "out", "masked", TypeError, "[Mm]asked", out=lambda: np.ma.masked_less(f32(4, 8), 1))
row(R, "x", "float", TypeError, "float", "array", x=1.5)
row(R, "x", "numpy-scalar", TypeError, "float32", "array", x=np.float32(1.5))
row(R, "x", "string", TypeError, "str", "array", x="x")
row(R, "x", "memoryview", TypeError, "memoryview", "array", x=lambda: memoryview(f32(4, 8)))
row(R, "x", "type", TypeError, "type", "array", x=np.ndarray)
row(R, "weight", "float", TypeError, "float", "array", weight=1.0)
row(R, "out", "dtype", TypeError, "type", "array", out=np.float32)
for name in ("int64", "bool", "uint8", "complex64", "float8_e4m3fn"):
    row(R, "x", f"torch-{name}", TypeError, f"{name}|DLPack", x=partial(make.torch_dtype, name, 4, 8))
NO_PLAIN_MEMORY = {"sparse_coo": "sparse|storage", "sparse_csr": "sparse|storage", "mkldnn": "mkldnn|storage"}
NO_PLAIN_MEMORY |= {"meta": "meta", "quantised": "qint8", "nested": "[Nn]ested", "zero": "no memory|storage"}
NO_PLAIN_MEMORY |= {"negative": "negative", "conjugate": "complex|conj", "subclass": "Logged"}
for kind, seen in NO_PLAIN_MEMORY.items():
    row(R, "x", kind, TypeError, seen, x=getattr(make, kind))
    row(F, "residual", kind, TypeError, seen, residual=getattr(make, kind), x=partial(t32, 4, 8))
row(R, "x", "parameter-with-grad", RuntimeError, "no_grad", "detach", x=make.parameter)
row(R, "x", "dual", RuntimeError, "forward|dual|tangent", x=make.dual)
row(R, "x", "jax-int32", TypeError, "int32", DTYPES, x=partial(make.jax_dtype, "int32", 4, 8))
row(R, "x", "jax-deleted", RuntimeError, "deleted", x=make.jax_deleted, foreign=True)
row(R, "x", "jax-key", TypeError, "key|PRNG|array", x=make.jax_key, foreign=True)
row(F, "x", "jax-in-place", BufferError, "jax", "inplace=False", x=partial(j32, 4, 8))
row(F, "residual", "jax-in-place", BufferError, "jax", "inplace=False", residual=partial(j32, 4, 8))
for slot, name in [("x", "float64"), ("x", "int32"), ("x", "uint8"), ("weight", "complex64"), ("out", "float64")]:
    n = (8,) if slot == "weight" else (4, 8)
    row(R, slot, f"stub-{name}", TypeError, name, DTYPES, **{slot: partial(stub, "Stub", *n, dtype=name)})
    row(R, slot, f"capsule-{name}", TypeError, name, DTYPES, **{slot: partial(stub, "Capsule", *n, dtype=name)})
row(R, "x", "two-lanes", TypeError, "lanes|float32x2", x=partial(stub, "Stub", 4, 8, lanes=2))
if not fusednorm.info()["cuda"]["available"]:  # where it is, a kernel would run on the stub's host memory
    row(R, "x", "cuda", RuntimeError, "CUDA", x=partial(stub, "Stub", 4, 8, device_type=2), weight=None, out=None)

# Shapes.
row(R, "x", "no-elements", ValueError, r"\(0, 0\)|length 0", x=partial(f32, 0, 0), weight=None, out=None)
row(R, "weight", "shorter-than-long-rows", ValueError, r"\(8,\)", r"\(16,\)", x=partial(f32, 4, 16), out=None)
for kind, maker in {
    "numpy": f32,
    "torch": t32,
    "jax": j32,
    "stub": partial(stub, "Stub"),
}.items():  # results exist by then
    row(
        R,
        "weight",
        f"{kind}-result",
        ValueError,
        r"\(9,\)",
        x=partial(maker, 4, 8),
        weight=partial(f32, 9),
        out=OMITTED,
    )
    pair = {"x": partial(maker, 4, 8), "residual": partial(maker, 4, 8), "inplace": False}
    row(F, "weight", f"{kind}-results", ValueError, r"\(9,\)", weight=partial(f32, 9), **pair)
row(R, "out", "transposed", ValueError, r"\(8, 4\)", r"\(4, 8\)", out=partial(f32, 8, 4))
row(R, "out", "another-dimension", ValueError, r"\(4, 8, 1\)", r"\(4, 8\)", out=partial(f32, 4, 8, 1))
row(R, "out", "0-rows", ValueError, r"\(0, 8\)", r"\(4, 8\)", out=partial(f32, 0, 8))
for value in ([7], (4, 8), [], (8, 8), [-8], [2**70]):
    row(B, "normalized_shape", str(value).replace(" ", ""), ValueError, "last dimension", "8", normalized_shape=value)
for value in (["8"], [8.0], 8.0, "8", None, [None]):
    row(B, "normalized_shape", repr(value), TypeError, "int|sequence|tuple|list", normalized_shape=value)

# Memory that is shared. An output may be exactly its own input.
row(R, "out", "reversed-x", ValueError, "x", OVERLAP, out=lambda x: x[:, ::-1])
row(R, "out", "shifted-x", ValueError, "x", OVERLAP, x=lambda: f32(5, 8)[1:], out=lambda x: x.base.reshape(5, 8)[:4])
row(R, "out", "other-strides", ValueError, "x", OVERLAP, x=partial(f32, 8, 8), out=lambda x: x.T)
row(R, "out", "x-as-float16", ValueError, "x", OVERLAP, out=lambda x: x.view(np.float16)[:, :8])
row(R, "out", "one-element-of-x", ValueError, "x", OVERLAP, x=lambda: f32(15)[:8], out=lambda x: x.base[7:])
row(R, "out", "holds-weight", ValueError, "weight", OVERLAP, weight=lambda out: out[2])
row(R, "out", "torch-view-of-x", ValueError, "x", OVERLAP, x=partial(t32, 4, 8), out=lambda x: x.numpy()[::-1])
row(B, "out", "reversed-input", ValueError, "input", OVERLAP, out=lambda input: input[::-1])
row(B, "out", "holds-weight", ValueError, "weight", OVERLAP, weight=lambda out: out[0])
row(F, "x", "is-residual", ValueError, "residual", OVERLAP, residual=lambda x: x)
row(F, "x", "is-post", ValueError, "post_residual_addition", OVERLAP, post_residual_addition=lambda x: x)
shared = {"post_residual_addition": lambda residual: residual}
row(F, "residual", "is-post", ValueError, "post_residual_addition", OVERLAP, **shared)
row(F, "x", "holds-weight", ValueError, "weight", OVERLAP, weight=lambda x: x[3])
row(F, "out", "is-residual", ValueError, "residual", OVERLAP, out=lambda residual: residual)
row(F, "residual_out", "is-x", ValueError, "x", OVERLAP, residual_out=lambda x: x)
row(F, "residual_out", "is-out", ValueError, "out", OVERLAP, out=_x, residual_out=lambda out: out)
shared = {"residual_out": _x, "weight": lambda residual_out: residual_out[1]}
row(F, "residual_out", "holds-weight", ValueError, "weight", OVERLAP, **shared)
shared = {"residual": lambda: f32(5, 8)[1:], "residual_out": lambda residual: residual.base.reshape(5, 8)[:4]}
row(F, "residual_out", "shifted-residual", ValueError, "residual", OVERLAP, **shared)
row(F, "x", "stride-0", ValueError, "stride|itself|overlap", x=lambda: strided(f32(8), (4, 8), (0, 4)))
row(F, "x", "torch-expanded", ValueError, "stride|itself|overlap", x=lambda: t32(8).expand(4, 8))
row(F, "residual", "stride-0", ValueError, "stride|itself|overlap", residual=lambda: strided(f32(4), (4, 8), (4, 0)))
row(F, "x", "readonly", BufferError, "read-only", x=partial(readonly, 4, 8))
row(F, "residual", "readonly", BufferError, "read-only", residual=partial(readonly, 4, 8))
row(F, "residual", "readonly-with-out", BufferError, "read-only", out=_x, residual=partial(readonly, 4, 8))
row(R, "out", "of-bytes", BufferError, "read-only", out=lambda: np.frombuffer(bytes(128), np.float32).reshape(4, 8))

# Scalars and flags.
NAN, INF = float("nan"), float("inf")
for f in (R, F, B):
    for value in (-1.0, -1e-30, NAN, INF, -INF, 1e39, 10**400):
        row(f, "eps", str(value)[:6], ValueError, "nan|inf|1e|-1|10{400}", "at least 0|negative|finite", eps=value)
    for value in ("1e-6", [1e-6], 1j, b"1"):
        row(f, "eps", type(value).__name__, TypeError, type(value).__name__, "number|float", eps=value)
    row(f, "stream", "on-the-cpu", ValueError, "CPU|cpu", stream=1)
    row(f, "stream", "negative", ValueError, "-1", "negative", stream=-1)
    for value in ("side", True, 1.5, 2j):
        row(f, "stream", repr(value), TypeError, re.escape(repr(value)), "__cuda_stream__", stream=value)
    row(f, "epsilon", "unknown", TypeError, UNKNOWN, keywords={"epsilon": 1e-6})
    count = len(REQUIRED[f]) + 2
    row(f, "", "too-many-positional", TypeError, rf"\b{count}\b", rf"\b{count + 1} positional", extra=(0.0,))
    row(f, "weight", "twice", TypeError, TWICE, extra=(None,), weight=OMITTED, eps=OMITTED, keywords={"weight": None})
for f in (R, F):
    row(f, "eps", "None", TypeError, "None", "number|float", eps=None)
    for value in (NAN, INF, -1e39, -(10**400)):
        row(f, "weight_offset", str(value)[:6], ValueError, "nan|inf|1e|10{400}", "finite", weight_offset=value)
    for value in ("1", None, 1j):
        kind = type(value).__name__
        row(f, "weight_offset", kind, TypeError, kind.removesuffix("Type"), "number|float", weight_offset=value)
    row(f, "weight_offset", "without-weight", ValueError, "weight is None", weight_offset=1.0, weight=None)
    for value in (1, None, "yes"):
        kind = type(value).__name__.removesuffix("Type")
        row(f, "cast_x_before_out_mul", repr(value), TypeError, kind, "bool|True", cast_x_before_out_mul=value)
    junk = {"int": int, "float": float, "np.int32": np.int32, "number": 3.5, "object": object(), "array": f32(1)}
    junk |= {"big-endian": np.dtype(">f4"), "structured": np.dtype([("a", "f4")]), "list": ["float32"]}
    for what, value in (junk | {name: name for name in ("float64", "junk", "", "bf16")}).items():
        row(f, "out_dtype", what or "empty", TypeError, DTYPES, out_dtype=value, out=OMITTED)
    for what in ("float64", "int8", "complex64", "float8_e5m2"):
        value = partial(make.torch_dtype, what)
        row(f, "out_dtype", f"torch-{what}", TypeError, what, DTYPES, out_dtype=value, out=OMITTED)
    row(f, "out_dtype", "fp8", TypeError, "float8", DTYPES, out_dtype=lambda: fp8(1).dtype, out=OMITTED)
    row(f, "out_dtype", "not-outs", ValueError, "float16", "float32", out_dtype="float16", out=_x)
for value in (1, None, "yes"):
    kind = type(value).__name__.removesuffix("Type")
    row(F, "inplace", repr(value), TypeError, kind, "bool|True", inplace=value)
for value in (1, None, b"after_variance", 0.0):
    row(F, "round_sum", repr(value), TypeError, re.escape(repr(value)), "True", "after_variance", round_sum=value)
for value in ("after", "After_variance", "", "true"):
    row(F, "round_sum", f"'{value}'", ValueError, repr(value), "after_variance", round_sum=value)
row(F, "out_dtype", "in-place", ValueError, "float16", "float32", "inplace|out=", out_dtype="float16")
row(
    F,
    "out_dtype",
    "in-place-bf16",
    ValueError,
    "float32",
    "bfloat16",
    "inplace|out=",
    out_dtype="float32",
    x=lambda: f32(4, 8).astype(bf16()),
)

# How arguments are given.
row(R, "x", "missing", TypeError, MISSING, x=OMITTED)
row(F, "residual", "missing", TypeError, MISSING, residual=OMITTED)
row(F, "x", "missing", TypeError, MISSING, x=OMITTED, residual=OMITTED)
row(B, "normalized_shape", "missing", TypeError, MISSING, normalized_shape=OMITTED)
row(R, "x", "twice", TypeError, TWICE, keywords={"x": None})
row(F, "residual", "twice", TypeError, TWICE, keywords={"residual": None})
row(R, "residual", "unknown", TypeError, UNKNOWN, keywords={"residual": None})
row(R, "inplace", "unknown", TypeError, UNKNOWN, keywords={"inplace": True})
row(F, "wieght", "unknown", TypeError, UNKNOWN, keywords={"wieght": None})
row(B, "out_dtype", "unknown", TypeError, UNKNOWN, keywords={"out_dtype": None})
row(B, "weight_offset", "unknown", TypeError, UNKNOWN, keywords={"weight_offset": 0.0})
for value in (0, -1, -(2**40), 2**40, 10**30):
    row(S, "n", str(value), ValueError, str(value)[:4], "1", n=value)
for value in ("2", 1.5, None, [1]):
    row(S, "n", repr(value), TypeError, type(value).__name__.removesuffix("Type"), "int", n=value)
row(S, "", "missing", TypeError, "argument", n=OMITTED, foreign=True)
row(S, "", "two", TypeError, "argument", extra=(2,), foreign=True)
