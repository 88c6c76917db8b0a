"""What is measured on a GPU: shapes by regime, and the tensors of a case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .cases import OPERATIONS, Operation

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
LARGE_BYTES = 128 << 20  # of x
FITS_CACHE = 4 << 20  # a call that touches less may find its tensors in L2, as in a model at few rows
L2_TIMES = 3  # bytes over which the tensors of a longer call rotate

FEW, MIDDLE, LARGE, HEADS = "rows 1 to 128", "rows 512 to 2048", "x of 128 MiB", "head norms"
REGIMES = (FEW, MIDDLE, LARGE, HEADS)
FEW_ROWS = (1, 8, 32, 128)
FEW_COLUMNS = (1024, 2048, 2880, 4096, 5120, 7168, 8192, 12288, 16384)
MIDDLE_ROWS = (512, 1024, 2048)
MIDDLE_COLUMNS = (2048, 4096, 7168, 8192)
LARGE_COLUMNS = (
    *(64, 128, 256, 512, 768, 1024, 1536, 2048, 2880),
    *(3072, 3584, 4096, 5120, 6144, 7168, 8192, 12288, 16384),
)
HEAD_SHAPES = ((1024, 128), (8192, 64), (8192, 128), (8192, 256), (1048576, 128))
# A peer that compiles for each shape, for a second or so, takes these alone: rows 1 to 128, then large.
COMPILED_FEW = {(rows, columns) for rows in (1, 128) for columns in (4096, 7168, 16384)}
COMPILED_LARGE = {128, 1024, 4096, 7168, 16384}

# Smaller tables: x's dtype, the weight's.
OTHER_DTYPES = (("float16", "float16"), ("float32", "float32"), ("bfloat16", "float32"))
OTHER_SHAPES = ((1, 4096), (32, 4096), (128, 7168), (1024, 4096))
OTHER_LARGE_COLUMNS = (128, 4096, 16384)

BETWEEN_SHAPES = ((1, 4096), (8, 7168), (32, 4096), (128, 7168), (512, 4096), (2048, 7168))


@dataclass(frozen=True)
class CudaCase:
    operation: Operation
    regime: str
    rows: int
    columns: int
    dtype: str = "bfloat16"
    weight_dtype: str = "bfloat16"

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def x_bytes(self) -> int:
        return self.rows * self.columns * self.element_bytes

    @property
    def moved_bytes(self) -> int:
        """Every element once for each time it must be read or written, the weight once."""
        return self.operation.passes * self.x_bytes + self.columns * ELEMENT_BYTES[self.weight_dtype]

    @property
    def dtypes(self) -> str:
        return self.dtype if self.dtype == self.weight_dtype else f"{self.dtype}, weight {self.weight_dtype}"

    @property
    def for_compilers(self) -> bool:
        """Whether a peer that compiles for each shape takes part."""
        if (self.dtype, self.weight_dtype) in OTHER_DTYPES:
            return self.columns == 4096 and (self.rows == 1 or self.regime == LARGE)
        if self.regime == FEW:
            return (self.rows, self.columns) in COMPILED_FEW
        return self.regime == MIDDLE or (self.regime == LARGE and self.columns in COMPILED_LARGE)

    def sets(self, l2_bytes: int) -> int:
        """How many sets of tensors the calls of a chain rotate over, so that none is still in L2."""
        touched = 2 * self.x_bytes  # x and out, or x and residual
        return 1 if touched < FITS_CACHE else max(2, -(-L2_TIMES * l2_bytes // touched))

    def title(self) -> str:
        return f"{self.rows} x {self.columns}"

    def text(self) -> str:
        return f"{self.operation.name} {self.dtypes} {self.title()}"


def _shapes(quick: bool) -> Iterator[tuple[str, int, int]]:
    for rows in (1, 128) if quick else FEW_ROWS:
        for columns in (4096, 7168) if quick else FEW_COLUMNS:
            yield FEW, rows, columns
    for rows in (1024,) if quick else MIDDLE_ROWS:
        for columns in (4096,) if quick else MIDDLE_COLUMNS:
            yield MIDDLE, rows, columns
    for columns in (128, 1024, 7168) if quick else LARGE_COLUMNS:
        yield LARGE, LARGE_BYTES // (columns * ELEMENT_BYTES["bfloat16"]), columns
    for rows, columns in ((8192, 128),) if quick else HEAD_SHAPES:
        yield HEADS, rows, columns


def cases(quick: bool) -> list[CudaCase]:
    """bfloat16 first, each regime of both operations together: who runs out of time has measured the first ones."""
    found = [CudaCase(operation, *shape) for operation in OPERATIONS.values() for shape in _shapes(quick)]
    found.sort(key=lambda case: REGIMES.index(case.regime))
    for dtype, weight_dtype in OTHER_DTYPES:
        for operation in OPERATIONS.values():
            for rows, columns in OTHER_SHAPES[:1] if quick else OTHER_SHAPES:
                regime = FEW if rows <= FEW_ROWS[-1] else MIDDLE
                found.append(CudaCase(operation, regime, rows, columns, dtype, weight_dtype))
            for columns in OTHER_LARGE_COLUMNS[1:2] if quick else OTHER_LARGE_COLUMNS:
                rows = LARGE_BYTES // (columns * ELEMENT_BYTES[dtype])
                found.append(CudaCase(operation, LARGE, rows, columns, dtype, weight_dtype))
    return found


def between_cases(quick: bool) -> list[CudaCase]:
    shapes = BETWEEN_SHAPES[:2] if quick else BETWEEN_SHAPES
    regimes = {rows: FEW if rows <= FEW_ROWS[-1] else MIDDLE for rows, _ in shapes}
    return [CudaCase(operation, regimes[rows], rows, h) for operation in OPERATIONS.values() for rows, h in shapes]


class Tensors:
    """One set of a case's tensors. `source` and `target` are what the copy moves: as many bytes as the case must.

    rms_norm: x to out. The fused operation: x and residual, one behind the other, to `spare`.
    """

    def __init__(self, case: CudaCase, weight: Any, device: str) -> None:
        import torch

        dtype, shape = getattr(torch, case.dtype), (case.rows, case.columns)
        self.weight = weight
        if "residual" in case.operation.operands:
            self.source = torch.randn((2, *shape), dtype=dtype, device=device)
            self.x, self.residual = self.source[0], self.source[1]
            self.target = torch.empty_like(self.source)
            self.out = self.x  # in place
        else:
            self.source = self.x = torch.randn(shape, dtype=dtype, device=device)
            self.target = self.out = torch.empty_like(self.x)
            self.residual = None
        self.target.fill_(float("nan"))  # an element that is not written shows


def weight_of(case: CudaCase, device: str) -> Any:
    """Small: what an operation in place adds to residual, call after call, must not overflow float16."""
    import torch

    uniform = torch.rand(case.columns, dtype=torch.float32, device=device)
    return ((uniform + 0.5) / 16).to(getattr(torch, case.weight_dtype))
