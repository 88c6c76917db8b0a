"""Counting, batch invariance and timing of one operation over all peers that run it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .operands import Operands, numpy_dtype
from .oracle import exact_norm, exact_sum
from .peers import BASE, EAGER, Peer

Array = npt.NDArray[Any]
# What is rounded to the dtype before the result: "s" (x + residual), "s after variance" (the variance is taken from the
# fp32 sum), "y" (s / rms, before the weight).
Points = tuple[str, ...]
Tick = Callable[[str], None]


def encodings(a: Array) -> Array:
    """The bits, every NaN as one."""
    unsigned = np.uint32 if a.dtype.itemsize == 4 else np.uint16
    bits = np.ascontiguousarray(a).view(unsigned)
    nan = np.isnan(a)
    return np.where(nan, unsigned(np.iinfo(unsigned).max), bits) if nan.any() else bits


def differing(a: Array, b: Array) -> int:
    return int(np.count_nonzero(encodings(a) != encodings(b)))


def largest_ulp(a: Array, b: Array) -> int | None:
    """How many numbers of the dtype lie between a and b at most; None if one is NaN where the other is not."""
    if (np.isnan(a) != np.isnan(b)).any():
        return None
    bits_a, bits_b = encodings(a).astype(np.int64), encodings(b).astype(np.int64)
    sign = 1 << (8 * a.dtype.itemsize - 1)
    place_a = np.where(bits_a & sign, sign - bits_a, bits_a)  # the numbers' places on the line; both zeros at 0
    place_b = np.where(bits_b & sign, sign - bits_b, bits_b)
    return int(np.abs(place_a - place_b).max(initial=0))


def exact_fused(operands: Operands, points: Points) -> Array:
    x, residual, weight = (operands.arrays[name] for name in ("x", "residual", "weight"))
    s = exact_sum(x, residual, rounded="s" in points or "s after variance" in points)
    variance_of = exact_sum(x, residual, rounded=False) if "s after variance" in points else None
    return exact_norm(s, weight, operands.eps, x.dtype, "y" in points, variance_of)


def exact_alone(operands: Operands, points: Points) -> Array:
    x, weight = operands.arrays["x"], operands.arrays["weight"]
    return exact_norm(x.astype(np.float32), weight, operands.eps, x.dtype, "y" in points)


@dataclass(frozen=True)
class Reference:
    key: str  # in JSON
    title: str
    points: Points


@dataclass(frozen=True)
class Operation:
    """`name` is the peer's method, `inputs` its array arguments, of which `batched` have a row per token.

    `exact` gives the result at the rounding points asked for. `references` are those that every peer is counted
    against; `points` are all there are, the fewer first: at which of them a peer rounds is found out, not believed.
    """

    name: str
    title: str
    inputs: tuple[str, ...]
    batched: tuple[str, ...]
    exact: Callable[[Operands, Points], Array]
    references: tuple[Reference, ...]
    points: tuple[Points, ...]


NEAREST = "exact_nearest_points"
UNCLEAR = 0.02  # of the elements: more of them differ from every exact result in fp32, where nothing stands out
OPERATIONS = {
    "fused_add_rmsnorm": Operation(
        "fused_add_rmsnorm",
        "fused add + RMSNorm",
        ("x", "residual", "weight"),
        ("x", "residual"),
        exact_fused,
        (
            Reference("exact_fp32_sum", "exact, fp32 sum", ("y",)),
            Reference("exact_rounded_sum", "exact, rounded sum", ("s", "y")),
        ),
        ((), ("y",), ("s",), ("s after variance",), ("s", "y"), ("s after variance", "y")),
    ),
    "rms_norm": Operation(
        "rms_norm",
        "RMSNorm",
        ("x", "weight"),
        ("x",),
        exact_alone,
        (Reference("exact", "exact, HF points", ("y",)),),
        ((), ("y",)),
    ),
}


@dataclass
class Batch:
    """Does a row give the same bits alone and in a batch? `sizes` were tried; the others are the first at which not."""

    sizes: int
    largest: int
    row_0_changes_at: int | None = None
    any_row_changes_at: int | None = None


@dataclass
class Result:
    """One peer in one table. `skipped` says why there are no figures; then the rest is empty."""

    peer: str
    label: str
    skipped: str | None = None
    nearest_points: Points | None = None
    differ: dict[str, int] = field(default_factory=dict)
    largest_ulp: dict[str, int | None] = field(default_factory=dict)
    batch: Batch | None = None
    seconds: float | None = None
    relative_time: float | None = None


@dataclass
class Table:
    """All peers on one operation, one set of operands."""

    data: str
    operation: str
    dtype: str
    rows: int
    columns: int
    results: list[Result]

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "elements": self.elements}


def call(peer: Peer, operation: Operation, arrays: Mapping[str, Any], eps: float) -> Any:
    return getattr(peer, operation.name)(**{name: arrays[name] for name in operation.inputs}, eps=eps)


def norm_of(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def batch_sizes(largest: int, seed: int, quick: bool) -> list[int]:
    """1 to 16, around the powers of two, a random choice up to 300; then 512 and 1024. None above `largest`."""
    around = [size + step for size in (32, 64, 128, 256) for step in (-1, 0, 1)]
    chosen = np.random.default_rng(seed).choice(np.arange(17, 301), 4 if quick else 32, replace=False).tolist()
    return [size for size in sorted({*range(1, 17), *around, *chosen, 512, 1024}) if size <= largest]


def check_batches(peer: Peer, operation: Operation, operands: Operands, sizes: list[int]) -> Batch:
    dtype = numpy_dtype(operands.dtype)
    largest = max(sizes)
    arrays = peer.arrays(operands.repeated(largest))

    def run(start: int, stop: int) -> Array:
        part = {name: a[start:stop] if name in operation.batched else a for name, a in arrays.items()}
        result = norm_of(call(peer, operation, part, operands.eps))
        peer.synchronise()
        return encodings(peer.to_numpy(result, dtype))

    distinct = min(largest, operands.rows)
    alone = np.concatenate([run(row, row + 1) for row in range(distinct)])[np.arange(largest) % distinct]
    batch = Batch(len(sizes), largest)
    for size in sizes:
        changed = (run(0, size) != alone[:size]).any(axis=1)
        if changed[0] and batch.row_0_changes_at is None:
            batch.row_0_changes_at = size
        if changed.any() and batch.any_row_changes_at is None:
            batch.any_row_changes_at = size
        if changed[0]:
            break
    return batch


def time_calls(calls: Mapping[str, Callable[[], Any]], least: int, budget_s: float) -> dict[str, list[float]]:
    """Seconds of each call in each round. The calls of a round follow one another: a ratio compares neighbours.

    Each is made twice and timed once, so that every one finds in the caches what it left there itself.
    """
    clock = time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = clock(), 0
    while rounds < least or (rounds < 301 and clock() - begin < budget_s):
        for name, one_call in calls.items():
            one_call()
            start = clock()
            result = one_call()
            seconds[name].append(clock() - start)
            del result  # its memory goes back outside of the time
        rounds += 1
    return seconds


def audit_operation(
    peers: list[Peer], operation: Operation, operands: Operands, seed: int, quick: bool, tick: Tick
) -> Table:
    """One table. A peer that raises is reported with its error, and the others go on."""
    dtype = numpy_dtype(operands.dtype)
    sizes = batch_sizes(1024, seed, quick)
    place = f"{operands.data} {operands.dtype} {operation.title}"
    results: list[Result] = []
    outputs: dict[str, Array] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for peer in peers:
        tick(f"{place}: {peer.label}")
        if operation.name not in peer.operations:
            continue
        result = Result(peer.name, peer.label, peer.refuses(operands))
        results.append(result)
        if result.skipped:
            continue
        try:
            arrays = peer.arrays(operands)
            output = peer.to_numpy(norm_of(call(peer, operation, arrays, operands.eps)), dtype)
            if output.dtype != dtype or output.shape != operands.arrays["x"].shape:
                raise TypeError(f"the result is {output.dtype} of shape {output.shape}")
            result.batch = check_batches(peer, operation, operands, sizes)
        except Exception as error:  # whatever a peer of an installation does, it is one line of the table
            result.skipped = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            continue
        outputs[peer.name] = output
        calls[peer.name] = partial(_timed, peer, operation, arrays, operands.eps)
    tick(f"{place}: exact results")
    exact = {points: operation.exact(operands, points) for points in operation.points}
    for result in results:
        if result.peer in outputs:
            _count(result, operation, outputs, exact)
    tick(f"{place}: time")
    _time(results, calls, *((5, 0.3) if quick else (25, 2.0)))
    return Table(operands.data, operation.name, operands.dtype, operands.rows, operands.columns, results)


def _count(result: Result, operation: Operation, outputs: Mapping[str, Array], exact: Mapping[Points, Array]) -> None:
    output = outputs[result.peer]
    counts = {points: differing(output, reference) for points, reference in exact.items()}
    result.nearest_points = min(counts, key=lambda points: counts[points])
    compared = {reference.key: reference.points for reference in operation.references}
    for key, points in {**compared, NEAREST: result.nearest_points}.items():
        result.differ[key] = counts[points]
        result.largest_ulp[key] = largest_ulp(output, exact[points])
    if EAGER in outputs:
        result.differ["hf_eager"] = differing(output, outputs[EAGER])


def _timed(peer: Peer, operation: Operation, arrays: Mapping[str, Any], eps: float) -> Any:
    result = call(peer, operation, arrays, eps)
    peer.synchronise()
    return result


def _time(results: list[Result], calls: Mapping[str, Callable[[], Any]], least: int, budget_s: float) -> None:
    seconds = time_calls(calls, least, budget_s)
    for result in results:
        mine = seconds.get(result.peer)
        if not mine:
            continue
        result.seconds = statistics.median(mine)
        if BASE in seconds:
            result.relative_time = statistics.median(a / b for a, b in zip(mine, seconds[BASE], strict=True))
