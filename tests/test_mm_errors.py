"""Wrong products: each raises exactly one exception whose text helps, and leaves every byte of every argument alone.

The checks of rows are those of test_errors.py; so is the form of the table (wrong_calls.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import array_makers as make
import numpy as np
import pytest
from array_makers import f32, fp8, j32, readonly, strided, stub, t32
from wrong_calls import DTYPES, MISSING, OMITTED, OVERLAP, TWICE, UNKNOWN, Row, check_wrong_call, resolve

import fusednorm

M, G = "mm_dtype", "router_logits"
REQUIRED = {M: ["a", "b"], G: ["x", "gate_weight", "routing_method"]}
_out = partial(f32, 4, 3)
RIGHT: dict[str, dict[str, Any]] = {
    M: {"a": partial(f32, 4, 8), "b": partial(f32, 8, 3), "bias": partial(f32, 3), "out": _out},
    G: {"x": partial(f32, 4, 8), "gate_weight": partial(f32, 3, 8), "routing_method": "DeepSeekV3"},
}
SHAPES = {(M, "a"): (4, 8), (M, "b"): (8, 3), (M, "bias"): (3,), (M, "out"): (4, 3)}
SHAPES |= {(G, "x"): (4, 8), (G, "gate_weight"): (3, 8), (G, "bias"): (3,)}
ROWS: list[Row] = []


def row(
    function: str, argument: str, what: str, exception: type[BaseException], *patterns: str, **changes: Any
) -> None:
    special = {name: changes.pop(name) for name in ("extra", "keywords", "foreign") if name in changes}
    right, required = RIGHT[function], REQUIRED[function]
    ROWS.append(Row(function, argument, what, exception, patterns, changes, right, required, ["out_dtype"], **special))


# What is wrong wherever an array is expected.
for (f, a), n in SHAPES.items():
    row(f, a, "float64", TypeError, "float64", DTYPES, **{a: partial(f32, *n, dtype=np.float64)})
    row(f, a, "int32", TypeError, "int32", DTYPES, **{a: partial(f32, *n, dtype=np.int32)})
    row(f, a, "big-endian", TypeError, ">f4|big.endian|byte.order", **{a: partial(f32, *n, dtype=">f4")})
    row(f, a, "list", TypeError, "list", "array", **{a: partial(list, [1.0] * 8)})
    row(f, a, "0-d", ValueError, r"\(\)|dimension", **{a: partial(np.array, 1.5, np.float32)})
    row(f, a, "torch-float64", TypeError, "float64", DTYPES, **{a: partial(make.torch_dtype, "float64", *n)})
    row(f, a, "requires-grad", RuntimeError, "no_grad", "detach", **{a: partial(t32, *n, requires_grad=True)})
    row(f, a, "fake-tensor", TypeError, "FakeTensor", **{a: partial(make.fake_tensor, *n)})
    row(f, a, "fp8", TypeError, "float8", DTYPES, **{a: partial(fp8, *n)})
    row(f, a, "masked", TypeError, "[Mm]asked", **{a: partial(np.ma.masked_all, n, np.float32)})
    if a in REQUIRED[f]:
        row(f, a, "none", TypeError, "None", "array", **{a: None})
        row(f, a, "missing", TypeError, MISSING, **dict.fromkeys(REQUIRED[f][REQUIRED[f].index(a) :], OMITTED))
    if a == "out":
        row(f, a, "readonly", BufferError, "read-only", **{a: partial(readonly, *n)})
        row(f, a, "jax", BufferError, "jax", "immutable", **{a: partial(j32, *n)})
        row(f, a, "stride-0", ValueError, "stride|itself|overlap", **{a: partial(strided, f32(8), n, (0, 4))})
        row(f, a, "rows-overlap", ValueError, "stride|itself|overlap", **{a: partial(strided, f32(16), n, (4, 4))})
        row(f, a, "capsule-readonly", BufferError, "read-only", **{a: partial(stub, "Capsule", *n, flags=1)})
for kind, seen in {
    "sparse_coo": "sparse|storage",
    "meta": "meta",
    "negative": "negative",
    "subclass": "Logged",
}.items():
    row(M, "a", kind, TypeError, seen, a=getattr(make, kind))
row(M, "a", "dual", RuntimeError, "forward|dual|tangent", a=make.dual)
if not fusednorm.info()["cuda"]["available"]:  # where it is, a kernel would run on the stub's host memory
    row(M, "a", "cuda", RuntimeError, "CUDA", a=partial(stub, "Stub", 4, 8, device_type=2), bias=None, out=None)

# Shapes.
for shape in ((7, 3), (3, 8), (0, 3)):
    seen = re.escape(str(shape))
    row(M, "b", f"{shape}".replace(" ", ""), ValueError, seen, r"\(4, 8\)", "8", b=partial(f32, *shape), bias=None)
    row(M, "b", f"new-{shape}".replace(" ", ""), ValueError, seen, r"\(4, 8\)", b=partial(f32, *shape), out=OMITTED)
for shape in ((8,), (1, 8, 3), (2, 2, 2)):
    for given in (OMITTED, _out):
        what = f"{len(shape)}-dimensions-{'new' if given is OMITTED else 'given'}-{shape[0]}"
        row(M, "b", what, ValueError, "dimension", "2", b=partial(f32, *shape), out=given)
        row(M, "a", what, ValueError, "dimension", "2", a=partial(f32, *shape), out=given)
for shape in ((4,), (1,), (3, 1), (1, 3), (0,)):
    what = str(shape).replace(" ", "")
    seen = "dimension" if len(shape) == 2 else re.escape(str(shape))
    row(M, "bias", what, ValueError, seen, bias=partial(f32, *shape))
    row(G, "bias", what, ValueError, re.escape(str(shape)), r"\(3,\)", bias=partial(f32, *shape))
for shape in ((3, 4), (4, 4), (5, 3), (12,), (4, 3, 1), (0, 3)):
    seen = re.escape(str(shape)) if len(shape) == 2 else "dimension"
    row(M, "out", str(shape).replace(" ", ""), ValueError, seen, out=partial(f32, *shape))
for maker, kind in ((f32, "numpy"), (t32, "torch"), (j32, "jax"), (partial(stub, "Stub"), "stub")):  # a result exists
    row(M, "bias", f"{kind}-result", ValueError, r"\(9,\)", a=partial(maker, 4, 8), bias=partial(f32, 9), out=OMITTED)
for shape in ((8, 3), (3, 7), (3, 0)):
    row(
        G,
        "gate_weight",
        str(shape).replace(" ", ""),
        ValueError,
        re.escape(str(shape)),
        r"\(N, 8\)",
        gate_weight=partial(f32, *shape),
    )
for shape in ((8,), (1, 3, 8)):
    row(
        G,
        "gate_weight",
        f"{len(shape)}-dimensions",
        ValueError,
        re.escape(str(shape)),
        r"\(N, 8\)",
        gate_weight=partial(f32, *shape),
    )

# Memory that is shared.
row(
    M,
    "out",
    "is-a",
    ValueError,
    r"\ba\b",
    OVERLAP,
    a=partial(f32, 4, 4),
    b=partial(f32, 4, 4),
    bias=None,
    out=lambda a: a,
)
row(
    M,
    "out",
    "is-b",
    ValueError,
    r"\bb\b",
    OVERLAP,
    a=partial(f32, 4, 4),
    b=partial(f32, 4, 4),
    bias=None,
    out=lambda b: b,
)
row(M, "out", "holds-bias", ValueError, "bias", OVERLAP, bias=lambda out: out[2])
row(
    M,
    "out",
    "one-element-of-a",
    ValueError,
    r"\ba\b",
    OVERLAP,
    a=lambda out: strided(out.base, (4, 8), (0, 0)),
    out=lambda: f32(2, 4, 3)[0],
)
row(
    M,
    "out",
    "torch-view-of-a",
    ValueError,
    r"\ba\b",
    OVERLAP,
    a=partial(t32, 4, 4),
    b=partial(f32, 4, 4),
    bias=None,
    out=lambda a: a.numpy()[::-1],
)

# Flags and dtypes.
for value in (1, "side", True):
    seen = "CPU" if value == 1 and value is not True else "__cuda_stream__"
    row(M, "stream", repr(value), ValueError if seen == "CPU" else TypeError, seen, stream=value)
for f in (M, G):
    for what, value in {"int": int, "number": 3.5, "float64": "float64", "empty": "", "list": ["float32"]}.items():
        row(f, "out_dtype", what, TypeError, DTYPES, out_dtype=value, **({"out": OMITTED} if f == M else {}))
row(M, "out_dtype", "not-outs", ValueError, "float16", "float32", out_dtype="float16")
row(M, "out_dtype", "twice", TypeError, TWICE, extra=("float32",), keywords={"out_dtype": "float32"})
row(M, "", "too-many-positional", TypeError, r"\b3\b", r"\b4 positional", extra=(None, None))
row(M, "beta", "unknown", TypeError, UNKNOWN, keywords={"beta": 1.0})
for value in ("Default ", "deepseekv3", "", "Unspecified", 9, -1, 2**70):
    row(G, "routing_method", repr(value), ValueError, re.escape(repr(value)), r"DeepSeekV3 \(2\)", routing_method=value)
for value in (None, True, 2.0, b"Default", ["Default"]):
    row(G, "routing_method", repr(value), TypeError, re.escape(repr(value)), r"DeepSeekV3 \(2\)", routing_method=value)


@pytest.fixture(autouse=True)
def _dual_level() -> Iterator[None]:
    yield
    make.leave_dual_level()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_wrong_product(row: Row) -> None:
    check_wrong_call(row)


def test_the_table_is_complete() -> None:
    assert not [name for name, count in Counter(row.id for row in ROWS).items() if count > 1]
    for slot in SHAPES:
        assert {TypeError, ValueError} <= {row.exception for row in ROWS if (row.function, row.argument) == slot}, slot


# The nearest right call of many rows.
RIGHT_CALLS: list[tuple[str, str, dict[str, Any]]] = [
    (M, "as it is", {}),
    (G, "as it is", {}),
    (M, "no out", {"out": OMITTED}),
    (M, "out None", {"out": None}),
    (M, "bias None", {"bias": None}),
    (M, "stream None", {"stream": None}),
    (M, "out_dtype is outs", {"out_dtype": "float32"}),
    (M, "read-only inputs", {"a": partial(readonly, 4, 8), "b": partial(readonly, 8, 3), "bias": partial(readonly, 3)}),
    (M, "transposed out", {"out": lambda: f32(3, 4).T}),
    (M, "out between a", {"a": lambda: f32(8, 8)[::2], "out": lambda a: a.base.reshape(8, 8)[1::2, :3]}),
    (M, "a is b", {"a": partial(f32, 8, 8), "b": lambda a: a, "bias": None, "out": OMITTED}),
    (M, "no rows", {"a": partial(f32, 0, 8), "out": OMITTED}),
    (M, "no length", {"a": partial(f32, 4, 0), "b": partial(f32, 0, 3)}),
    (M, "out of size 0 twice", {"a": partial(f32, 0, 8), "out": lambda: strided(f32(3), (0, 3), (0, 0))}),
    (M, "torch without grad", {"a": partial(t32, 4, 8), "b": partial(t32, 8, 3), "out": OMITTED}),
    (M, "torch out for ndarrays", {"out": partial(t32, 4, 3)}),
    (M, "jax", {"a": partial(j32, 4, 8), "b": partial(j32, 8, 3), "out": OMITTED}),
    (M, "stub", {"a": partial(stub, "Stub", 4, 8), "out": OMITTED}),
    (M, "read-only capsule", {"b": partial(stub, "Capsule", 8, 3, flags=1)}),
    (G, "three dimensions", {"x": partial(f32, 2, 3, 8)}),
    (G, "one row", {"x": partial(f32, 8)}),
    (G, "no rows", {"x": partial(f32, 2, 0, 8)}),
    (G, "out_dtype", {"out_dtype": "float16"}),
    (G, "jax", {"x": partial(j32, 2, 4, 8), "gate_weight": partial(j32, 3, 8)}),
    (G, "stub", {"x": partial(stub, "Stub", 4, 8)}),
]


@pytest.mark.parametrize(
    ("name", "changes"), [(f, c) for f, _, c in RIGHT_CALLS], ids=[f"{f}-{w}" for f, w, _ in RIGHT_CALLS]
)
def test_right_product(name: str, changes: dict[str, Any]) -> None:
    values = {key: value for key, value in resolve({**RIGHT[name], **changes}).items() if value is not OMITTED}
    positional = [values.pop(key) for key in REQUIRED[name]]
    result = getattr(fusednorm, name)(*positional, **values)
    columns = positional[1].shape[1 if name == M else 0]
    assert tuple(result.shape) == (*positional[0].shape[:-1], columns)
    if values.get("out") is None:
        assert type(result) is type(positional[0])
    else:
        assert result is values["out"]


def test_grad_mode_decides() -> None:
    torch = make.torch()
    weight = torch.nn.Parameter(t32(3, 8))
    with pytest.raises(RuntimeError, match="no_grad"):
        fusednorm.mm_dtype(t32(4, 8), weight.T)
    with torch.no_grad():
        assert not fusednorm.mm_dtype(t32(4, 8), weight.T).requires_grad
        assert fusednorm.mm_dtype(weight, t32(8, 2)).shape == (3, 2)
    with torch.inference_mode():
        assert fusednorm.router_logits(t32(4, 8), weight, 2).shape == (4, 3)


def test_torch_is_told_that_out_was_written() -> None:
    out = t32(4, 3)
    version = out._version
    assert fusednorm.mm_dtype(t32(4, 8), t32(8, 3), out=out) is out
    assert out._version == version + 1


@pytest.mark.parametrize("name", [M, G])
def test_a_result_that_no_memory_holds(name: str) -> None:
    wide = np.broadcast_to(np.float32(1), (2**40, 1))
    arguments = {M: (wide, wide.T), G: (wide, wide, 2)}[name]
    with pytest.raises(ValueError, match=f"{name}: the result would have more elements than memory could hold"):
        getattr(fusednorm, name)(*arguments)
