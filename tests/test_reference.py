"""The NumPy reference against statements that share nothing with it: exact arithmetic, definitions, others' casts.

What every path does is compared with the reference elsewhere (test_bits.py); here the reference itself is held to
docs/numerics.md, which names these tests.
"""

from __future__ import annotations

import itertools
import math
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from helpers import DTYPES, HAVE_BFLOAT16, INFINITY_BITS, bits, from_float32, is_nan

from fusednorm import _reference as reference
from fusednorm._reference import fold, fused_add_rmsnorm, narrow, rms_norm, rsqrt, widen

Array = np.ndarray[Any, Any]
INF, NAN = math.inf, math.nan
LARGEST = float(np.finfo(np.float32).max)
HALVES = [dtype for dtype in DTYPES if dtype != "float32"]


def array(values: Any, dtype: str = "float32") -> Array:
    return from_float32(np.array(values, np.float32), dtype)


def random(rng: np.random.Generator, shape: Any, dtype: str = "float32", scale: float = 1.0) -> Array:
    return from_float32(rng.standard_normal(shape, np.float32) * np.float32(scale), dtype)


def all_values(dtype: str) -> Array:
    return np.arange(65536, dtype=np.uint16).view(dtype)


def same(actual: Array, expected: Any, context: object = "") -> None:
    """Equal encodings; any NaN equals any NaN."""
    expected = np.asarray(expected, actual.dtype) if not isinstance(expected, np.ndarray) else expected
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), context
    wrong = (bits(actual) != bits(expected)) & ~(is_nan(actual) & is_nan(expected))
    if wrong.any():
        i = tuple(np.argwhere(wrong)[0])
        raise AssertionError(f"{context}: {wrong.sum()} differ, first at {i}: {actual[i]!r}, not {expected[i]!r}")


# The norms against exact arithmetic

# The bound holds for every row. Random rows stay below this at every length, as the many errors of the lower levels of
# the tree cancel: a sum in another shape (sequential, say) does not.
RANDOM_ROW_ULPS = 5.0


def check_exact(out: Array, row: oracle.Row) -> int:
    """Every element in its interval; returns how many intervals hold more than one number."""
    got = [oracle.decode(int(code), out.dtype.name) for code in bits(out)]
    for i, (value, low, high) in enumerate(zip(got, row.low, row.high, strict=True)):
        assert low <= value <= high, f"element {i}: {float(value)!r} is not in [{float(low)!r}, {float(high)!r}]"
    return sum(low != high for low, high in zip(row.low, row.high, strict=True))


def error_bound(columns: int, dtype: str) -> float:
    """In ulps of `dtype`, from the real result: its own rounding, and the float32 error that comes before it."""
    fp32 = oracle.bound_in_units(columns)
    return fp32 if dtype == "float32" else 0.5 + fp32 * 2.0 ** (oracle.FORMATS[dtype].precision - 24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_short_rows_against_exact_rationals(dtype: str, rng: np.random.Generator, capsys: Any) -> None:
    lines = []
    for columns in (1, 2, 7, 8, 9, 20, 64, 100, 257):
        worst = 0.0
        for scale in (1.0, 1e-2, 30.0):
            x = random(rng, columns, dtype, scale)
            w = random(rng, columns, "float32") + np.float32(1)
            row = oracle.exact_row(x, w, 1e-6, out_dtype=dtype)
            out = rms_norm(x, w, 1e-6)
            check_exact(out, row)
            for got, exact in zip(widen(out).tolist(), row.out, strict=True):
                worst = max(worst, float(abs(Fraction(got) - exact) / oracle.ulp(exact, dtype)))
        bound = error_bound(columns, dtype)
        lines.append(f"{dtype:>9} H {columns:>7}: {worst:8.5f} ulp from the exact result, at most {bound:8.5f}")
        assert worst <= bound, lines[-1]
    with capsys.disabled():
        print("", *lines, sep="\n")


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_against_float64(dtype: str, rng: np.random.Generator, capsys: Any) -> None:
    lines = []
    for columns in (1000, 4096, 16384, 131072, 1 << 20):
        worst = 0.0
        for scale in (1.0, 1e-3, 100.0):
            x = random(rng, (max(1, (1 << 16) // columns), columns), dtype, scale)
            w = random(rng, columns, "float32") + np.float32(1)
            exact = oracle.float64_rows(widen(x), w, 1e-6)
            error = np.abs(widen(rms_norm(x, w, 1e-6)).astype(np.float64) - exact)
            error[exact == 0] = 0
            worst = max(worst, float((error / oracle.ulps64(exact, dtype)).max()))
        bound = error_bound(columns, dtype)
        lines.append(f"{dtype:>9} H {columns:>7}: {worst:8.5f} ulp from the exact result, at most {bound:8.5f}")
        assert worst <= min(bound, RANDOM_ROW_ULPS), lines[-1]
    with capsys.disabled():
        print("", *lines, sep="\n")


@pytest.mark.parametrize("round_sum", [False, True, "after_variance"])
@pytest.mark.parametrize("cast", [False, True])
def test_rounding_points(cast: bool, round_sum: Any, rng: np.random.Generator) -> None:
    undecided = total = 0
    for x_dtype, r_dtype, out_dtype in itertools.product(DTYPES, repeat=3):
        columns = int(rng.integers(1, 70))
        x, r, post = (random(rng, columns, d) for d in (x_dtype, r_dtype, rng.choice(DTYPES)))
        use_post, offset = bool(rng.integers(2)), float(rng.choice([0.0, 1.0, 0.3]))
        w = random(rng, columns, str(rng.choice(DTYPES)))
        options = {"weight_offset": offset, "round_sum": round_sum, "out_dtype": out_dtype}
        row = oracle.exact_row(
            x, w, 1e-5, residual=r, post=post if use_post else None, cast=cast, residual_out_dtype=r_dtype, **options
        )
        out, residual_out = fused_add_rmsnorm(
            x, r, w, 1e-5, post_residual_addition=post if use_post else None, cast_x_before_out_mul=cast, **options
        )
        assert (out.dtype.name, residual_out.dtype.name) == (out_dtype, r_dtype)
        assert row.residual_out == [oracle.decode(int(b), r_dtype) for b in bits(residual_out)]
        wide = check_exact(out, row)
        if out_dtype != "float32":
            undecided, total = undecided + wide, total + columns
    assert undecided < 0.02 * total, "the intervals must decide nearly every 16-bit element"


def test_rounding_points_matter(rng: np.random.Generator) -> None:
    """The arguments that move a rounding point each change more than 5 % of the elements (after_variance: 0.1 %)."""
    for dtype in HALVES:
        x, r = random(rng, (64, 512), dtype), random(rng, (64, 512), dtype, 3.0)
        w = random(rng, 512, dtype, 0.3) + array(1, dtype)
        plain = fused_add_rmsnorm(x, r, w)[0]
        for options in ({"round_sum": True}, {"round_sum": "after_variance"}, {"cast_x_before_out_mul": True}):
            changed = float(np.mean(bits(fused_add_rmsnorm(x, r, w, **options)[0]) != bits(plain)))
            assert changed > 0.05, (dtype, options, changed)
        rounded, late = (fused_add_rmsnorm(x, r, w, round_sum=mode) for mode in (True, "after_variance"))
        assert float(np.mean(bits(rounded[0]) != bits(late[0]))) > 1e-3
        same(rounded[1], late[1])
        same(rounded[1], fused_add_rmsnorm(x, r, w)[1], "residual_out does not depend on round_sum")


def test_order_of_operations(rng: np.random.Generator) -> None:
    """(x + residual) + post, total / H, and (s * r) * w: others give other bits; x and residual commute."""
    x, r, p = (random(rng, (32, 500)) for _ in range(3))
    w = random(rng, 500)
    s = (x + r) + p
    out, residual_out = fused_add_rmsnorm(x, r, w, post_residual_addition=p)
    same(residual_out, s)
    assert np.mean(x + (r + p) != s) > 0.05
    inverse = rsqrt(fold(s * s) / np.float32(500) + np.float32(1e-6))
    same(out, (s * inverse) * w)
    assert np.mean((s * (inverse * w)) != out) > 0.05
    assert np.mean((s * w) * inverse != out) > 0.05
    for a, b in zip(fused_add_rmsnorm(x, r, w), fused_add_rmsnorm(r, x, w), strict=True):
        same(a, b, "x + residual commutes")


@pytest.mark.parametrize("dtype", HALVES)
def test_round_sum_is_a_16_bit_addition(dtype: str, rng: np.random.Generator) -> None:
    """Rounding the fp32 sum of two 16-bit numbers gives the sum that one rounding of the exact sum gives."""
    codes = rng.integers(0, 65536, (2, 4000), np.uint16)
    near = codes[0] ^ rng.integers(0, 1 << 9, 4000, np.uint16)  # signs and exponents close together: cancellation, ties
    for a, b in ((codes[0], codes[1]), (codes[0], near), (codes[0], near ^ np.uint16(0x8000))):
        x, r = a.view(dtype), b.view(dtype)
        finite = np.isfinite(widen(x)) & np.isfinite(widen(r))
        x, r = x[finite], r[finite]
        got = fused_add_rmsnorm(x, r)[1]
        for u, v, code in zip(oracle.fractions(x), oracle.fractions(r), bits(got), strict=True):
            assert oracle.decode(int(code), dtype) == oracle.round_exact(u + v, dtype), (u, v)


# The parts: the fold, the conversions, 1/sqrt


def test_fold_against_definitions(rng: np.random.Generator) -> None:
    for columns in (1, 2, 7, 8, 9, 16, 17, 20, 24, 25, 63, 64, 65, 100, 255, 257, 1000, 1025, 4104):
        p = random(rng, (2, columns), "float32", 1e3) ** 2
        expected = [[oracle.fold_by_definition(row)] for row in p.tolist()]
        same(fold(p), expected, columns)
        assert [[oracle.fold_by_parity(row)] for row in p.tolist()] == expected


def test_fold_is_not_another_sum(rng: np.random.Generator) -> None:
    p = random(rng, (256, 1000)) ** 2
    pairs = np.pad(p, ((0, 0), (0, 24)))
    while pairs.shape[1] > 1:
        pairs = pairs[:, 0::2] + pairs[:, 1::2]
    for other in (p.sum(axis=1, keepdims=True), np.cumsum(p, axis=1, dtype=np.float32)[:, -1:], pairs):
        assert np.mean(fold(p) != other) > 0.2
    same(fold(np.pad(p, ((0, 0), (0, 7000)))), fold(p), "padding with +0 changes nothing")


def test_drawing_is_the_fold(rng: np.random.Generator) -> None:
    docs = Path(__file__).parents[1] / "docs"
    if not (docs / "fold.py").exists():
        pytest.skip("docs/ is not part of this tree")
    script: dict[str, Any] = {"__name__": "fold"}
    exec((docs / "fold.py").read_text(), script)
    assert script["drawing"](20) == (docs / "fold.svg").read_text()
    for columns in (1, 8, 20, 100):
        p = random(rng, columns) ** 2
        sums = [*p.tolist(), *[0.0] * (-columns % 8)]
        for level in script["levels"](columns):
            sums += [0.0] * (2 * len(level) - len(sums))
            sums = [oracle.to_float32(sums[a] + sums[b]) for a, b in level]
        assert sums == fold(p).tolist()


@pytest.mark.parametrize("dtype", HALVES)
def test_widen_is_exact(dtype: str) -> None:
    for code, value in enumerate(widen(all_values(dtype)).tolist()):
        expected = oracle.decode(code, dtype)
        assert value == expected or (math.isnan(value) and math.isnan(expected)), hex(code)
        if value == 0:
            assert math.copysign(1, value) == (-1 if code >> 15 else 1), hex(code)
        if dtype == "float16" and not math.isnan(value):
            assert struct.pack("<e", value) == struct.pack("<H", code)


@pytest.mark.parametrize("dtype", HALVES)
def test_narrow_at_every_boundary(dtype: str, rng: np.random.Generator) -> None:
    """At each of the midpoints between neighbours, and just beside them; with monotony that is every float32."""
    code = np.arange(INFINITY_BITS[dtype], dtype=np.uint16)
    lower = widen(code.view(dtype)).astype(np.float64)
    upper = np.append(lower[1:], 2.0 ** (oracle.FORMATS[dtype].emax + 1))  # the number that Inf stands in for
    middle = ((lower + upper) / 2).astype(np.float32)
    assert (middle.astype(np.float64) * 2 == lower + upper).all(), "a midpoint is a float32"
    for sign in (0x0000, 0x8000):
        s = np.float32(-1 if sign else 1)
        even = code + (code & np.uint16(1))
        below, above = (np.nextafter(middle, np.float32(end)) for end in (0, INF))
        for name, f, expected in (
            ("exact", lower.astype(np.float32), code),
            ("below", below, code),
            ("tie", middle, even),
            ("above", above, code + np.uint16(1)),
        ):
            same(narrow(s * f, dtype), (expected | np.uint16(sign)).view(dtype), name)
    f = np.sort(np.concatenate([rng.integers(0, 1 << 31, 200_000, np.uint32).view(np.float32), middle]))
    f = f[~np.isnan(f)]
    assert (np.diff(widen(narrow(f, dtype))[np.isfinite(widen(narrow(f, dtype)))]) >= 0).all(), "narrow is monotone"


@pytest.mark.parametrize("dtype", HALVES)
def test_narrow_random_patterns(dtype: str, rng: np.random.Generator) -> None:
    f = rng.integers(0, 1 << 32, 400_000, np.uint32).view(np.float32)
    got = narrow(f, dtype)
    same(got, from_float32(f, dtype), "NumPy's and ml_dtypes' casts")
    assert is_nan(got[np.isnan(f)]).all()
    finite = np.flatnonzero(np.isfinite(f))[:5000]
    for value, code in zip(f[finite].tolist(), bits(got)[finite].tolist(), strict=True):
        assert oracle.decode(code, dtype) == oracle.round_exact(Fraction(value), dtype), value.hex()
        if value != 0:
            assert code >> 15 == (value < 0), value.hex()


def test_conversion_of_float32_is_the_identity(rng: np.random.Generator) -> None:
    f = rng.integers(0, 1 << 32, 10_000, np.uint32).view(np.float32)
    same(widen(f), f)
    same(narrow(f, "float32"), f)


def test_rsqrt_is_correctly_rounded(rng: np.random.Generator) -> None:
    """Samples, subnormals among them; tests/c/rsqrt_exhaustive.c takes all."""
    v = np.concatenate([rng.integers(1, 0x7F800000, 3000, np.uint32), rng.integers(1, 1 << 23, 500, np.uint32)])
    v = v.view(np.float32)
    for value, got in zip(v.tolist(), rsqrt(v).tolist(), strict=True):
        assert got == oracle.round_exact(oracle.sqrt_exact(1 / Fraction(value)), "float32"), value.hex()
    same(rsqrt(array([0.0, INF, NAN])), [INF, 0.0, NAN])


def test_sixteen_bit_dtypes_need_no_other_package() -> None:
    source = Path(reference.__file__).read_text()
    imported = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert set(imported) <= {"__future__", "collections.abc", "typing", "numpy", "numpy.typing"}


@pytest.mark.skipif(not HAVE_BFLOAT16, reason="ml_dtypes is not installed")
def test_unsupported_dtypes() -> None:
    import ml_dtypes

    for dtype in (np.float64, np.int32, np.dtype(">f4"), ml_dtypes.float8_e4m3fn, np.bool_):
        with pytest.raises(TypeError, match="must be native float32, float16 or bfloat16"):
            rms_norm(np.ones(4, dtype))
