"""Special values on the reference: docs/numerics.md, "Special values", line by line."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import DTYPES, HAVE_BFLOAT16
from test_reference import HALVES, INF, LARGEST, NAN, array, random, same

from fusednorm import _reference as reference
from fusednorm._reference import fold, fused_add_rmsnorm, narrow, rms_norm, widen


def test_nan_fills_its_row(rng: np.random.Generator) -> None:
    x = random(rng, (3, 50))
    x[1, 7] = NAN
    out, residual_out = fused_add_rmsnorm(x, np.zeros_like(x))
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()
    same(residual_out, x, "residual_out has the NaN where x has it")
    w = random(rng, 50)
    w[3] = NAN
    assert (np.isnan(rms_norm(x[0], w)) == (np.arange(50) == 3)).all(), "a NaN in the weight stays in its column"


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_zeroes_its_row(dtype: str) -> None:
    same(rms_norm(array([1, -2, INF, 0], dtype)), array([0.0, -0.0, NAN, 0.0], dtype))
    same(rms_norm(array([1, -INF, 3, 0], dtype), array([-1, 1, INF, 1], dtype)), array([-0.0, NAN, NAN, 0.0], dtype))


def test_overflow_of_a_square_zeroes_its_row() -> None:
    over = np.float32(2.0**64)  # 1.8446744e19: its square is 2^128, the number below it still fits
    fits = np.nextafter(over, np.float32(0))
    same(rms_norm(array([fits])), array([1.0]))
    same(rms_norm(array([over, -1.0, 2.0])), array([0.0, -0.0, 0.0]))
    same(rms_norm(array([-LARGEST])), array([-0.0]))
    each = np.float32(2.0**63.75)  # its square fits, the sum of two does not
    assert 1.41 < rms_norm(array([each, 0.0]))[0] < 1.42
    same(rms_norm(array([each, -each])), array([0.0, -0.0]))
    if HAVE_BFLOAT16:
        same(rms_norm(array([2e19, -1.0], "bfloat16")), array([0.0, -0.0], "bfloat16"))
    same(rms_norm(np.full(1 << 20, 65504, np.float16)), np.ones(1 << 20, np.float16), "float16 squares always fit")


def test_signed_zeros() -> None:
    same(rms_norm(array([0.0, -0.0, 3.0, -3.0]), eps=0)[:2], array([0.0, -0.0]))
    same(rms_norm(array([1.0, -1.0]), array([-0.0, -0.0])), array([-0.0, 0.0]), "no offset: a -0 weight stays -0")
    same(rms_norm(array([1.0]), array([-0.0]), weight_offset=-0.0), array([-0.0]))
    same(rms_norm(array([1.0]), array([-0.0]), weight_offset=1e-60), array([-0.0]), "an offset that rounds to 0")
    same(rms_norm(array([-1.0]), array([-1.0]), weight_offset=1.0), array([-0.0]), "1 + -1 is +0")
    same(fused_add_rmsnorm(array([-0.0, -0.0, 3.0]), array([-0.0, 0.0, -3.0]))[1], array([-0.0, 0.0, 0.0]))


def test_zero_row() -> None:
    zeros = array([0.0, -0.0, 0.0])
    assert np.isnan(rms_norm(zeros, eps=0)).all(), "0 * Inf"
    assert np.isnan(rms_norm(zeros, eps=1e-50)).all(), "eps is rounded to float32, here to 0"
    same(rms_norm(zeros), zeros)
    tiny = array([2.0**-75, -(2.0**-75), 0.0])  # the squares, 2^-150, are ties that round to 0
    same(rms_norm(tiny, eps=0), array([INF, -INF, NAN]))
    same(rms_norm(tiny, eps=1.0), tiny)
    larger = array([np.nextafter(np.float32(2.0**-75), np.float32(1))] * 2)
    assert np.isfinite(rms_norm(larger, eps=0)).all(), "a square of 2^-149"


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_kept(dtype: str, rng: np.random.Generator) -> None:
    """With eps = 1 and squares that vanish, r is 1 and the row comes back."""
    if dtype == "float16":
        x = np.arange(1, 1024, dtype=np.uint16).view(np.float16)[:4]  # 2^-24 to 2^-22: squares of 2^-44 and less
    else:
        x = rng.integers(1, 1 << (23 if dtype == "float32" else 7), 100, f"u{np.dtype(dtype).itemsize}").view(dtype)
    same(rms_norm(x, eps=1.0), x)
    same(fused_add_rmsnorm(x, -x * np.asarray(0, dtype), eps=1.0)[1], x)
    small = rms_norm(array([1.0, 2.0**-20, 3 * 2.0**-26]), out_dtype="float16", eps=0, weight=array([0.5] * 3))
    assert 0 < float(small[1]) < 2.0**-14, "a subnormal result is rounded, not flushed"


def test_overflow_of_the_output_dtype() -> None:
    x = array([30000.0, 30000.0, -1.0], "float16")
    out, residual_out = fused_add_rmsnorm(x, x)
    same(residual_out, array([60000.0, 60000.0, -2.0], "float16"))
    x = array([40000.0, -40000.0, 1.0], "float16")
    out, residual_out = fused_add_rmsnorm(x, x)
    same(residual_out, array([INF, -INF, 2.0], "float16"))
    assert np.isfinite(out).all(), "the fp32 sum is normalised"
    same(fused_add_rmsnorm(x, x, round_sum=True)[0], array([NAN, NAN, 0.0], "float16"))
    assert fused_add_rmsnorm(x, x, round_sum="after_variance")[0].tolist()[:2] == [INF, -INF]
    same(
        rms_norm(array([1.0, 1.0]), array([65519.0, 65520.0]), eps=0, out_dtype="float16"),
        array([65504, INF], "float16"),
    )
    same(rms_norm(array([1.0, -1.0]), array([LARGEST] * 2), eps=0, weight_offset=LARGEST), array([INF, -INF]))


def test_weight_offset_is_added_in_fp32() -> None:
    w = array([2.0**-8, 2.0**-20], HALVES[-1])
    exact = rms_norm(array([1.0, 1.0]), array([1 + 2.0**-8, 1 + 2.0**-20]), eps=0)
    same(rms_norm(array([1.0, 1.0]), w, eps=0, weight_offset=1.0), exact, "1 + w is not rounded to 16 bits")
    same(rms_norm(array([1.0, 1.0]), w, eps=0, weight_offset=1 + 1e-12), exact, "the offset is rounded to float32")


def test_cast_rounds_to_the_dtype_of_x() -> None:
    x = array([1.0, 3.0], "float16")
    y = rms_norm(x, eps=0, out_dtype="float32")
    same(rms_norm(x, eps=0, out_dtype="float32", cast_x_before_out_mul=True), widen(narrow(y, "float16")))
    x = widen(x)
    same(rms_norm(x, eps=0, cast_x_before_out_mul=True), rms_norm(x, eps=0), "a float32 x: nothing to round")


def test_batch_invariant_form(rng: np.random.Generator) -> None:
    for dtype, eps in zip(DTYPES, (2.0**-23, 2.0**-10, 2.0**-7), strict=False):
        x, w = random(rng, (4, 33), dtype, 1e-2), random(rng, 33, dtype)
        same(reference.rms_norm_batch_invariant(x, (33,), w), rms_norm(x, w, eps), "eps None: finfo(input.dtype).eps")
        same(reference.rms_norm_batch_invariant(x, [33], None, 1e-6), rms_norm(x, np.ones(33, np.float32)))
        same(reference.rms_norm_batch_invariant(x, np.int64(33), w, 1e-6), rms_norm(x, w))
    for shape in ((4, 33), (32,), ()):
        with pytest.raises(ValueError, match="last dimension alone"):
            reference.rms_norm_batch_invariant(x, shape)


def test_row_length_is_rounded_to_fp32() -> None:
    assert np.float32(2**24 + 1) == np.float32(2**24), "longer rows divide by the nearest float32"
    x = np.ones((1 << 24) + 1, np.float32)
    total = fold(x)
    assert float(total[0]) == 2**24, "so does the fold: 2^24 + 1 is a tie"
    same(rms_norm(x, eps=0), x)


@pytest.mark.parametrize("bad", [-1.0, -1e-60, NAN, INF, 1e39])
def test_eps_and_offset_out_of_range(bad: float) -> None:
    with pytest.raises(ValueError, match=r"^eps is"):
        rms_norm(np.ones(4, np.float32), eps=bad)
    if not bad < 0:
        with pytest.raises(ValueError, match=r"^weight_offset is"):
            rms_norm(np.ones(4, np.float32), np.ones(4, np.float32), weight_offset=bad)
    with pytest.raises(ValueError, match="0 without a weight"):
        rms_norm(np.ones(4, np.float32), weight_offset=1.0)
