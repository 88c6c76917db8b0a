"""The audit's exact results against whole-number arithmetic that shares nothing with them."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import helpers
import numpy as np
import pytest

from fusednorm.audit import oracle
from fusednorm.audit.measure import OPERATIONS
from fusednorm.audit.operands import Operands, random_operands


def nearest(value: Fraction, dtype: str) -> Fraction:
    """To nearest even, by whole numbers alone."""
    if value == 0:
        return value
    precision, emin, emax = helpers.PRECISION[dtype]
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent += Fraction(2) ** exponent <= abs(value)
    quantum = Fraction(2) ** max(exponent - precision, emin - precision + 1)
    result = round(value / quantum) * quantum  # Fraction rounds half to even
    assert abs(result) < Fraction(2) ** (emax + 1)
    return result


def by_fractions(operands: Operands, points: tuple[str, ...], fused: bool) -> list[list[float]]:
    """The exact result in rationals, the root to 100 digits."""
    dtype = operands.dtype
    arrays = {
        name: [[Fraction(float(v)) for v in row] for row in np.atleast_2d(a)] for name, a in operands.arrays.items()
    }
    eps, weight = Fraction(float(np.float32(operands.eps))), arrays["weight"][0]
    result = []
    for x_row, residual_row in zip(arrays["x"], arrays["residual"], strict=True):
        total = [nearest(a + b, "float32") for a, b in zip(x_row, residual_row, strict=True)] if fused else x_row
        rounded = [nearest(v, dtype) for v in total]
        s = rounded if {"s", "s after variance"} & set(points) else total
        variance = sum(v * v for v in (rounded if "s" in points else total)) / Fraction(len(x_row)) + eps
        with localcontext() as context:
            context.prec = 100
            root = Fraction((Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt())
        y = [nearest(v / root, dtype) if "y" in points else v / root for v in s]
        result.append([float(nearest(v * w, dtype)) for v, w in zip(y, weight, strict=True)])
    return result


@pytest.mark.parametrize("dtype", helpers.DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 3, 8, 17, 100])
def test_exact_results_are_exact(rng: np.random.Generator, columns: int, dtype: str) -> None:
    operands = random_operands(dtype, 4, columns, int(rng.integers(2**32)))
    compare(operands)


def compare(operands: Operands) -> None:
    for operation in OPERATIONS.values():
        for points in operation.points:
            expected = np.array(by_fractions(operands, points, operation.name == "fused_add_rmsnorm"))
            actual = operation.exact(operands, points)
            assert actual.dtype.name == operands.dtype
            assert (actual.astype(np.float64) == expected).all(), (operation.name, points)


def test_eps_is_the_float32_of_the_number(rng: np.random.Generator) -> None:
    """0.1 is not a float32; in fp32 the difference moves about one element in 100, and there are 2,000."""
    small = (0.1 * rng.standard_normal((2, 10, 200))).astype(np.float32)
    compare(
        Operands("small", "float32", {"x": small[0], "residual": small[1], "weight": np.ones(200, np.float32)}, 0.1)
    )


@pytest.mark.parametrize("dtype", helpers.DTYPES)
def test_numbers_at_both_ends(rng: np.random.Generator, dtype: str) -> None:
    """Subnormal rows and results, and rows whose squares are beyond fp32 (a float64 holds them)."""
    emin, emax = helpers.PRECISION[dtype][1:]
    for exponent, weight in ((emin - 3, 1.0), (emax - 3, 2.0**-8), (0, 2.0 ** (emin - 2))):
        values = np.ldexp(rng.uniform(-1, 1, (2, 3, 9)), exponent).astype(np.float32).astype(dtype)
        scale = np.ldexp(rng.uniform(0.5, 1, 9), round(np.log2(weight))).astype(np.float32).astype(dtype)
        compare(Operands("ends", dtype, {"x": values[0], "residual": values[1], "weight": scale}))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("element", "below", "tie", "above"), [(257, 256, 256, 258), (259, 258, 260, 260)])
def test_exact_results_at_ties(element: int, below: int, tie: int, above: int, sign: int) -> None:
    """element / 256 lies halfway between two bf16 numbers; whole numbers of which the mean of squares is 2^46, give or
    take 2^-8, put y there or beside it by less than float64 can tell."""
    if not helpers.HAVE_BFLOAT16:
        pytest.skip("bf16 needs ml_dtypes")
    for step, expected in ((0, tie), (1, below), (-1, above)):
        numbers = [element << 15, *[1 << 23] * 100]
        rest = (256 << 46) + step - sum(v * v for v in numbers)
        while rest:
            numbers.append(min(math.isqrt(rest), 1 << 24))
            rest -= numbers[-1] ** 2
        row = np.zeros((1, 256), np.float32)
        row[0, : len(numbers)] = numbers
        assert sum(int(v) ** 2 for v in row[0]) == (256 << 46) + step
        for round_y in (True, False):
            actual = oracle.exact_norm(sign * row, np.ones(256, np.float32), 0.0, "bfloat16", round_y)
            assert float(actual[0, 0]) * 256 == sign * expected


@pytest.mark.parametrize("dtype", [dtype for dtype in helpers.DTYPES if dtype != "float32"])
def test_round_to_over_all_numbers(dtype: str) -> None:
    """Each number, each midpoint of neighbours and what lies just beside it, against the order of the encodings."""
    limit = helpers.INFINITY_BITS[dtype]
    numbers = np.arange(limit, dtype=np.uint16).view(dtype).astype(np.float64)
    beyond = 2.0 * numbers[-1] - numbers[-2]  # what would follow the largest
    following = np.append(numbers[1:], beyond)
    shown = np.append(numbers[1:], np.inf)
    middle = (numbers + following) / 2
    even = np.where(np.arange(limit) % 2 == 0, numbers, shown)
    for sign in (1.0, -1.0):
        for value, expected in (
            (numbers, numbers),
            (middle, even),
            (np.nextafter(middle, 0), numbers),
            (np.nextafter(middle, np.inf), shown),
        ):
            actual = oracle.round_to(sign * value, dtype)
            assert (actual == sign * expected).all()
            assert (np.signbit(actual) == (sign < 0)).all()
