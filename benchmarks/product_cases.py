"""Which products are measured on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import Operation, numpy_dtype

PRODUCT = Operation("mm_dtype", "a @ weight.T", 1, ("a", "weight", "out"))
SHAPES = ((256, 7168), (128, 4096), (4096, 4096))  # of the weight: N x K
ROWS = (1, 16, 256)
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("N x K", "K x N")  # of the weight in memory: as torch's Linear has it, as JAX's Dense has it


@dataclass(frozen=True)
class ProductCase:
    dtype: str
    m: int
    n: int
    k: int
    threads: int
    layout: str = LAYOUTS[0]
    operation: Operation = PRODUCT

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("float32", self.dtype)))

    @property
    def weight_bytes(self) -> int:
        return self.n * self.k * numpy_dtype(self.dtype).itemsize

    @property
    def flop(self) -> int:
        return 2 * self.m * self.n * self.k

    def text(self) -> str:
        weight = f"{self.n} x {self.k}" if self.layout == LAYOUTS[0] else f"{self.n} x {self.k} as {self.layout}"
        return f"{self.dtype}, {weight}, M {self.m}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def product_cases(threads: tuple[int, ...], dtypes: tuple[str, ...], quick: bool) -> list[ProductCase]:
    return [
        ProductCase(dtype, m, n, k, count, layout)
        for count in threads
        for dtype in DTYPES
        if dtype in dtypes
        for layout in LAYOUTS
        for n, k in (SHAPES[:1] if quick else SHAPES)
        for m in ROWS
    ]
