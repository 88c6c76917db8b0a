"""The arrays that the audit runs on: random ones, and the hidden states of a real model, shipped with the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

HIDDEN_STATES = Path(__file__).resolve().parent.parent / "data" / "hidden_states.npz"
DTYPES = {  # as they may be asked for; what is shown is the value
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "float32": "float32",
}
EPS = 1e-6
Shape = tuple[int, int]  # of a product's weight: (n, k)


@dataclass(frozen=True)
class Operands:
    """One model's numbers in one dtype. `arrays` holds x and residual, (rows, columns), and weight, (columns,)."""

    data: str
    dtype: str
    arrays: dict[str, Array]
    eps: float = EPS

    @property
    def rows(self) -> int:
        return int(self.arrays["x"].shape[0])

    @property
    def columns(self) -> int:
        return int(self.arrays["x"].shape[1])

    def repeated(self, rows: int) -> Operands:
        """With `rows` rows: the first ones, or all of them over and over."""
        index = np.arange(rows) % self.rows
        arrays = {name: a[index] if a.ndim == 2 else a for name, a in self.arrays.items()}
        return Operands(self.data, self.dtype, arrays, self.eps)


@dataclass(frozen=True)
class Factors(Operands):
    """Of a product. `arrays` holds a, (rows, k), and b, (k, n), which is a transposed view of a weight."""

    @property
    def rows(self) -> int:
        return int(self.arrays["a"].shape[0])

    @property
    def columns(self) -> int:
        return int(self.arrays["b"].shape[1])

    def repeated(self, rows: int) -> Factors:
        a = self.arrays["a"]
        return Factors(self.data, self.dtype, {**self.arrays, "a": a[np.arange(rows) % len(a)]})


def numpy_dtype(name: str) -> np.dtype[Any]:
    """`name` is a value of DTYPES. ImportError where bfloat16 is asked for without ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def missing_dtype(name: str) -> str | None:
    """Why a dtype can't be audited here, or None."""
    try:
        numpy_dtype(name)
    except ImportError:
        return f"{name} needs ml_dtypes: python -m pip install ml_dtypes"
    return None


def random_operands(dtype: str, rows: int, columns: int, seed: int) -> Operands:
    """x and residual from N(0, 1), weight from U(0.5, 1.5): one draw in fp32 for a seed, rounded to the dtype.

    For such weights w - 1 is exact, so that a norm that multiplies by 1 + w can be given the same function.
    """
    rng = np.random.default_rng(seed)
    drawn = {
        "x": rng.standard_normal((rows, columns), np.float32),
        "residual": rng.standard_normal((rows, columns), np.float32),
        "weight": rng.uniform(0.5, 1.5, columns).astype(np.float32),
    }
    return Operands("random", dtype, {name: a.astype(numpy_dtype(dtype)) for name, a in drawn.items()})


def random_factors(dtype: str, rows: int, shape: Shape, seed: int) -> Factors:
    """a from N(0, 1), the weight from N(0, 1/k): results are about 1. One draw in fp32, rounded to the dtype."""
    n, k = shape
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rows, k), np.float32)
    weight = rng.standard_normal((n, k), np.float32) / np.sqrt(np.float32(k))
    to = numpy_dtype(dtype)
    return Factors(shape_text(shape), dtype, {"a": a.astype(to), "b": weight.astype(to).T})


def shape_text(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def hidden_operands(dtype: str) -> Operands:
    """tools/make_hidden_states.py says what they are."""
    with np.load(HIDDEN_STATES) as stored:
        arrays = {name: stored[name].astype(numpy_dtype(dtype)) for name in ("x", "residual", "weight")}
    return Operands("hidden states", dtype, arrays)


def sources(rows: int, columns: int, seed: int) -> dict[str, Callable[[str], Operands]]:
    """What `--data` can name, each a function of the dtype."""
    return {"random": lambda dtype: random_operands(dtype, rows, columns, seed), "hidden": hidden_operands}
