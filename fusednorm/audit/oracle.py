"""What an RMSNorm gives in exact real arithmetic with stated rounding points and no others.

With s the row (x, or x + residual in fp32, or that sum rounded to the dtype) and dtype the model's, Hugging Face's are

    y   = round(s / sqrt(mean(s^2) + eps))      to the dtype
    out = round(y * weight)                     to the dtype

and without the rounding of y there is one, of s * weight / sqrt(...). Each is to nearest even, of the real number.
float64 gives a quotient with a relative error that is bounded below; where that bound leaves two candidates, rational
arithmetic decides, so the result is not an approximation. The products fit a float64 without error. eps is the float32
that a framework makes of the number given to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

BLOCK = 1 << 17  # elements at once: the float64 temporaries stay in cache
UNIT = 2.0**-53


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: bits of significand, exponent of the smallest subnormal, largest finite value."""

    precision: int
    lowest: int
    largest: float


FORMATS = {
    "float16": Format(11, -24, 65504.0),
    "bfloat16": Format(8, -133, float.fromhex("0x1.fep127")),
    "float32": Format(24, -149, float.fromhex("0x1.fffffep127")),
}


def round_to(value: F64, name: str) -> F64:
    """The nearest number of the format, ties to even; too large is Inf, the sign of a zero is kept."""
    form = FORMATS[name]
    with np.errstate(all="ignore"):
        quantum = np.maximum(np.frexp(value)[1] - form.precision, form.lowest)
        rounded = np.ldexp(np.rint(np.ldexp(value, -quantum)), quantum)
        return np.where(np.abs(rounded) > form.largest, np.copysign(np.inf, value), rounded)


def exact_sum(x: Array, residual: Array, rounded: bool) -> npt.NDArray[np.float32]:
    """x + residual in fp32; with `rounded`, then to x's dtype (and back, which is exact)."""
    with np.errstate(all="ignore"):
        total = x.astype(np.float32) + residual.astype(np.float32)
    return round_to(total.astype(np.float64), x.dtype.name).astype(np.float32) if rounded else total


def exact_norm(
    s: Array, weight: Array, eps: float, dtype: npt.DTypeLike, round_y: bool = True, variance_of: Array | None = None
) -> Array:
    """`s` is fp32 (rows, length), `weight` (length,); the result has `dtype`, to which everything is rounded.

    `variance_of`, where given, is the fp32 array that the mean of squares is taken from, instead of s.
    """
    dtype = np.dtype(dtype)
    out = np.empty(s.shape, dtype)
    scale, epsilon = weight.astype(np.float64), float(np.float32(eps))
    step = max(1, BLOCK // s.shape[1])
    for start in range(0, s.shape[0], step):
        rows = slice(start, start + step)
        numerator = s[rows].astype(np.float64)
        row = numerator if variance_of is None else variance_of[rows].astype(np.float64)
        with np.errstate(all="ignore"):  # the products have at most 24 + 24 significant bits: no error
            if round_y:
                result = round_to(_quotient(numerator, row, epsilon, dtype.name) * scale, dtype.name)
            else:
                result = _quotient(numerator * scale, row, epsilon, dtype.name)
        out[rows] = result.astype(np.float32).astype(dtype)  # exact: the values are dtype's
    return out


def _quotient(numerator: F64, row: F64, eps: float, name: str) -> F64:
    """round(numerator / sqrt(mean(row^2) + eps)) to the format `name`, of the real number."""
    with np.errstate(all="ignore"):
        width = 1 << max(0, row.shape[1] - 1).bit_length()
        total = np.zeros((row.shape[0], width))
        total[:, : row.shape[1]] = row * row  # exact: 48 bits
        levels = 0
        while total.shape[1] > 1:
            half = total.shape[1] // 2
            total = total[:, :half] + total[:, half:]
            levels += 1
        quotient = numerator / np.sqrt(total / row.shape[1] + eps)
        # Each level of the sum of positive numbers, the division and the addition of eps err by <= 1 UNIT, of which the
        # square root leaves half; the root, the last division and the two products below add 1 each. One more covers
        # the products of errors.
        bound = ((levels + 2) / 2 + 4) * UNIT
        low, high = round_to(quotient * (1 - bound), name), round_to(quotient * (1 + bound), name)
    for i, j in np.argwhere((low != high) & np.isfinite(quotient)):
        low[i, j] = _settle(float(numerator[i, j]), row[i], eps, float(low[i, j]), float(high[i, j]), name)
    return low


def _settle(numerator: float, row: F64, eps: float, low: float, high: float, name: str) -> float:
    """Which of two neighbouring numbers is nearest to the quotient: compares its square with that of the midpoint."""
    end = math.ldexp(1.0, math.frexp(FORMATS[name].largest)[1])  # what would follow the largest number
    midpoint = (min(abs(low), end) + min(abs(high), end)) / 2
    mean = sum((Fraction(v) ** 2 for v in row.tolist()), Fraction(0)) / row.size
    square, limit = Fraction(numerator) ** 2, Fraction(midpoint) ** 2 * (mean + Fraction(eps))
    if square == limit:
        return float(round_to(np.array(math.copysign(midpoint, low)), name))
    return high if square > limit else low
