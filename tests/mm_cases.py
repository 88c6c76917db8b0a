"""Products for the tests: operands, what the reference makes of them, and the contract a second time."""

from __future__ import annotations

import zlib
from fractions import Fraction
from functools import lru_cache
from typing import Any

import helpers
import numpy as np
from helpers import random_rows, rounded, seeded

from fusednorm import _reference

Array = np.ndarray[Any, Any]

LENGTHS = (0, 1, 2, 15, 16, 17, 31, 33, 64, 100, 255, 257, 1023, 1024, 1025, 1040, 2049)
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 17)
COLUMNS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 33)


def choice(sequence: tuple[Any, ...], *key: object) -> Any:
    return sequence[zlib.crc32(repr((helpers.SEED, *key)).encode()) % len(sequence)]


def random_matrix(key: tuple[object, ...], shape: tuple[int, int], dtype: str, kind: str | None = "normal") -> Array:
    if 0 in shape:
        return np.empty(shape, dtype)
    return random_rows(seeded(*key), shape, dtype, kind)


def nearest_float32(exact: Fraction) -> np.float32:
    """To nearest even, without rounding twice: float64 is made odd where it is inexact."""
    near = float(exact)
    if Fraction(near) != exact and not np.float64(near).view(np.int64) & 1:
        near = float(np.nextafter(near, np.inf if exact > Fraction(near) else -np.inf))
    return np.float32(near)


def contract(a: Array, b: Array, bias: Array | None, out_dtype: str) -> Array:
    """In rational numbers, for finite operands whose sums are neither 0 nor too large."""
    (m, length), n = a.shape, b.shape[1]
    out = np.zeros((m, n), np.float32)
    for row in range(m):
        for column in range(n):
            total = np.float32(0)
            for start in range(0, length, 1024):
                lanes = [np.float32(0)] * 16
                for k in range(start, min(length, start + 1024)):
                    product = Fraction(float(a[row, k])) * Fraction(float(b[k, column]))
                    lanes[k % 16] = nearest_float32(product + Fraction(float(lanes[k % 16])))
                while len(lanes) > 1:
                    half = len(lanes) // 2
                    lanes = [low + high for low, high in zip(lanes[:half], lanes[half:], strict=True)]
                total = lanes[0] if start == 0 else total + lanes[0]
            out[row, column] = total if bias is None else total + np.float32(bias[column])
    return rounded(out.astype(np.float64), out_dtype).astype(out_dtype)


@lru_cache(maxsize=32)
def case(m: int, n: int, k: int, a_dtype: str, b_dtype: str, kind: str | None) -> tuple[Array, Array]:
    key = (m, n, k, kind)
    return random_matrix(("a", *key), (m, k), a_dtype, kind), random_matrix(("b", *key), (n, k), b_dtype, kind).T


@lru_cache(maxsize=32)
def expected(
    m: int, n: int, k: int, dtypes: tuple[str, str, str], bias_dtype: str | None, kind: str | None
) -> tuple[Array, Array, Array | None, Array]:
    a, b = case(m, n, k, *dtypes[:2], kind)
    bias = None if bias_dtype is None else random_matrix(("bias", m, n, k), (1, n), bias_dtype, kind)[0]
    return a, b, bias, _reference.mm_dtype(a, b, dtypes[2], bias=bias)
