"""What the tests share: comparing bits, making hostile numbers, and the contract stated a second time.

`FUSEDNORM_TEST_SEED` repeats a run; without it every run draws fresh numbers and prints its seed with each failure.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

HAVE_BFLOAT16 = importlib.util.find_spec("ml_dtypes") is not None
if HAVE_BFLOAT16:
    import ml_dtypes  # noqa: F401  (NumPy knows the name "bfloat16" from here on)

Array = np.ndarray[Any, Any]

SEED = int(os.environ.get("FUSEDNORM_TEST_SEED") or secrets.randbits(48))
os.environ["FUSEDNORM_TEST_SEED"] = str(SEED)  # workers and child processes draw the same numbers

DTYPES = ("float32", "float16", "bfloat16") if HAVE_BFLOAT16 else ("float32", "float16")
INFINITY_BITS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
PRECISION = {"float32": (24, -126, 127), "float16": (11, -14, 15), "bfloat16": (8, -126, 127)}  # bits, emin, emax
POISON = 0xA5  # as a float of any of the dtypes: a small negative number, unlike any result
GUARD_BYTES = 64

compared: Counter[str] = Counter()  # path name -> elements compared bit for bit
current_path = "no path"


def count_elements(n: int) -> None:
    compared[current_path] += n


@contextmanager
def counting(name: str) -> Iterator[None]:
    """What is compared inside counts for the path `name`."""
    global current_path
    before, current_path = current_path, name
    try:
        yield
    finally:
        current_path = before


def require_cuda() -> None:
    """Skips the module that calls it where the CUDA path is not tested."""
    import pytest

    import fusednorm

    cuda = fusednorm.info()["cuda"]
    named = os.environ.get("FUSEDNORM_TEST_PATHS")
    if not cuda["available"]:
        pytest.skip(f"no CUDA: {cuda['reason']}", allow_module_level=True)
    if os.environ.get("FUSEDNORM_CPU") or (named and "cuda" not in named):
        pytest.skip("the environment asks for CPU paths alone", allow_module_level=True)


def seeded(*key: object) -> np.random.Generator:
    """The session's generator for `key`: the same numbers whatever ran before."""
    return np.random.default_rng([SEED, zlib.crc32(repr(key).encode())])


def bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


def is_nan(array: Array) -> Array:
    infinity = INFINITY_BITS[array.dtype.name]
    return (bits(array) & ((1 << (8 * array.dtype.itemsize - 1)) - 1)) > infinity


def assert_same_bits(actual: Array, expected: Array, context: object = "") -> None:
    """Equal encodings, where any NaN equals any NaN. Counts what it compared."""
    assert isinstance(actual, np.ndarray), f"{context}: a {type(actual).__name__} instead of an ndarray"
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), (
        f"{context}: {actual.dtype}{actual.shape} instead of {expected.dtype}{expected.shape}"
    )
    count_elements(actual.size)
    a, e = bits(actual), bits(expected)
    if np.array_equal(a, e):
        return
    different = (a != e) & ~(is_nan(actual) & is_nan(expected))
    if not different.any():
        return
    index = tuple(int(i) for i in np.unravel_index(np.argmax(different), different.shape))
    digits = 2 * actual.dtype.itemsize
    raise AssertionError(
        f"{context}: {int(different.sum())} of {different.size} elements differ, {actual.dtype}{actual.shape}; "
        f"the first at {index}: got {actual[index]!r} = 0x{int(a[index]):0{digits}x}, "
        f"expected {expected[index]!r} = 0x{int(e[index]):0{digits}x}; FUSEDNORM_TEST_SEED={SEED}"
    )


# Numbers


def from_float32(values: Array, dtype: str) -> Array:
    """To nearest even, by NumPy's and ml_dtypes' own casts: no code of the package makes the inputs."""
    with np.errstate(all="ignore"):
        return np.asarray(values, np.float32).astype(dtype)


ROW_KINDS = (*["normal"] * 5, "scaled", "scaled", "wide", "subnormal", "huge", "signed zeros", "special", "patterns")
ROW_KINDS_RARE = (*ROW_KINDS * 3, "zero", "constant")


def random_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, kind: str | None = None) -> Array:
    """(..., H): each row of one kind, so that rows full of NaN cost few of the comparisons."""
    columns = shape[-1]
    f = rng.standard_normal((int(np.prod(shape[:-1], dtype=np.int64)), columns), np.float32)
    emin, emax = PRECISION[dtype][1:]
    patterns, specials = [], []
    with np.errstate(all="ignore"):
        for i, row in enumerate(f):
            row_kind = kind or ROW_KINDS_RARE[rng.integers(len(ROW_KINDS_RARE))]
            if row_kind == "scaled":
                row *= np.float32(2.0 ** rng.integers(emin // 2, emax // 2))
            elif row_kind == "wide":
                row *= np.ldexp(np.float32(1), rng.integers(emin // 2, emax // 2, columns)).astype(np.float32)
            elif row_kind == "subnormal":
                row *= np.ldexp(np.float32(1), rng.integers(emin - 12, emin + 2, columns)).astype(np.float32)
            elif row_kind == "huge":  # fp32: 1e19 to 1e38, where squares and sums overflow or nearly do
                row *= np.float32(2.0 ** rng.integers(emax // 2 - 1, emax))
            elif row_kind == "signed zeros":
                row[rng.random(columns) < 0.5] *= np.float32(0)
            elif row_kind == "zero":
                row *= np.float32(0)
            elif row_kind == "constant":
                row[:] = row[0]
            elif row_kind == "patterns":
                patterns.append(i)
            elif row_kind == "special":
                specials.append(i)
    a = from_float32(f, dtype)
    for i in patterns:
        a[i] = rng.integers(0, 256, columns * a.dtype.itemsize, np.uint8).view(dtype)
    for i in specials:
        positions = rng.integers(columns, size=1 + columns // 100)
        a[i, positions] = from_float32(rng.choice([np.inf, -np.inf, np.nan, -0.0, 3e38], positions.size), dtype)
    return a.reshape(shape)


def random_weight(rng: np.random.Generator, columns: int, dtype: str) -> Array:
    f = 1 + rng.standard_normal(columns, np.float32)
    if rng.random() < 0.25:
        f *= np.ldexp(np.float32(1), rng.integers(-14, 15, columns)).astype(np.float32)
    f[rng.random(columns) < 0.02] = -0.0
    w = from_float32(f, dtype)
    if rng.random() < 0.25:
        position = rng.integers(columns)
        w[position] = from_float32(rng.choice([np.inf, -np.inf, np.nan, 3e38, 1e-40]), dtype)
    return w


def operands(dtype: str, shape: tuple[int, ...] = (5, 40)) -> tuple[Array, Array, Array]:
    """x, residual and weight, the same ones in every test that asks."""
    rng = seeded("operands", dtype, shape)
    return random_rows(rng, shape, dtype), random_rows(rng, shape, dtype), random_weight(rng, shape[-1], dtype)


def to_torch(array: Array) -> Any:
    """A tensor that shares the memory; bfloat16 travels as its bits."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(tensor: Any) -> Array:
    import torch

    assert type(tensor) is torch.Tensor
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("bfloat16")
    return tensor.numpy()


# Memory


def poisoned(shape: tuple[int, ...], dtype: str) -> tuple[Array, Array]:
    """An array between two guards, all bytes poisoned, and the bytes that it lies in."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.full(size + 2 * GUARD_BYTES, POISON, np.uint8)
    return np.ndarray(shape, dtype, raw, offset=GUARD_BYTES), raw


def assert_guards(raw: Array, context: object = "") -> None:
    for where, guard in (("before", raw[:GUARD_BYTES]), ("after", raw[-GUARD_BYTES:])):
        assert (guard == POISON).all(), f"{context}: bytes {where} the output were written: {guard.tobytes().hex()}"


def run_python(code: str, timeout: float = 120, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter; a keyword sets (None: removes) an environment variable."""
    env = {**os.environ, **{k: v for k, v in environment.items() if v is not None}}
    for name in (k for k, v in environment.items() if v is None):
        env.pop(name, None)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.dirname(__file__), env.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, "-c", code], env=env, timeout=timeout, capture_output=True, text=True)


def check_python(code: str, timeout: float = 120, **environment: str | None) -> str:
    done = run_python(code, timeout, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# For `check_python`: an input large enough for several threads, half of its results subnormal, and a comparison.
PRELUDE = """
import ctypes, os, sys, numpy as np, fusednorm
from fusednorm import _reference
rng = np.random.default_rng(int(os.environ["FUSEDNORM_TEST_SEED"]))
x = rng.standard_normal((1200, 1024), np.float32)
x[::2] = np.ldexp(x[::2], -130)
expected = _reference.rms_norm(x, eps=0.0).tobytes()
def same():
    return fusednorm.rms_norm(x, eps=0.0).tobytes() == expected
"""


# The contract again, by another way than the reference's: exact or float64 results, each rounded by arithmetic, and the
# sum as one recursion over even and odd positions.


def rounded(exact: Array, dtype: str) -> Array:
    """float64 to the values of `dtype`, to nearest even. Exact for one +, *, / of float32 operands in float64."""
    precision, emin, emax = PRECISION[dtype]
    with np.errstate(all="ignore"):
        quantum = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 1, emin) - precision + 1)
        r = np.where(np.isfinite(exact), np.rint(exact / quantum) * quantum, exact)
        r = np.where(np.abs(r) >= 2.0 ** (emax + 1), np.copysign(np.inf, r), r)
    return np.where(r == 0, np.copysign(0.0, exact), r)


@lru_cache(maxsize=64)
def _even_odd_order(n: int) -> Array:
    """i -> i with its bits reversed: neighbours in this order are what the recursion adds first."""
    order = np.zeros(1, np.int64)
    while order.size < n:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order


def tree_sum(p: Array) -> Array:
    """sum(p) = sum(p[0::2]) + sum(p[1::2]), for a power of two of terms; each + rounded to float32."""
    p = p[..., _even_odd_order(p.shape[-1])]
    while p.shape[-1] > 1:
        with np.errstate(all="ignore"):
            p = rounded(p[..., 0::2] + p[..., 1::2], "float32")
    return p


def exact_rsqrt(v: float) -> float:
    """The float32 nearest to 1/sqrt(v), by comparing squares of rationals."""
    if not 0 < v < np.inf:
        return {0.0: float(np.copysign(np.inf, v)), np.inf: 0.0}.get(v, np.nan)
    r = np.float32(v**-0.5)
    while True:
        below, above = (Fraction(float(r)) + Fraction(float(np.nextafter(r, np.float32(to)))) for to in (0, np.inf))
        if (below / 2) ** 2 * Fraction(v) > 1:
            r = np.nextafter(r, np.float32(0))
        elif (above / 2) ** 2 * Fraction(v) < 1:
            r = np.nextafter(r, np.float32(np.inf))
        else:
            return float(r)


def contract(
    x: Array,
    residual: Array | None,
    post: Array | None,
    weight: Array | None,
    eps: float,
    weight_offset: float,
    cast: bool,
    round_sum: bool | str,
    out_dtype: str,
    residual_out_dtype: str | None,
) -> tuple[Array, Array | None]:
    """Both results for x of shape (rows, H)."""
    with np.errstate(all="ignore"):
        s = x.astype(np.float64)
        for addend in (residual, post):
            if addend is not None:
                s = rounded(s + addend.astype(np.float64), "float32")
        stored = None if residual_out_dtype is None else rounded(s, residual_out_dtype)
        if round_sum is True:
            assert stored is not None
            s = stored
        rows, columns = s.shape
        groups = -(-columns // 8)
        padded = np.zeros((rows, 8 << (groups - 1).bit_length()))
        padded[:, :columns] = rounded(s * s, "float32")
        total = tree_sum(tree_sum(padded.reshape(rows, -1, 8))[..., 0])
        mean = rounded(total / float(np.float32(columns)), "float32")
        r = np.array([[exact_rsqrt(float(v))] for v in rounded(mean + float(np.float32(eps)), "float32")[:, 0]])
        if round_sum == "after_variance":
            assert stored is not None
            s = stored
        y = rounded(s * r.reshape(rows, 1), "float32")
        if cast:
            y = rounded(y, x.dtype.name)
        if weight is not None:
            scale = weight.astype(np.float64)
            if weight_offset != 0:
                scale = rounded(scale + float(np.float32(weight_offset)), "float32")
            y = rounded(y * scale, "float32")
        out = rounded(y, out_dtype).astype(out_dtype)
        return out, None if stored is None else stored.astype(residual_out_dtype)
