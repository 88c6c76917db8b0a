"""Which products are measured on a GPU, the tensors of a case, and what its result should be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .cases import Operation
from .cuda_cases import ELEMENT_BYTES, FITS_CACHE, L2_TIMES

PRODUCT = Operation("mm_fp32", "x times the transpose of a weight, fp32 result", 1, ("x", "weight", "out"))

WARM, COLD = "router gates, warm weight", "router gates, cold weight"
DECODE, PREFILL = "projections, M 1 to 64, cold weight", "projections, M from 128, cold weight"
FP32 = "fp32 x fp32"
REGIMES = (WARM, COLD, DECODE, PREFILL, FP32)

GATES = ((256, 7168), (384, 7168), (128, 4096), (160, 5120), (128, 2880))  # weights are N x K
GATE_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
COLD_ROWS = (1, 16, 64)
PROJECTIONS = ((4096, 4096), (6144, 4096), (8192, 8192), (28672, 8192))
DECODE_ROWS = (1, 8, 16, 32, 64)
PREFILL_ROWS = (128, 256, 1024, 4096, 8192)
FP32_SHAPES = ((256, 7168), (4096, 4096))
FP32_ROWS = (1, 4, 16, 256, 4096)
# A peer that compiles for each shape, for seconds, takes these alone.
COMPILED_GATE, COMPILED_ROWS = (256, 7168), {1, 8, 16, 64}

# Guesses, to choose the number of calls.
SHORTEST_US, BYTES_A_US = 2.0, 4e6
FLOP_A_US = {"bfloat16": 6e8, "float32": 4e7}
CALLS, GRAPH_US = 120, 300.0  # of a short kernel in one graph; of a longer one

CHECKED_ROWS, CHECKED_COLUMNS = 64, 1024
# Orders of addition differ; above this a kernel rounds to 16 bits on its way, or took fp32 operands for TF32.
TOLERANCE = {"bfloat16": 5e-5, "float32": 1e-5}


@dataclass(frozen=True)
class ProductCase:
    regime: str
    m: int
    n: int
    k: int
    dtype: str = "bfloat16"
    cold: bool = True  # whether the calls of a chain take another weight each
    operation: Operation = PRODUCT

    @property
    def x_bytes(self) -> int:
        return self.m * self.k * ELEMENT_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> int:
        return self.n * self.k * ELEMENT_BYTES[self.dtype]

    @property
    def out_bytes(self) -> int:
        return self.m * self.n * ELEMENT_BYTES["float32"]

    @property
    def flop(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def for_compilers(self) -> bool:
        """Whether a peer that compiles for each shape takes part."""
        if self.regime in (WARM, COLD):
            return (self.n, self.k) == COMPILED_GATE and self.m in COMPILED_ROWS
        return self.regime == DECODE and self.m in COMPILED_ROWS

    @property
    def guess_us(self) -> float:
        moved = self.x_bytes + self.weight_bytes + self.out_bytes
        return max(SHORTEST_US, moved / BYTES_A_US, self.flop / FLOP_A_US[self.dtype])

    def weights(self, l2_bytes: int) -> int:
        """Over how many weights the calls of a chain rotate: together more than three times the L2 cache."""
        return max(2, L2_TIMES * l2_bytes // self.weight_bytes + 1) if self.cold else 1

    def inputs(self, l2_bytes: int) -> int:
        """The same for x. A small one stays: in a model the kernel before has just written it."""
        if self.x_bytes < FITS_CACHE:
            return 1
        return max(2, L2_TIMES * l2_bytes // (self.x_bytes + self.out_bytes) + 1)

    def count(self, sets: int) -> int:
        """Calls in a graph: a multiple of the number of sets, so that every replay does the same."""
        wanted = min(CALLS, max(1, round(GRAPH_US / self.guess_us)))
        return max(1, round(wanted / sets)) * sets

    def title(self) -> str:
        return f"{self.n} x {self.k}, M {self.m}"

    def text(self) -> str:
        return f"{self.regime}, {self.title()}"


def _shapes(quick: bool) -> Iterator[tuple[str, tuple[tuple[int, int], ...], tuple[int, ...]]]:
    if quick:
        yield WARM, (GATES[0], GATES[2]), (1, 16, 64, 1024)
        yield COLD, GATES[:1], (1, 16)
        yield DECODE, PROJECTIONS[:1], (1, 64)
        yield PREFILL, PROJECTIONS[:1], (1024,)
        yield FP32, FP32_SHAPES[:1], (1, 256)
        return
    yield WARM, GATES, GATE_ROWS
    yield COLD, GATES, COLD_ROWS
    yield DECODE, PROJECTIONS, DECODE_ROWS
    yield PREFILL, PROJECTIONS, PREFILL_ROWS
    yield FP32, FP32_SHAPES, FP32_ROWS


def cases(quick: bool) -> list[ProductCase]:
    found = []
    for regime, shapes, rows in _shapes(quick):
        dtype = "float32" if regime == FP32 else "bfloat16"
        for n, k in shapes:
            cold = regime != WARM and (regime != FP32 or (n, k) == FP32_SHAPES[1])
            found += [ProductCase(regime, m, n, k, dtype, cold) for m in rows]
    return found


@dataclass
class ProductTensors:
    """x is M x K, the weight N x K as a layer holds it, b its transposed view, out M x N in fp32."""

    x: Any
    weight: Any
    out: Any

    def __post_init__(self) -> None:
        self.b = self.weight.t()

    def first_row(self) -> ProductTensors:
        """The product of row 0 alone, with memory of its own for the result."""
        return ProductTensors(self.x[:1], self.weight, self.out.new_full((1, self.out.shape[1]), math.nan))


def make_sets(case: ProductCase, l2_bytes: int, device: str) -> list[ProductTensors]:
    import torch

    def random(count: int, rows: int) -> list[Any]:
        return [torch.randn((rows, case.k), dtype=dtype, device=device) for _ in range(count)]

    dtype = getattr(torch, case.dtype)
    weights, inputs = random(case.weights(l2_bytes), case.n), random(case.inputs(l2_bytes), case.m)
    return [
        ProductTensors(
            inputs[number % len(inputs)],
            weights[number % len(weights)],
            torch.full((case.m, case.n), math.nan, dtype=torch.float32, device=device),
        )
        for number in range(max(len(weights), len(inputs)))
    ]


@dataclass
class ExpectedProduct:
    """Rows and columns spread over the result, the first and the last among them, by float64."""

    rows: Any
    columns: Any
    out: Any
    total: None = None  # as in cuda_check.Expected: of the fused operation alone

    def restore(self, tensors: ProductTensors) -> None:
        tensors.out.fill_(math.nan)  # an element that is not written shows

    def error(self, result: Any) -> float:
        """Relative; infinite where any element is NaN or the shape is another one."""
        low, high = int(self.rows[-1]), int(self.columns[-1])
        if result.dim() != 2 or result.shape[0] <= low or result.shape[1] <= high or bool(result.isnan().any()):
            return math.inf
        found = result[self.rows][:, self.columns].double()
        return float((found - self.out).norm() / self.out.norm())


def expected(case: ProductCase, tensors: ProductTensors) -> ExpectedProduct:
    import torch

    def spread(size: int, most: int) -> Any:
        return torch.linspace(0, size - 1, min(size, most), dtype=torch.float64, device=tensors.x.device).long()

    rows, columns = spread(case.m, CHECKED_ROWS), spread(case.n, CHECKED_COLUMNS)
    return ExpectedProduct(rows, columns, tensors.x[rows].double() @ tensors.weight[columns].double().t())
