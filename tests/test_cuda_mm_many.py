"""Many rows, an operand in fp32, on CUDA (csrc/cuda/mm_fma_many_sm90a.cu): the CPU's bits, whichever kernel is taken.

Lengths lie around a step of 16, a stage of 64 and a chunk of 1024 k; rows and columns around a tile's 32 and 64, and
around what the kernel for few rows takes. Rows that do not begin at multiples of 16 bytes go to another kernel.
"""

from __future__ import annotations

import itertools
from typing import Any

import cuda_arrays
import helpers
import numpy as np
import pytest
from helpers import DTYPES, assert_same_bits
from mm_cases import choice, random_matrix
from test_cuda_mm_few import check, check_rows_apart, check_specials, on_cpu, operands
from test_mm_layouts import LAYOUTS, place

import fusednorm

helpers.require_cuda()
pytestmark = pytest.mark.usefixtures("cuda")

Array = np.ndarray[Any, Any]

ROWS = (16, 17, 31, 32, 33, 48, 64, 65, 100)
COLUMNS = (17, 24, 32, 40, 63, 64, 65, 96, 130)
STEPS = (1, 8, 15, 16, 17, 24, 32, 40, 48, 56, 64, 72, 88, 104, 120, 128)
CHUNKS = (1000, 1016, 1024, 1032, 1040, 1064, 1088, 2048, 2056, 2880, 7168, 8200, 9224, 17416)
# What an H200 takes: in fp32 tiles of 32 x 32 by clusters of 8, 4, 2 and 1; in 16 bits some of 32 x 64.
CLUSTERS = [(17, 256, 7168), (128, 384, 7168), (250, 256, 7168), (1100, 250, 3080)]
CLUSTERS += [(64, 250, 7160), (256, 127, 4096), (500, 1500, 2056), (250, 4090, 1032)]
# More tiles than fit on the device at once: with and without clusters, whose blocks have several chunks, or none.
ROUNDS = [(4101, 260, 1032), (2050, 900, 264), (600, 2050, 2056), (70, 20011, 136), (32, 992, 12296), (992, 32, 16392)]
# That end within two lanes, a step and a unit of 16 bytes, which only rows apart may.
ODD = (1, 3, 15, 17, 20, 47, 61, 65, 1001, 1023, 1025, 1090, 2063)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_dtype
@pytest.mark.parametrize("k", STEPS + CHUNKS)
def test_lengths(k: int, dtype: str) -> None:
    for m in ROWS:
        kind = choice(("normal", None), "kind", m, k, dtype)
        n = choice(COLUMNS, "n", m, k, dtype, kind)
        a, b, bias = operands(m, n, k, dtype, kind, "many")
        out_dtype = choice(DTYPES, "out", m, k, dtype, kind)
        check(a, b, bias, out_dtype, (m, n, k, dtype, kind, out_dtype))
        if kind:
            x, y = np.ascontiguousarray(b.T), np.ascontiguousarray(a).T
            given = None if bias is None else random_matrix(("bias", k, m), (1, m), "float32")[0]
            check(x, y, given, out_dtype, (n, m, k, "turned", dtype, out_dtype))


def at_16_bytes(matrix: Array) -> Array:
    """Its rows begin at multiples of 16 bytes; NaN lies between them."""
    unit = 16 // matrix.itemsize
    wide = np.full((len(matrix), -(-matrix.shape[1] // unit) * unit + unit), np.nan, matrix.dtype)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


@each_dtype
@pytest.mark.parametrize("k", ODD)
def test_odd_lengths(k: int, dtype: str) -> None:
    for m, n in itertools.product((17, 33, 100), (24, 65, 130)):
        a, b, bias = operands(m, n, k, dtype, "normal", "odd")
        check(at_16_bytes(a), at_16_bytes(b.T).T, bias, choice(DTYPES, "odd", m, n, k), (m, n, k, dtype))
        least = {"float32": -1e-30, "bfloat16": -1e-30, "float16": -6e-8}[dtype]
        a, b = np.full((m, k), least, np.float32).astype(dtype), np.full((n, k), 1e-40, np.float32)
        check(at_16_bytes(a), at_16_bytes(b).T, None, "float32", (m, n, k, dtype, "sign of zero"))


@each_dtype
@pytest.mark.parametrize("shape", CLUSTERS + ROUNDS, ids=str)
def test_clusters_and_rounds(shape: tuple[int, int, int], dtype: str) -> None:
    a, b, bias = operands(*shape, dtype, "normal", "clusters")
    check(a, b, bias, choice(DTYPES, "clusters", *shape), (shape, dtype))


@each_dtype
@pytest.mark.parametrize("k", [8, 16, 40, 64, 72, 1000, 1024, 1032, 1040, 2048, 7176])
def test_the_sign_of_zero(k: int, dtype: str) -> None:
    """Products that underflow to -0 alone: -0, and +0 where padding added +0 to lanes of the last chunk, no further."""
    least = {"float32": -1e-30, "bfloat16": -1e-30, "float16": -6e-8}[dtype]
    for m, n in ((17, 33), (40, 256), (300, 20)):
        a, b = np.full((m, k), least, np.float32).astype(dtype), np.full((k, n), 1e-40, np.float32, order="F")
        minus = on_cpu(a, b, None, "float32")
        assert (minus == 0).all()
        if k % 16 == 0:
            assert np.signbit(minus).all()
        check(a, b, None, "float32", (m, n, k, dtype))


@each_dtype
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -0.0])
def test_specials(value: float, dtype: str) -> None:
    check_specials(((20, 33, 1032), (33, 256, 7168), (70, 40, 2056)), value, dtype)


@each_dtype
def test_rows_apart(dtype: str) -> None:
    check_rows_apart(((20, 33, 1032), (50, 140, 2880), (130, 64, 264)), dtype)


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results(layout: str, dtype: str) -> None:
    """In every layout, with neighbours written together and not; no byte around them changes."""
    for (m, n, k), out_dtype in itertools.product(((17, 40, 264), (64, 128, 1032), (130, 71, 72)), DTYPES):
        a, b, bias = operands(m, n, k, dtype, "normal", "results")
        wanted = on_cpu(a, b, bias, out_dtype)
        out, raw = place(np.full(wanted.shape, np.nan, wanted.dtype), layout)
        arrays = cuda_arrays.to_device({"a": a, "b": b, "out": out, **({} if bias is None else {"bias": bias})})
        given = arrays.pop("out")
        fusednorm.mm_dtype(**arrays, out=given)
        given.download()
        assert_same_bits(np.ascontiguousarray(out), wanted, (m, n, k, layout, out_dtype))
        assert raw.tobytes() == place(wanted, layout)[1].tobytes(), (m, n, k, layout, out_dtype)


@each_dtype
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_results_apart(out_dtype: str, dtype: str) -> None:
    """Rows of out at multiples of 16 bytes, whose neighbours are written together; what lies between stays."""
    for m, n, k in ((17, 40, 264), (64, 121, 1032), (130, 71, 72), (500, 1504, 2056)):
        a, b, bias = operands(m, n, k, dtype, "normal", "apart")
        wanted = on_cpu(a, b, bias, out_dtype)
        out = at_16_bytes(np.full(wanted.shape, np.nan, wanted.dtype))
        arrays = cuda_arrays.to_device({"a": a, "b": b, "out": out, **({} if bias is None else {"bias": bias})})
        given = arrays.pop("out")
        fusednorm.mm_dtype(**arrays, out=given)
        given.download()
        assert_same_bits(np.ascontiguousarray(out), wanted, (m, n, k, out_dtype))
        root = cuda_arrays.root_of(out)
        assert np.isnan(root[:, n:].astype(np.float32)).all(), (m, n, k, out_dtype)
