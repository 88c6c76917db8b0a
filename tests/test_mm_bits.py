"""mm_dtype: every path gives the reference's bits, whatever the other rows and columns and the number of threads; and
the reference gives the contract's, which is stated a second time in rational numbers (mm_cases.py)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES, assert_same_bits, from_float32, seeded
from mm_cases import COLUMNS, LENGTHS, ROWS, case, choice, contract, expected, random_matrix

import fusednorm
from fusednorm import _reference

BATCHES = (*range(1, 65), 100, 256, 1000)


# The contract


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 1024, 1041, 2050])
def test_the_reference_is_the_contract(dtype: str, length: int) -> None:
    for other in DTYPES:
        a, b = random_matrix(("a", length), (2, length), dtype), random_matrix(("b", length), (length, 2), other)
        bias = from_float32(seeded("bias", length).standard_normal(2), other)
        for out_dtype in DTYPES:
            for given in (None, bias):
                actual = _reference.mm_dtype(a, b, out_dtype, bias=given)
                assert_same_bits(actual, contract(a, b, given, out_dtype), (dtype, other, out_dtype))


# The paths


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("k", LENGTHS)
def test_dtypes_and_lengths(mm_path: Any, k: int, a_dtype: str, out_dtype: str) -> None:
    for b_dtype in DTYPES:
        for kind in ("normal", None):
            key = (k, a_dtype, b_dtype, out_dtype, kind)
            m, n = choice(ROWS, "m", *key), choice(COLUMNS, "n", *key)
            bias_dtype = choice((None, *DTYPES), "bias", *key)
            a, b, bias, wanted = expected(m, n, k, (a_dtype, b_dtype, out_dtype), bias_dtype, kind)
            arrays = mm_path.together({"a": a, "b": b, "bias": bias})
            out = mm_path.mm_dtype(arrays["a"], arrays["b"], out_dtype, bias=arrays["bias"])
            assert_same_bits(mm_path.numpy(out), wanted, (m, n, *key, bias_dtype))
            assert mm_path.name == "reference" or out.flags.c_contiguous


@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 3, 5), (3, 0, 5), (0, 0, 0), (3, 2, 0), (1, 300, 40), (300, 1, 40)])
def test_degenerate_shapes(mm_path: Any, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = random_matrix(("a", *shape), (m, k), "float32"), random_matrix(("b", *shape), (k, n), "float32")
    bias = np.arange(n, dtype=np.float32) - 1
    for given in (None, bias):
        out = mm_path.mm_dtype(a, b, bias=given)
        assert_same_bits(mm_path.numpy(out), _reference.mm_dtype(a, b, bias=given), shape)
        if k == 0:
            assert_same_bits(mm_path.numpy(out), np.broadcast_to(0 * bias * 0 if given is None else bias, (m, n)) + 0)


@pytest.mark.parametrize("a_dtype", DTYPES)
def test_dtypes_of_bias(mm_path: Any, a_dtype: str) -> None:
    for b_dtype, out_dtype, bias_dtype in itertools.product(DTYPES, DTYPES, (None, *DTYPES)):
        a, b, bias, wanted = expected(5, 37, 70, (a_dtype, b_dtype, out_dtype), bias_dtype, "normal")
        out = mm_path.mm_dtype(a, b, out_dtype, bias=bias)
        assert_same_bits(mm_path.numpy(out), wanted, (a_dtype, b_dtype, out_dtype, bias_dtype))


def test_spellings_of_out_dtype(cpu_path: Any) -> None:
    a, b = case(3, 5, 70, "float32", "float32", "normal")
    for name in DTYPES:
        wanted = _reference.mm_dtype(a, b, name)
        for spelled in (name, np.dtype(name), np.dtype(name).type):
            assert_same_bits(cpu_path.mm_dtype(a, b, spelled), wanted, name)
            assert_same_bits(cpu_path.mm_dtype(a, b, out_dtype=spelled), wanted, name)
            out = np.full_like(wanted, np.nan)
            assert cpu_path.mm_dtype(a, b, spelled, out=out) is out
            assert_same_bits(out, wanted, name)
        a_of_it, b_of_it = case(3, 5, 70, name, name, "normal")
        for x, y in ((a_of_it, b), (a_of_it, b_of_it)):  # a's, whatever b's
            assert_same_bits(cpu_path.mm_dtype(x, y), _reference.mm_dtype(x, y, name), name)


@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("b_dtype", DTYPES)
def test_a_row_does_not_see_the_batch(cpu_path: Any, b_dtype: str, a_dtype: str) -> None:
    """Each batch is a draw of the rows, so that a row stands in many places of many batches. Blocks, tiles and what is
    packed follow the number of rows, the dtypes and the layout of b."""
    a, b, _, wanted = expected(64, 35, 1041, (a_dtype, b_dtype, "float32"), None, "normal")
    other_layout = np.ascontiguousarray(b)
    assert b.strides != other_layout.strides
    rng = seeded("batches", a_dtype, b_dtype)
    for m in BATCHES:
        rows = rng.integers(len(a), size=m)
        for columns in (b, other_layout) if m < 100 else (b,):
            assert_same_bits(cpu_path.mm_dtype(a[rows], columns, "float32"), wanted[rows], (m, columns.strides))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 100])
def test_a_column_does_not_see_the_others(mm_path: Any, n: int) -> None:
    a, b = case(5, 100, 1030, "float32", "bfloat16" if "bfloat16" in DTYPES else "float16", "normal")
    wanted = expected(5, 100, 1030, ("float32", b.dtype.name, "float32"), None, "normal")[3]
    columns = seeded("columns", n).permutation(100)[:n]
    out = mm_path.mm_dtype(mm_path.array(a), mm_path.array(b[:, columns]))
    assert_same_bits(mm_path.numpy(out), wanted[:, columns], n)


@pytest.mark.parametrize("shape", [(300, 70, 1100), (1, 3000, 600), (2000, 1, 300), (33, 257, 2100)])
def test_threads_decide_no_bit(cpu_path: Any, threads: None, shape: tuple[int, int, int]) -> None:
    a, b = case(*shape, "float32", "float16", "normal")
    fusednorm.set_num_threads(1)
    alone = cpu_path.mm_dtype(a, b)
    rows = seeded(shape).permutation(shape[0])[:3]
    assert_same_bits(alone[rows], _reference.mm_dtype(a[rows], b), shape)
    for count in (2, 3, 8):
        fusednorm.set_num_threads(count)
        assert_same_bits(cpu_path.mm_dtype(a, b), alone, count)
