"""Products on CUDA against the CPU: every pair of dtypes but two of the same 16 bits has the CPU's bits, whatever the
layout; those two have sums of whole numbers right, whatever the layout. Nothing but the result is written.

Through the CUDA driver alone: layouts that torch cannot have are here, and no framework is needed.
"""

from __future__ import annotations

import itertools
from typing import Any

import cuda_arrays
import helpers
import numpy as np
import pytest
from cuda_device import PlainResult
from helpers import DTYPES, assert_same_bits, counting, seeded
from mm_cases import COLUMNS, LENGTHS, ROWS, case, choice, random_matrix
from test_mm_layouts import LAYOUTS, place

import fusednorm
from fusednorm import _reference

helpers.require_cuda()
pytestmark = pytest.mark.usefixtures("cuda")

Array = np.ndarray[Any, Any]
PAIRS = [(a, b) for a, b in itertools.product(DTYPES, DTYPES) if a != b or a == "float32"]
SAME = [(name, name) for name in DTYPES if name != "float32"]
each_pair = pytest.mark.parametrize(("a_dtype", "b_dtype"), PAIRS)


def on_cpu(a: Array, b: Array, bias: Array | None, out_dtype: str) -> Array:
    with counting(fusednorm.info()["cpu"]["path"]):
        result: Array = fusednorm.mm_dtype(a, b, out_dtype, bias=bias)
        assert_same_bits(result[:1], _reference.mm_dtype(a[:1], b, out_dtype, bias=bias), "the CPU")
    return result


def check(a: Array, b: Array, bias: Array | None, out_dtype: str, context: object) -> None:
    arrays = cuda_arrays.to_device({"a": a, "b": b, **({} if bias is None else {"bias": bias})})
    result = PlainResult(on_cpu(a, b, bias, out_dtype))
    result.clear()
    fusednorm.mm_dtype(arrays["a"], arrays["b"], bias=arrays.get("bias"), out=result.array)
    result.check(context)


@each_pair
@pytest.mark.parametrize("k", LENGTHS)
def test_dtypes_and_lengths(k: int, a_dtype: str, b_dtype: str) -> None:
    for out_dtype, kind in itertools.product(DTYPES, ("normal", None)):
        key = (k, a_dtype, b_dtype, out_dtype, kind, "cuda")
        m, n = choice(ROWS, "m", *key), choice(COLUMNS, "n", *key)
        bias_dtype = choice((None, *DTYPES), "bias", *key)
        a, b = case(m, n, k, a_dtype, b_dtype, kind)
        bias = None if bias_dtype is None else random_matrix(("bias", m, n, k), (1, n), bias_dtype, kind)[0]
        check(a, b, bias, out_dtype, (m, n, *key, bias_dtype))


SHAPES = [(1, 300, 5000), (300, 1, 5000), (33, 257, 2100), (130, 129, 1030), (16, 16, 1024), (8, 1000, 4096)]
SHAPES += [(513, 100, 333), (64, 2050, 70), (1030, 24, 1500), (5, 7, 4999)]


@each_pair
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], a_dtype: str, b_dtype: str) -> None:
    a, b = case(*shape, a_dtype, b_dtype, "normal")
    bias = random_matrix(("bias", *shape), (1, shape[1]), "float32")[0]
    for other, out_dtype, given in ((b, "float32", None), (np.ascontiguousarray(b), choice(DTYPES, *shape), bias)):
        check(a, other, given, out_dtype, (shape, other.strides))


def whole_numbers(shape: tuple[int, int], dtype: str, *key: object) -> Array:
    """From -8 to 8 and not 0: any order of adding them gives the same, and no sum is -0."""
    rng = seeded("whole", shape, *key)
    return (rng.integers(1, 9, shape) * rng.choice([-1, 1], shape)).astype(np.float32).astype(dtype)


@pytest.mark.parametrize(("a_dtype", "b_dtype"), [("float32", "float32"), ("float32", DTYPES[-1]), *SAME])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, a_dtype: str, b_dtype: str) -> None:
    for other in LAYOUTS:
        m, n = choice((*ROWS, 70), layout, other), choice((*COLUMNS, 520), layout, other)
        k = choice((1, 16, 39, 64, 1100), layout, other)
        out_layout, out_dtype = (choice(names, layout, other, a_dtype) for names in (tuple(LAYOUTS), DTYPES))
        context = (m, n, k, layout, other, out_layout, out_dtype)
        if (a_dtype, b_dtype) in SAME:
            a, b = whole_numbers((m, k), a_dtype, "a"), whole_numbers((k, n), b_dtype, "b")
            sums = (a.astype(np.float64) @ b.astype(np.float64)) + 1.5
            bias, wanted = np.full(n, 1.5, np.float32), helpers.from_float32(sums, out_dtype)
        else:
            a, b = case(m, n, k, a_dtype, b_dtype, "normal")
            bias = random_matrix(("bias", m, n, k), (1, n), "float32")[0]
            wanted = on_cpu(a, b, bias, out_dtype)
        placed = {"a": place(a, layout)[0], "b": place(b, other)[0], "bias": np.repeat(bias[::-1], 2)[::2][::-1]}
        out, raw = place(np.full(wanted.shape, np.nan, wanted.dtype), out_layout)
        arrays = cuda_arrays.to_device({**placed, "out": out})
        given = arrays.pop("out")
        assert fusednorm.mm_dtype(**arrays, out=given) is given
        given.download()
        assert_same_bits(np.ascontiguousarray(out), wanted, context)
        assert raw.tobytes() == place(wanted, out_layout)[1].tobytes(), f"{context}: bytes around out were written"
        for name, array in arrays.items():
            before = placed[name].tobytes()
            assert array.download().tobytes() == before, f"{context}: {name} was written"


@pytest.mark.parametrize(("a_dtype", "b_dtype"), [("float32", "float32"), *SAME])
def test_broadcast_operands(a_dtype: str, b_dtype: str) -> None:
    a, b = whole_numbers((5, 100), a_dtype, "a"), whole_numbers((100, 17), b_dtype, "b")
    for x, y in [
        (np.broadcast_to(a[:1], a.shape), b),
        (np.broadcast_to(a[:, :1], a.shape), b),
        (a, np.broadcast_to(b[:, :1], b.shape)),
        (a, np.broadcast_to(b[:1], b.shape)),
        (np.broadcast_to(a[0, 0], a.shape), np.broadcast_to(b[0, 0], b.shape)),
        (a, a.T),
    ]:
        check(x, y, None, "float32", (x.strides, y.strides))


@pytest.mark.large
@pytest.mark.parametrize(("a_dtype", "b_dtype"), [("float32", "float32"), *SAME])
def test_64_bit_offsets(a_dtype: str, b_dtype: str) -> None:
    """Rows and columns further apart than 2^32 bytes, within 8 GiB that nobody touches otherwise."""
    far = 2**32 + 32
    try:
        raw = cuda_arrays.room(np.zeros(2 * far + 4096, np.uint8))
    except (MemoryError, RuntimeError) as error:
        pytest.skip(f"no room: {error}")
    values = {"a": whole_numbers((3, 4), a_dtype, "a"), "b": whole_numbers((4, 3), b_dtype, "b")}
    wanted = values["a"].astype(np.float64) @ values["b"].astype(np.float64)
    values["out"] = np.full((3, 3), np.nan, np.float32)
    rows, columns = [(far, 4), (-far, 4)], [(4, far), (4, -far)]
    for role, layouts in (("a", rows), ("b", columns), ("out", rows + columns)):
        for strides in layouts:
            arrays = cuda_arrays.to_device({name: array.copy() for name, array in values.items()})
            start = 1024 + (2 * far if min(strides) < 0 else 0)
            arrays[role] = raw.view(values[role].dtype.name, values[role].shape, strides, start)
            arrays[role].write(values[role])
            fusednorm.mm_dtype(arrays["a"], arrays["b"], out=arrays["out"])
            assert_same_bits(arrays["out"].read(), wanted.astype(np.float32), (role, strides))
