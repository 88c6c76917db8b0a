"""The contract in NumPy: what every other path of the CPU must equal, bit for bit (NaNs: "is NaN").

Read it beside docs/numerics.md; the step numbers are the same. Every arithmetic line is one IEEE-754 binary32 operation
per element, rounded to nearest even, and no operand is wider than float32 except in `rsqrt` and in `fma`, which says
how it rounds once. NumPy obeys the calling thread's floating-point modes, so the reference wants the default ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
RoundSum = bool | Literal["after_variance"]

FINFO_EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_ROUND_SUM = (False, True, "after_variance")
MM_LANES, MM_CHUNK = 16, 1024
_BLOCK = 1 << 18  # elements that are normalised at once: keeps the temporaries in cache, decides no bit


def _dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            return np.dtype(dtype)
        except TypeError:
            raise TypeError("dtype 'bfloat16' is known to NumPy only after `import ml_dtypes`") from None
    dtype = np.dtype(dtype)
    if dtype.name not in FINFO_EPS or not dtype.isnative:
        raise TypeError(f"dtype is {dtype}: it must be native float32, float16 or bfloat16")
    return dtype


def widen(a: npt.ArrayLike) -> F32:
    """float16, bfloat16 or float32 to float32, exactly."""
    a = np.asarray(a)
    if _dtype(a.dtype).name != "bfloat16":
        return a.astype(np.float32, copy=False)
    bits: npt.NDArray[np.uint32] = a.view(np.uint16).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32)  # bfloat16 is the upper half of a float32


def narrow(f: npt.ArrayLike, dtype: npt.DTypeLike) -> Array:
    """float32 to `dtype`, to nearest even: too large is Inf, too small a subnormal or zero, a NaN stays a NaN."""
    f, dtype = np.asarray(f, np.float32), _dtype(dtype)
    with np.errstate(all="ignore"):
        if dtype.name != "bfloat16":
            return f.astype(dtype, copy=False)
        bits = f.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)  # of the last bit that is kept: ties go to even
        rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
        half: Array = np.where(np.isnan(f), quiet_nan, rounded).astype(np.uint16)
        return half.view(dtype)


def fold(p: npt.ArrayLike) -> F32:
    """The sum over the last dimension (kept, with length 1): groups of 8 neighbours by halves, then the groups."""
    p = np.asarray(p, np.float32)
    groups = -(-p.shape[-1] // 8)
    padded = np.zeros((*p.shape[:-1], groups, 8), np.float32)
    padded.reshape(*p.shape[:-1], groups * 8)[..., : p.shape[-1]] = p
    with np.errstate(all="ignore"):
        a, b, c, d, e, f, g, h = (padded[..., lane] for lane in range(8))
        sums: F32 = ((a + e) + (c + g)) + ((b + f) + (d + h))  # 8 -> 4 -> 2 -> 1
        power = 1 << (groups - 1).bit_length()
        if power != groups:
            sums = np.concatenate([sums, np.zeros((*p.shape[:-1], power - groups), np.float32)], axis=-1)
        while sums.shape[-1] > 1:
            half = sums.shape[-1] // 2
            sums = sums[..., :half] + sums[..., half:]
    return sums


def rsqrt(v: npt.ArrayLike) -> F32:
    """1/sqrt(v), correctly rounded: double rounding does no harm to any float32 (tests/c/rsqrt_exhaustive.c)."""
    with np.errstate(all="ignore"):
        root = np.sqrt(np.asarray(v, np.float32).astype(np.float64))
        return np.asarray(1.0 / root).astype(np.float32)


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> F32:
    """a * b + c of float32, rounded once. The product is exact in float64; the sum is rounded to odd there, which keeps
    what the rounding to float32 must know: the exact sum lies above, on or below the midpoint of two floats."""
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        addend = np.asarray(c, np.float32).astype(np.float64)
        total = np.asarray(product + addend)
        part = total - product
        error = (product - (total - part)) + (addend - part)  # exact: product + addend == total + error
        even = (total.view(np.int64) & 1) == 0
        inexact = (error != 0) & np.isfinite(error) & np.isfinite(total)
        odd = np.where(inexact & even, np.nextafter(total, np.copysign(np.inf, error)), total)
        fused: F32 = odd.astype(np.float32)
    return fused


def mm_dtype(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    out_dtype: npt.DTypeLike | None = None,
    *,
    bias: npt.ArrayLike | None = None,
) -> Array:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}: they must be (M, K) and (K, N)")
    (m, length), n = a.shape, b.shape[1]
    dtype = _dtype(a.dtype if out_dtype is None else out_dtype)
    if bias is not None and np.shape(bias) != (n,):
        raise ValueError(f"bias has shape {np.shape(bias)}: it must be ({n},)")
    columns = widen(b).T
    out = np.empty((m, n), dtype)
    for row in range(m):
        total = np.zeros(n, np.float32)
        for start in range(0, length, MM_CHUNK):  # step 1
            chunk = slice(start, start + MM_CHUNK)
            lanes = _lane_sums(widen(a[row, chunk]), columns[:, chunk])
            with np.errstate(all="ignore"):
                while lanes.shape[-1] > 1:  # step 3
                    half = lanes.shape[-1] // 2
                    lanes = lanes[:, :half] + lanes[:, half:]
                total = lanes[:, 0] if start == 0 else total + lanes[:, 0]  # step 4
        with np.errstate(all="ignore"):
            out[row] = narrow(total if bias is None else total + widen(bias), dtype)  # step 5
    return out


def _lane_sums(row: F32, columns: F32) -> F32:
    """Step 2: (N, 16) from one chunk of a row of a, and of all columns of b. Both are padded with zeros."""
    n, length = columns.shape
    steps = -(-length // MM_LANES)
    x = np.zeros(steps * MM_LANES, np.float32)
    y = np.zeros((n, steps * MM_LANES), np.float32)
    x[:length], y[:, :length] = row, columns
    lanes = np.zeros((n, MM_LANES), np.float32)
    for k in range(0, steps * MM_LANES, MM_LANES):
        lanes = fma(x[k : k + MM_LANES], y[:, k : k + MM_LANES], lanes)
    return lanes


def rms_norm(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast_x_before_out_mul: bool = False,
    out_dtype: npt.DTypeLike | None = None,
) -> Array:
    x = np.asarray(x)
    scale, epsilon = _scale(x, weight, weight_offset), _epsilon(eps)
    out = np.empty(x.shape, x.dtype if out_dtype is None else _dtype(out_dtype))
    for x_rows, out_rows in _blocks(x, out):
        s = widen(x_rows)
        _normalise(s, _reciprocal_rms(s, epsilon), scale, x.dtype if cast_x_before_out_mul else None, out_rows)
    return out


def fused_add_rmsnorm(
    x: npt.ArrayLike,
    residual: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    eps: float = 1e-6,
    *,
    post_residual_addition: npt.ArrayLike | None = None,
    weight_offset: float = 0.0,
    cast_x_before_out_mul: bool = False,
    round_sum: RoundSum = False,
    out_dtype: npt.DTypeLike | None = None,
    residual_out_dtype: npt.DTypeLike | None = None,
) -> tuple[Array, Array]:
    x, residual = np.asarray(x), np.asarray(residual)
    post = None if post_residual_addition is None else np.asarray(post_residual_addition)
    if residual.shape != x.shape or (post is not None and post.shape != x.shape):
        raise ValueError("residual and post_residual_addition must have the shape of x")
    if not any(round_sum is allowed for allowed in (False, True)) and round_sum != "after_variance":
        raise ValueError(f"round_sum is {round_sum!r}: it must be one of {_ROUND_SUM}")
    scale, epsilon = _scale(x, weight, weight_offset), _epsilon(eps)
    out = np.empty(x.shape, x.dtype if out_dtype is None else _dtype(out_dtype))
    residual_out = np.empty(x.shape, residual.dtype if residual_out_dtype is None else _dtype(residual_out_dtype))
    for x_rows, residual_rows, post_rows, out_rows, sum_rows in _blocks(x, residual, post, out, residual_out):
        with np.errstate(all="ignore"):
            s = widen(x_rows) + widen(residual_rows)  # step 1
            if post is not None:
                s = s + widen(post_rows)
        sum_rows[...] = narrow(s, residual_out.dtype)
        if round_sum is True:
            s = widen(sum_rows)
        r = _reciprocal_rms(s, epsilon)
        if round_sum == "after_variance":
            s = widen(sum_rows)
        _normalise(s, r, scale, x.dtype if cast_x_before_out_mul else None, out_rows)
    return out, residual_out


def rms_norm_batch_invariant(
    input: npt.ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: npt.ArrayLike | None = None,
    eps: float | None = None,
) -> Array:
    input = np.asarray(input)
    shape = tuple(int(n) for n in np.atleast_1d(normalized_shape))
    if shape != input.shape[-1:]:
        raise ValueError(f"normalized_shape is {shape}: it must be the last dimension alone, {input.shape[-1:]}")
    return rms_norm(input, weight, FINFO_EPS[_dtype(input.dtype).name] if eps is None else eps)


def _reciprocal_rms(s: F32, epsilon: np.float32) -> F32:
    with np.errstate(all="ignore"):
        total = fold(s * s)  # step 2
        return rsqrt(total / np.float32(s.shape[-1]) + epsilon)  # step 3


def _normalise(s: F32, r: F32, scale: F32 | None, cast: np.dtype[Any] | None, out: Array) -> None:
    with np.errstate(all="ignore"):
        y = s * r  # step 4
        if cast is not None:
            y = widen(narrow(y, cast))
        out[...] = narrow(y if scale is None else y * scale, out.dtype)  # step 5


def _scale(x: Array, weight: npt.ArrayLike | None, weight_offset: float) -> F32 | None:
    _dtype(x.dtype)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {x.shape}: it must have rows of length 1 or more")
    with np.errstate(all="ignore"):
        offset = np.float32(weight_offset)
        if not np.isfinite(offset) or (weight is None and offset != 0):
            raise ValueError(f"weight_offset is {weight_offset}: it must be finite in float32, and 0 without a weight")
        if weight is None:
            return None
        scale = widen(weight)
        if scale.shape != x.shape[-1:]:
            raise ValueError(f"weight has shape {scale.shape}: it must be {x.shape[-1:]}")
        return scale if offset == 0 else scale + offset  # -0 + 0 would be +0


def _epsilon(eps: float) -> np.float32:
    with np.errstate(all="ignore"):
        epsilon: np.float32 = np.float32(eps)
    if not (np.isfinite(epsilon) and eps >= 0):
        raise ValueError(f"eps is {eps}: it must be finite in float32 and >= 0")
    return epsilon


def _blocks(x: Array, *others: Array | None) -> Iterator[list[Any]]:
    """The arrays as (rows, H), some rows at a time. What is returned to the caller is written through views."""
    length = x.shape[-1]
    matrices = [None if a is None else a.reshape(-1, length) for a in (x, *others)]
    step = max(1, _BLOCK // length)
    for start in range(0, cast(Array, matrices[0]).shape[0], step):
        yield [None if m is None else m[start : start + step] for m in matrices]
