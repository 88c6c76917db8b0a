"""The norms by exact arithmetic: what the contract's result would be if only its named rounding points rounded.

`Fraction` for rows of some hundred elements; float64 and `math.fsum` for longer ones: 2^-53 against the norms' 2^-24.
Nothing here comes from the package, and of NumPy's casts only those that are exact.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Number = Fraction | float  # a float only for NaN and the infinities

UNIT = Fraction(1, 2**24)  # half an ulp of 1: the largest relative error of one binary32 operation on normal numbers


@dataclass(frozen=True)
class Format:
    """A binary format: bits of the significand with the hidden one, least and greatest exponent of normal numbers."""

    precision: int
    emin: int
    emax: int

    @property
    def largest(self) -> Fraction:
        return Fraction(2) ** (self.emax + 1) - Fraction(2) ** (self.emax - self.precision + 1)


FORMATS = {"float32": Format(24, -126, 127), "float16": Format(11, -14, 15), "bfloat16": Format(8, -126, 127)}


def decode(code: int, dtype: str) -> Number:
    """The number that an encoding stands for. -0 and +0 are both Fraction(0)."""
    f = FORMATS[dtype]
    fraction_bits = f.precision - 1
    exponent_bits = {"float32": 8, "float16": 5, "bfloat16": 8}[dtype]
    fraction = code & ((1 << fraction_bits) - 1)
    exponent = code >> fraction_bits & ((1 << exponent_bits) - 1)
    sign = -1 if code >> (fraction_bits + exponent_bits) else 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if fraction else sign * math.inf
    hidden = 0 if exponent == 0 else 1 << fraction_bits
    return sign * (hidden + fraction) * Fraction(2) ** (max(exponent, 1) - 1 + f.emin - fraction_bits)


def ulp(value: Fraction, dtype: str) -> Fraction:
    """The distance of neighbouring numbers of `dtype` at `value`."""
    f = FORMATS[dtype]
    exponent = f.emin
    if value:
        exponent = abs(value).numerator.bit_length() - abs(value).denominator.bit_length()
        if Fraction(2) ** exponent > abs(value):
            exponent -= 1
    return Fraction(2) ** (max(exponent, f.emin) - f.precision + 1)


def round_exact(value: Fraction, dtype: str) -> Number:
    """To nearest, a tie to even; from half an ulp above the largest number on, infinity."""
    step = ulp(value, dtype)
    rounded = round(value / step) * step  # Python rounds a Fraction's ties to even
    if abs(rounded) > FORMATS[dtype].largest:
        return math.inf if value > 0 else -math.inf
    return rounded


def sqrt_exact(value: Fraction, bits: int = 192) -> Fraction:
    """sqrt(value), exactly if rational with so many bits, else in the open interval between two neighbours of so many.

    So it lies on the right side of every number that has fewer bits: rounding it to fewer rounds the real square root.
    """
    if value == 0:
        return Fraction(0)
    shift = bits + max(0, value.denominator.bit_length() - value.numerator.bit_length()) // 2
    scaled = value.numerator * value.denominator << 2 * shift
    root = math.isqrt(scaled)
    return Fraction(2 * root + (root * root != scaled), 2 * value.denominator << shift)


def fractions(a: Array) -> list[Fraction]:
    assert np.isfinite(a.astype(np.float64)).all()
    return [Fraction(v) for v in a.astype(np.float64).tolist()]


def levels(columns: int) -> int:
    """Additions between a square and the total: 3 in a group of 8, then log2 of the padded number of groups."""
    return 3 + (-(-columns // 8) - 1).bit_length()


def bound_in_units(columns: int, weighted: bool = True) -> float:
    """The largest relative error of the contract's result before its last rounding, in units of 2^-24.

    A square, each addition of positive numbers, the division and the addition of eps err by at most 1 unit each, of
    which the square root leaves half; 1/sqrt, s * r and * weight add 1 each; 0.01 is more than all products of errors.
    In ulps of float32 the bound is the same number: 2^-24 of a number is at most an ulp of it.
    """
    return (levels(columns) + 3) / 2 + 2 + weighted + 0.01


@dataclass
class Row:
    """One row, exactly: `y` before it meets the weight, and the interval in which the contract's `out` must lie."""

    s: list[Fraction]
    residual_out: list[Number] | None
    y: list[Fraction]
    out: list[Fraction]
    low: list[Number]
    high: list[Number]


def exact_row(
    x: Array,
    weight: Array | None,
    eps: float,
    *,
    residual: Array | None = None,
    post: Array | None = None,
    weight_offset: float = 0.0,
    cast: bool = False,
    round_sum: bool | str = False,
    out_dtype: str = "float32",
    residual_out_dtype: str = "float32",
) -> Row:
    """The real RMSNorm of one row. Rounded are, exactly: the sums of step 1 and weight + offset to float32, the sum to
    residual_out's dtype, y to x's dtype with `cast`, y * weight to float32, and that to `out_dtype`."""
    s = fractions(x)
    for addend in (residual, post):
        if addend is not None:
            s = [_finite(round_exact(a + b, "float32")) for a, b in zip(s, fractions(addend), strict=True)]
    stored = None if residual is None else [round_exact(v, residual_out_dtype) for v in s]
    rounded = s if stored is None else stored
    if round_sum is True:
        s = [_finite(v) for v in rounded]
    mean_plus_eps = sum((v * v for v in s), Fraction(0)) / len(s) + Fraction(float(np.float32(eps)))
    if round_sum == "after_variance":
        s = [_finite(v) for v in rounded]
    y = [_signed(v, sqrt_exact(v * v / mean_plus_eps)) for v in s]
    scale = [Fraction(1)] * len(s) if weight is None else fractions(weight)
    if weight_offset:
        offset = Fraction(float(np.float32(weight_offset)))
        scale = [_finite(round_exact(w + offset, "float32")) for w in scale]

    def finish(values: list[Fraction]) -> list[Number]:
        if cast:
            values = [_finite(round_exact(v, x.dtype.name)) for v in values]
        products = [_finite(round_exact(v * w, "float32")) for v, w in zip(values, scale, strict=True)]
        return [round_exact(p, out_dtype) for p in products]

    # All that follows y is monotone in |y|: the result lies between the images of y less and y plus the bound. The
    # product is rounded as in the contract, not widened by an error: with `cast` it is often a tie of `out_dtype`.
    slack = Fraction(bound_in_units(len(s), weighted=False)) * UNIT
    ends = [finish([v * (1 + sign * slack) for v in y]) for sign in (-1, 1)]
    low, high = ([f(*pair) for pair in zip(*ends, strict=True)] for f in (min, max))
    exact_y = [_finite(round_exact(v, x.dtype.name)) for v in y] if cast else y
    return Row(s, stored, y, [v * w for v, w in zip(exact_y, scale, strict=True)], low, high)


def _finite(value: Number) -> Fraction:
    assert isinstance(value, Fraction), "an exact row must not overflow"
    return value


def _signed(sign: Fraction, magnitude: Fraction) -> Fraction:
    return -magnitude if sign < 0 else magnitude


def float64_rows(s: Array, weight: Array | None, eps: float) -> Array:
    """The RMSNorm of rows of float32 numbers: squares are exact in float64, `fsum` rounds their sum once."""
    s64 = s.astype(np.float64)
    means = [math.fsum(row) / row.size for row in (s64 * s64)]
    y = s64 / np.sqrt(np.array(means)[:, None] + np.float64(np.float32(eps)))
    return y if weight is None else y * weight.astype(np.float64)


def ulps64(value: Array, dtype: str) -> Array:
    """`ulp` of float64 numbers."""
    f = FORMATS[dtype]
    return np.ldexp(1.0, np.maximum(np.frexp(value)[1] - 1, f.emin) - f.precision + 1)


def to_float32(value: float) -> float:
    """The float32 nearest to a float64, by Python's struct."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def fold_by_definition(p: Sequence[float]) -> float:
    """The fold, one element at a time, in Python floats: a float64 sum of two float32 rounds to the float32 sum."""

    def halves(terms: list[float]) -> float:
        if len(terms) == 1:
            return terms[0]
        middle = len(terms) // 2
        return halves([to_float32(terms[i] + terms[i + middle]) for i in range(middle)])

    return _padded_fold(p, halves)


def fold_by_parity(p: Sequence[float]) -> float:
    """The same tree from its root: the sum of the terms at even positions plus the sum of those at odd positions."""

    def parity(terms: Sequence[float]) -> float:
        return terms[0] if len(terms) == 1 else to_float32(parity(terms[0::2]) + parity(terms[1::2]))

    return _padded_fold(p, parity)


def _padded_fold(p: Sequence[float], fold: Callable[[list[float]], float]) -> float:
    terms = list(p) + [0.0] * (-len(p) % 8)
    sums = [fold(terms[i : i + 8]) for i in range(0, len(terms), 8)]
    while len(sums) & (len(sums) - 1):
        sums.append(0.0)
    return fold(sums)
