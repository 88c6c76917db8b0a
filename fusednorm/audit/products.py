"""What a product of matrices does: does a row keep its bits in a batch, how accurate is it, what is rounded on the way.

Every peer is asked for a float32 result, since 16 bits hide the order of additions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .measure import Batch, Tick, compare_batches, encodings
from .operands import Factors
from .peers import Peer, first_line

Array = npt.NDArray[Any]

PRODUCT = "mm_dtype"
ROWS, QUICK_ROWS = 256, 64  # that differ; larger batches repeat them
SHAPES, QUICK_SHAPES = ((256, 7168),), ((256, 1024),)
FP32_BITS = 23  # of a significand, behind the point
READ_AS = {FP32_BITS: "fp32", 10: "TF32", 7: "bfloat16"}


@dataclass
class ProductResult:
    """One peer in one table. `skipped` says why there are no figures; then the rest is empty."""

    peer: str
    label: str
    skipped: str | None = None
    batch: Batch | None = None
    relative_error: float | None = None  # against float64: norm of the difference over the norm
    through: str | None = None  # the 16-bit dtype that holds every result
    read_as: str | None = None  # for fp32 operands: as what they were multiplied


@dataclass
class ProductTable:
    """All peers of a device on one weight, (n, k), and one dtype of both operands."""

    device: str
    dtype: str
    n: int
    k: int
    results: list[ProductResult]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def product_dtypes(dtypes: Iterable[str]) -> list[str]:
    """float32 too: what becomes of such operands is one of the questions."""
    return list(dict.fromkeys([*dtypes, "float32"]))


def product_sizes(quick: bool) -> list[int]:
    sizes = [*range(1, 65), 100, 127, 128, 129, 255, 256, 257]
    return sizes if quick else [*sizes, 512, 1000, 1024, 2048, 4096]


def product_of(peer: Peer, arrays: Mapping[str, Any], shape: tuple[int, int]) -> Array:
    """The result as an ndarray; TypeError if it is not a float32 one of this shape."""
    result = peer.mm_dtype(arrays["a"], arrays["b"])
    peer.synchronise()
    output = peer.to_numpy(result, np.dtype(np.float32))
    if output.dtype != np.float32 or output.shape != shape:
        raise TypeError(f"the result is {output.dtype} of shape {output.shape}")
    return output


def exact_product(factors: Factors) -> npt.NDArray[np.float64]:
    a, b = factors.arrays["a"].astype(np.float64), factors.arrays["b"].astype(np.float64)
    return np.matmul(a, b)


def relative_error(output: Array, exact: npt.NDArray[np.float64]) -> float:
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(output - exact) / np.linalg.norm(exact))


def passed_through(output: Array) -> str | None:
    """The 16-bit dtype that holds all of a float32 result, or None: by chance one in 8192 numbers or fewer fits."""
    if not (np.ascontiguousarray(output).view(np.uint32) & 0xFFFF).any():
        return "bfloat16"
    with np.errstate(all="ignore"):
        return "float16" if (output.astype(np.float16) == output).all() else None


def probes(n: int, k: int) -> Iterable[Factors]:
    """1 + 2^-p and -1 in one operand, for p from 1 to 23, and then 2^-30 alone; 1 in the other, 0 elsewhere.

    The sums are the 2^-p that `probed` holds, exact in any order; they are 0, or twice that, where p bits are not kept.
    """
    n = max(n, FP32_BITS + 1)
    special = np.zeros((n, k), np.float32)
    special[:FP32_BITS, 0] = 1 + probed()[:FP32_BITS]
    special[:FP32_BITS, 1] = -1
    special[FP32_BITS, 0] = probed()[FP32_BITS]
    ones = np.zeros((n, k), np.float32)
    ones[:, :2] = 1
    yield Factors("probe of a", "float32", {"a": special[: FP32_BITS + 1], "b": ones.T})
    yield Factors("probe of b", "float32", {"a": ones[: FP32_BITS + 1], "b": special.T})


def probed() -> Array:
    return np.append(2.0 ** -np.arange(1, FP32_BITS + 1), 2.0**-30).astype(np.float32)


def read_as(peer: Peer, n: int, k: int) -> str:
    """How many bits of fp32 operands count, as the name of the format that keeps so many."""
    kept, small = FP32_BITS, True
    for i, factors in enumerate(probes(n, k)):
        output = product_of(peer, peer.arrays(factors), (factors.rows, factors.columns))
        results = output if i == 0 else output.T
        right = (results[: FP32_BITS + 1] == probed()[:, None]).all(axis=1)
        kept = min(kept, FP32_BITS if right[:FP32_BITS].all() else int(right[:FP32_BITS].argmin()))
        small = small and bool(right[FP32_BITS])
    if kept == 10 and not small:
        return "float16"
    return READ_AS.get(kept, f"{kept} bits")


def check_product_batches(peer: Peer, factors: Factors, sizes: list[int]) -> Batch:
    arrays = peer.arrays(factors.repeated(max(sizes)))

    def run(start: int, stop: int) -> Array:
        part = {**arrays, "a": arrays["a"][start:stop]}
        return encodings(product_of(peer, part, (stop - start, factors.columns)))

    return compare_batches(run, factors.rows, sizes)


def call_product(peer: Peer, factors: Factors, quick: bool) -> None:
    """What the audit calls, for a peer that may end its process: one row, all, the largest batch, the probes."""
    for rows in (1, factors.rows, max(product_sizes(quick))):
        product_of(peer, peer.arrays(factors.repeated(rows)), (rows, factors.columns))
    if factors.dtype == "float32":
        read_as(peer, factors.columns, factors.arrays["b"].shape[0])


def audit_product(
    peers: list[Peer],
    factors: Factors,
    quick: bool,
    tick: Tick,
    refused: Mapping[tuple[str, str], str | None] | None = None,
    lost: dict[str, str] | None = None,
) -> list[ProductTable]:
    """A table for each device that the peers are on. `refused` and `lost` are as for measure.audit_operation."""
    lost = {} if lost is None else lost
    k, n = factors.arrays["b"].shape
    exact = exact_product(factors)
    tables: dict[str, ProductTable] = {}
    for peer in peers:
        tick(f"{factors.data} {factors.dtype} product, {peer.device}: {peer.label}")
        table = tables.setdefault(peer.device, ProductTable(peer.device, factors.dtype, n, k, []))
        tried = (refused or {}).get((peer.device, peer.name))
        result = ProductResult(peer.name, peer.label, lost.get(peer.device) or tried or peer.refuses(factors))
        table.results.append(result)
        if result.skipped:
            continue
        try:
            output = product_of(peer, peer.arrays(factors), (factors.rows, n))
            error = relative_error(output, exact)
            result.batch = check_product_batches(peer, factors, product_sizes(quick))
            result.read_as = read_as(peer, n, k) if factors.dtype == "float32" else None
            result.relative_error = error if math.isfinite(error) else None
            result.through = passed_through(output)
        except Exception as raised:  # whatever a peer of an installation does, it is one line of the table
            table.results[-1] = ProductResult(peer.name, peer.label, f"{type(raised).__name__}: {first_line(raised)}")
            if not peer.healthy():
                lost[peer.device] = f"{peer.label} has ended the {peer.device} context: {table.results[-1].skipped}"
    return list(tables.values())
