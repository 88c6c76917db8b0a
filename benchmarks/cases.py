"""What is measured: an operation on rows of one dtype, and the arrays for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
EPS = 1e-6
DTYPES = ("float32", "float16", "bfloat16")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """ImportError for bfloat16 without ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@dataclass(frozen=True)
class Operation:
    """`passes` arrays of x's size are read or written; what a peer needs is in `operands`."""

    name: str
    title: str
    passes: int
    operands: tuple[str, ...]


OPERATIONS = {
    "rms_norm": Operation("rms_norm", "RMSNorm: reads x, writes out", 2, ("x", "weight", "out")),
    "fused_add_rmsnorm": Operation(
        "fused_add_rmsnorm", "fused add in place: reads and writes x and residual", 4, ("x", "residual", "weight")
    ),
}


@dataclass(frozen=True)
class Case:
    operation: Operation
    dtype: str
    columns: int
    rows: int
    threads: int

    @property
    def x_bytes(self) -> int:
        return self.rows * self.columns * numpy_dtype(self.dtype).itemsize

    @property
    def moved_bytes(self) -> int:
        """Every element once for each time it must be read or written, the weight once."""
        return self.operation.passes * self.x_bytes + self.columns * numpy_dtype(self.dtype).itemsize

    def text(self) -> str:
        return f"{self.operation.name} {self.dtype} {self.rows} x {self.columns}, {self.threads} threads"


class Operands:
    """The arrays of a case, the same memory for every contestant, and that memory as torch tensors."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(3)
        dtype = numpy_dtype(case.dtype)
        block = rng.standard_normal(min(case.rows, 64) * case.columns, np.float32).astype(dtype)
        self.arrays: dict[str, Array] = {}
        for name in case.operation.operands:
            if name == "weight":
                self.arrays[name] = aligned(case.columns, dtype)
                self.arrays[name][...] = rng.uniform(0.5, 1.5, case.columns).astype(dtype)
                continue
            flat = aligned(case.rows * case.columns, dtype, slack=case.columns)
            for start in range(0, flat.size, block.size):
                flat[start : start + block.size] = block[: flat.size - start]
            self.arrays[name] = flat.reshape(case.rows, case.columns)

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    @cached_property
    def tensors(self) -> dict[str, Any]:
        import torch

        if self.case.dtype != "bfloat16":
            return {name: torch.from_numpy(a) for name, a in self.arrays.items()}
        return {name: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for name, a in self.arrays.items()}


def aligned(elements: int, dtype: np.dtype[Any], slack: int = 0) -> Array:
    """An array that begins on a multiple of 64 bytes, with memory for `slack` more elements behind it."""
    memory = np.zeros((elements + slack) * dtype.itemsize + 64, np.uint8)
    skip = -memory.ctypes.data % 64
    return memory[skip : skip + elements * dtype.itemsize].view(dtype)
