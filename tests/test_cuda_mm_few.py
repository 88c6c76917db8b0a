"""Few tokens by fp32 weights on CUDA (csrc/cuda/mm_fma_few.cu): the CPU's bits, whichever kernel takes the product.

Lengths lie around a step of 16, a stage of 256 and a chunk of 1024 k, and around what a cluster and a block take.
Lengths that are no whole number of 16 bytes, and layouts that are not along k, go to another kernel with the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import cuda_arrays
import helpers
import numpy as np
import pytest
from cuda_device import PlainResult
from helpers import DTYPES, assert_same_bits, counting
from mm_cases import choice, random_matrix

import fusednorm

helpers.require_cuda()
pytestmark = pytest.mark.usefixtures("cuda")

Array = np.ndarray[Any, Any]
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17)
STEPS = (1, 4, 8, 15, 16, 17, 24, 248, 256, 264)
CHUNKS = (1000, 1016, 1024, 1028, 1032, 1288, 2048, 2052, 2056, 2880, 7168, 8192, 8200, 9216, 66560)
LENGTHS = STEPS + CHUNKS
WEIGHTS = (1, 3, 8, 9, 16, 33, 100)
# Enough weights that a block does all of K: as many as multiprocessors have tiles, of whole blocks and not.
MANY = [(1, 2200, 2056), (2, 4096, 1032), (4, 2301, 3080), (8, 4290, 2064), (16, 3400, 2320), (11, 4233, 1288)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def on_cpu(a: Array, b: Array, bias: Array | None, out_dtype: str) -> Array:
    with counting(fusednorm.info()["cpu"]["path"]):
        result: Array = fusednorm.mm_dtype(a, b, out_dtype, bias=bias)
    return result


def check(a: Array, b: Array, bias: Array | None, out_dtype: str, context: object) -> None:
    arrays = cuda_arrays.to_device({"a": a, "b": b, **({} if bias is None else {"bias": bias})})
    result = PlainResult(on_cpu(a, b, bias, out_dtype))
    for constant in (False, True):
        result.clear()
        with fusednorm.weights_are_constant(constant):
            fusednorm.mm_dtype(arrays["a"], arrays["b"], bias=arrays.get("bias"), out=result.array)
        result.check((*((context,) if not isinstance(context, tuple) else context), constant))


def operands(m: int, n: int, k: int, dtype: str, kind: str | None, *key: object) -> tuple[Array, Array, Array | None]:
    bias_dtype = choice((None, *DTYPES), "bias", m, n, k, dtype, kind, *key)
    a, b = (
        random_matrix((name, m, n, k, kind, *key), shape, of, kind)
        for name, shape, of in (("a", (m, k), dtype), ("b", (n, k), "float32"))
    )
    bias = None if bias_dtype is None else random_matrix(("bias", m, n, k), (1, n), bias_dtype, kind)[0]
    return a, b.T, bias


@each_dtype
@pytest.mark.parametrize("k", LENGTHS)
def test_lengths(k: int, dtype: str) -> None:
    for m in TOKENS:
        kind = choice(("normal", None), "kind", m, k, dtype)
        n = choice(WEIGHTS, "n", m, k, dtype, kind)
        a, b, bias = operands(m, n, k, dtype, kind)
        out_dtype = choice(DTYPES, "out", m, k, dtype, kind)
        check(a, b, bias, out_dtype, (m, n, k, dtype, kind, out_dtype))
        if kind:  # the weights are a, the tokens b
            x, y = np.ascontiguousarray(b.T), np.ascontiguousarray(a).T
            given = None if bias is None else random_matrix(("bias", k, m), (1, m), "float32")[0]
            check(x, y, given, out_dtype, (n, m, k, "turned", dtype, out_dtype))


@each_dtype
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_many_weights(shape: tuple[int, int, int], dtype: str) -> None:
    a, b, bias = operands(*shape, dtype, "normal", "many")
    check(a, b, bias, choice(DTYPES, "many", *shape), (shape, dtype))


@each_dtype
def test_gates(dtype: str) -> None:
    for (n, k), m in itertools.product(((256, 7168), (384, 7168), (128, 4096), (32, 2880)), (1, 2, 4, 8, 16)):
        a, b, bias = operands(m, n, k, dtype, "normal", "gate")
        check(a, b, bias, "float32", (m, n, k, dtype))


@each_dtype
@pytest.mark.parametrize("k", [8, 16, 1000, 1024, 1032, 2048, 7176])
def test_the_sign_of_zero(k: int, dtype: str) -> None:
    """Products that underflow to -0 alone: -0, and +0 where padding added +0 to lanes of the last chunk."""
    least = {"float32": -1e-30, "bfloat16": -1e-30, "float16": -6e-8}[dtype]
    for m, n in ((1, 9), (3, 40), (8, 17), (16, 256)):
        a, b = np.full((m, k), least, np.float32).astype(dtype), np.full((k, n), 1e-40, np.float32, order="F")
        minus = on_cpu(a, b, None, "float32")
        assert (minus == 0).all()
        if k % 16 == 0:
            assert np.signbit(minus).all()
        check(a, b, None, "float32", (m, n, k, dtype))
        check(-a, b, np.full(n, -0.0, np.float32), "bfloat16" if "bfloat16" in DTYPES else "float16", (m, n, k, "bias"))


def check_specials(shapes: Sequence[tuple[int, int, int]], value: float, dtype: str) -> None:
    """One in a row of a and one in a column of b, at the first, a middle and the last k."""
    for m, n, k in shapes:
        a, b, bias = operands(m, n, k, dtype, "normal", "specials")
        for at in (0, k // 2, k - 1):
            x, y = a.copy(), b.copy(order="F")
            x[m // 2, at] = value
            y[k - 1 - at, n // 3] = value
            wanted = on_cpu(x, y, bias, "float32")
            arrays = cuda_arrays.to_device({"a": x, "b": y})
            given = {} if bias is None else {"bias": cuda_arrays.to_device({"": bias})[""]}
            out = cuda_arrays.to_device({"": np.full((m, n), 7, np.float32)})[""]
            fusednorm.mm_dtype(arrays["a"], arrays["b"], out=out, **given)
            actual = np.array(out.download(), order="C")
            assert (np.isnan(actual) == np.isnan(wanted)).all(), (m, n, k, at)
            assert_same_bits(
                np.where(np.isnan(actual), 0, actual), np.where(np.isnan(wanted), 0, wanted), (m, n, k, at)
            )


def check_rows_apart(shapes: Sequence[tuple[int, int, int]], dtype: str) -> None:
    """NaN between the rows: by 16 bytes, which the kernel takes, and by one element, which it does not."""
    for (m, n, k), units in itertools.product(shapes, (0, 1, 3)):
        a, b, bias = operands(m, n, k, dtype, "normal", "apart")
        placed = []
        for matrix in (a, b.T):
            gap = units * 16 // matrix.itemsize if units < 3 else 1
            wide = np.full((len(matrix), k + gap), np.nan, matrix.dtype)
            wide[:, :k] = matrix
            placed.append(wide[:, :k])
        check(placed[0], placed[1].T, bias, "float32", (m, n, k, dtype, units))
        check(placed[0][::-1], placed[1][::-1].T, bias, "float32", (m, n, k, dtype, units, "backwards"))
        check(
            placed[0][:1].repeat(m, 0),
            np.broadcast_to(placed[1][:1], (n, k)).T,
            bias,
            "float32",
            (m, n, k, "broadcast"),
        )


@each_dtype
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -0.0])
def test_specials(value: float, dtype: str) -> None:
    check_specials(((1, 9, 1032), (3, 256, 7168), (16, 40, 2056)), value, dtype)


@each_dtype
def test_rows_apart(dtype: str) -> None:
    check_rows_apart(((1, 9, 1032), (5, 40, 2880), (16, 33, 264)), dtype)
