"""mm_dtype: numbers that show in which order terms are added, and what infinities, NaNs and signed zeros become."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from helpers import DTYPES, assert_same_bits, seeded
from mm_cases import case, contract

from fusednorm import _reference

Array = np.ndarray[Any, Any]

LARGE, SMALL = 2.0**15, 2.0**-10  # of every dtype; a sum of both is LARGE in float32
# k of LARGE, of -LARGE and of SMALL, and whether SMALL is left.
ORDERS = [
    ((0, 16, 32), True),  # one lane: in order
    ((0, 32, 16), False),
    ((16, 32, 0), False),
    ((32, 16, 48), True),
    ((3, 19, 4), True),  # lanes apart
    ((0, 8, 4), True),  # 16 to 8: lanes 0 and 8 first
    ((0, 4, 8), False),
    ((7, 15, 3), True),
    ((0, 4, 2), True),  # 8 to 4
    ((12, 0, 2), True),
    ((0, 2, 4), False),
    ((0, 2, 1), True),  # 4 to 2
    ((0, 1, 2), False),
    ((0, 1, 6), False),
    ((1, 1009, 9), True),  # the first and the last step of a chunk, both of lane 1
    ((1, 9, 1009), False),
    ((1, 1023, 9), False),
    ((0, 1023, 1024), True),  # a chunk's sum is folded before the next chunk's is added
    ((0, 1024, 1023), False),
    ((0, 1024, 2048), True),  # chunks in order
    ((0, 2048, 1024), False),
    ((1024, 2048, 0), False),
    ((1024, 2059, 2060), False),  # a last chunk of 13: folded before it is added
    ((2049, 2051, 1025), True),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_terms(mm_path: Any, dtype: str) -> None:
    probes = np.zeros((len(ORDERS), 2061), dtype)
    for probe, (places, _) in zip(probes, ORDERS, strict=True):
        probe[list(places)] = LARGE, -LARGE, SMALL
    wanted = np.array([[SMALL if left else 0] for _, left in ORDERS], np.float32)
    ones = np.ones(probes.shape[::-1], dtype)
    for n in (1, 2, 7, 21):
        wide = np.repeat(wanted, n, 1)
        assert_same_bits(mm_path.mm_dtype(probes, ones[:, :n], "float32"), wide, (n, "in a"))
        assert_same_bits(mm_path.mm_dtype(ones.T[:n], probes.T, "float32"), wide.T, (n, "in b"))


def random_probes(count: int, length: int, dtype: str) -> Array:
    rng = seeded("probes", count, length, dtype)
    probes = np.zeros((count, length), dtype)
    overflowing = LARGE if dtype == "float16" else 3e38  # where the order decides, a sum is infinite or not
    for number, probe in enumerate(probes):
        near = rng.integers(length) // 64 * 64  # in neighbouring steps, or anywhere
        places = rng.choice(min(64, length - near), 4, False) + near if number % 2 else rng.choice(length, 4, False)
        large = overflowing if number % 8 >= 6 else LARGE
        probe[places] = large, -large, SMALL if number % 4 < 2 else large, -SMALL
    return probes


@lru_cache(maxsize=8)
def probe_results(count: int, length: int, dtype: str) -> Array:
    probes = random_probes(count, length, dtype)
    return _reference.mm_dtype(probes, np.ones((length, 1), dtype), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [40, 1023, 2100])
def test_order_of_random_terms(mm_path: Any, length: int, dtype: str) -> None:
    count = 100 if mm_path.name == "reference" else 400
    probes = random_probes(400, length, dtype)[:count]
    wanted = probe_results(400, length, dtype)[:count]
    assert len(np.unique(wanted)) >= 3
    ones = np.ones((length, 5), dtype)
    assert_same_bits(mm_path.mm_dtype(probes, ones, "float32"), np.repeat(wanted, 5, 1), "in a")
    if mm_path.name == "reference":
        finite = np.isfinite(wanted[:, 0])
        assert_same_bits(contract(probes[finite][:20], ones[:, :1], None, "float32"), wanted[finite][:20], "contract")
        return
    for m in (1, 3, 20, 40):
        out = mm_path.mm_dtype(np.ones((m, length), dtype), probes.T, "float32")
        assert_same_bits(out, np.repeat(wanted.T, m, 0), (m, "in b"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 15, 16, 17, 31, 32, 40, 48, 1023, 1024, 1025, 1039, 1040, 1041, 2048, 2060])
def test_products_that_underflow_to_minus_zero(mm_path: Any, k: int, dtype: str) -> None:
    """A lane may hold -0. What a path adds in lanes where K has ended must not show: 0 * 0 + -0 is +0."""
    for m, n in [(1, 1), (3, 5), (9, 17), (33, 6)]:
        a, b = np.full((m, k), -(2.0**-100), dtype), np.full((k, n), 2.0**-100, dtype)
        wanted = _reference.mm_dtype(a, b, "float32")
        assert np.signbit(wanted).all() == (k % 16 == 0)
        assert_same_bits(mm_path.mm_dtype(a, b, "float32"), wanted, (m, n, k))
        bias = np.full(n, -0.0, np.float32)
        with_bias = _reference.mm_dtype(a, b, "float32", bias=bias)
        assert_same_bits(mm_path.mm_dtype(a, b, "float32", bias=bias), with_bias, (m, n, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_positive(mm_path: Any, dtype: str) -> None:
    for k in (0, 1, 16, 17, 1024, 1041):
        for m in (3, 40):
            a, b = np.full((m, k), -0.0, dtype), np.ones((k, 4), dtype)
            for bias in (None, np.full(4, -0.0, np.float32)):  # -0 + +0
                out = mm_path.mm_dtype(a, b, "float32", bias=bias)
                assert_same_bits(out, np.zeros((m, 4), np.float32), (k, m))


@pytest.mark.parametrize("k", [1, 16, 17, 32, 33, 100, 1024, 1057, 2100])
def test_where_subnormals_begin(mm_path: Any, k: int) -> None:
    """bfloat16 products whose sums cancel to the last bit, which is just above, or below, the least normal number."""
    rng = seeded("subnormals", k)

    def numbers(rows: int, exponents: Array) -> Array:
        significands = rng.choice([1, 1 + 2.0**-7, -1, -1 - 2.0**-7, 0], (rows, k), p=[0.24, 0.24, 0.24, 0.24, 0.04])
        return (significands * 2.0 ** exponents[:, None]).astype("bfloat16")

    m, n = (20, 9) if mm_path.name != "reference" else (8, 4)
    a = numbers(m, np.repeat(rng.permutation([-57, -56, -55, -54, -53])[: m // 4], 4))
    b = numbers(n, np.repeat(rng.permutation([-57, -56, -55])[: (n + 3) // 4], 4)[:n]).T
    assert_same_bits(mm_path.mm_dtype(a, b, "float32"), _reference.mm_dtype(a, b, "float32"), "sums")
    a[7, k // 2], b[k // 2, 0], b[k // 3, 2], a[0, k // 3] = 1e-39, 2.0**20, -1e-39, 2.0**20  # subnormal themselves
    assert_same_bits(mm_path.mm_dtype(a, b, "float32"), _reference.mm_dtype(a, b, "float32"), "operands")


@pytest.mark.parametrize("k", [1, 16, 17, 1000, 1024, 1025, 4097, 65536, 2**17 + 1, 2**20 - 1, 2**20])
def test_no_term_is_lost(mm_path: Any, k: int) -> None:
    a, b = np.ones((33, k), np.float16), np.ones((k, 3), np.float16)
    for m in (1, 4, 33) if mm_path.name != "reference" else (1,):
        assert_same_bits(mm_path.mm_dtype(a[:m], b, "float32"), np.full((m, 3), k, np.float32), m)


def test_every_term_counts(mm_path: Any) -> None:
    """One term alone, at every k of two chunks and a tail: the identity, in a and in b."""
    k = 2063
    values = seeded("one term").standard_normal((k, 2), np.float32)
    values[:3] = [[0], [1e-45], [3e38]]
    eye = np.eye(k, dtype=np.float32)
    rows = slice(None) if mm_path.name != "reference" else slice(None, None, 41)
    assert_same_bits(mm_path.mm_dtype(eye[rows], values), values[rows] + 0, "in a")
    assert_same_bits(mm_path.mm_dtype(values.T, eye[:, rows]), values[rows].T + 0, "in b")


def test_fp32_output_does_not_pass_through_16_bits(mm_path: Any) -> None:
    a, b = np.array([[1, 2.0**-10]], np.float16), np.array([[1], [2.0**-10]], np.float16)
    assert_same_bits(mm_path.mm_dtype(a, b, "float32"), np.array([[1 + 2.0**-20]], np.float32))


def test_the_product_is_fused(mm_path: Any) -> None:
    """(1 + e)(1 - e) - 1 is -e^2 where the product is exact, and 0 where it is rounded first."""
    e = 2.0**-13
    a, b = np.zeros((1, 17), np.float32), np.zeros((17, 1), np.float32)
    a[0, [0, 16]], b[[0, 16], 0] = (-1, 1 + e), (1, 1 - e)
    assert_same_bits(mm_path.mm_dtype(a, b), np.array([[-(e**2)]], np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_specials_stay_in_their_row_and_column(mm_path: Any, value: float, dtype: str) -> None:
    a, b = (array.copy() for array in case(9, 17, 100, dtype, dtype, "normal"))
    a[3, 50] = value
    out, wanted = mm_path.mm_dtype(a, b, "float32"), _reference.mm_dtype(a, b, "float32")
    assert_same_bits(out, wanted)
    others = np.arange(9) != 3
    assert np.isfinite(out[others]).all()
    assert_same_bits(out[others], _reference.mm_dtype(a[others], b, "float32"))
    a, b = b.T.copy(), a.T.copy()
    assert_same_bits(mm_path.mm_dtype(a, b, "float32"), _reference.mm_dtype(a, b, "float32"), "in b")
    assert np.isfinite(mm_path.mm_dtype(a, b, "float32")[:, others]).all()
    bias = np.zeros(9, np.float32)
    bias[3] = value
    b[:, 3] = 1
    wanted = _reference.mm_dtype(a, b, "float32", bias=bias)
    assert_same_bits(mm_path.mm_dtype(a, b, "float32", bias=bias), wanted, "in bias")


def test_infinities_and_nans(mm_path: Any) -> None:
    cases = [
        ([np.inf, 1], [1, 1], np.inf),
        ([np.inf, -np.inf], [1, 1], np.nan),
        ([np.inf, 1], [0, 1], np.nan),
        ([0, 1], [np.nan, 1], np.nan),
        ([3e38, 3e38], [2, -2], np.nan),  # two infinite sums
        ([3e38, 1], [2, 1], np.inf),
        ([3e38, 3e38], [1, -1], 0),
    ]
    for x, y, value in cases:
        for k in (2, 15, 1040):  # in two lanes, or two chunks
            a, b = np.zeros((3, k), np.float32), np.zeros((k, 5), np.float32)
            a[:, [0, k - 1]], b[[0, k - 1]] = x, np.reshape(y, (2, 1))
            assert_same_bits(mm_path.mm_dtype(a, b), np.full((3, 5), value, np.float32), (x, y, k))
    a, b = np.zeros((3, 17), np.float32), np.zeros((17, 5), np.float32)
    a[:, [0, 16]], b[[0, 16]] = (-3e38, 3e38), [[1], [2]]  # no float32 could hold the second product
    assert_same_bits(mm_path.mm_dtype(a, b), np.full((3, 5), 3e38, np.float32), "2 * 3e38 - 3e38")


def test_accuracy(mm_path: Any) -> None:
    """Against float64, relative to the sum of magnitudes, at the longest gate."""
    a, b = case(4, 32, 7168, "float32", "float32", "normal")
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.linalg.norm(mm_path.mm_dtype(a, b) - exact) / np.linalg.norm(exact)
    assert error <= 5e-7
