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

from .operands import Operands, numpy_dtype, random_operands
from .oracle import exact_norm, exact_sum
from .peers import BASE, EAGER, Peer, Points, first_line

Array = npt.NDArray[Any]
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
CPU_BITS = "cpu_bits"  # what differs from the same norm's result on the CPU
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
class Mixed:
    """What a norm makes of a bfloat16 x with an fp32 weight, of which `differ` says how many elements are not those of
    its nearest rounding points. `outcome`: "right", "rounded" (the weight was rounded to bfloat16), "wrong" or
    "refused" (`text`: in which words)."""

    outcome: str
    dtype: str | None = None  # of the result
    differ: int | None = None
    elements: int | None = None
    text: str | None = None


@dataclass
class Result:
    """One peer in one table. `skipped` says why there are no figures; then the rest is empty."""

    peer: str
    label: str
    skipped: str | None = None
    nearest_points: Points | None = None
    rounds_as_declared: bool | None = None  # None: it declares nothing, or no rounding points stand out
    differ: dict[str, int] = field(default_factory=dict)
    largest_ulp: dict[str, int | None] = field(default_factory=dict)
    batch: Batch | None = None
    seconds: float | None = None
    relative_time: float | None = None
    untimed: str | None = None  # why there is no time
    fp32_weight: Mixed | None = None  # on CUDA, for bfloat16


@dataclass
class Table:
    """All peers of a device on one operation, one set of operands."""

    device: str
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


def result_of(peer: Peer, operation: Operation, operands: Operands, arrays: Mapping[str, Any]) -> Array:
    """The norm as an ndarray; TypeError if it is not one of x's shape in a dtype of ours."""
    output = peer.to_numpy(norm_of(call(peer, operation, arrays, operands.eps)), numpy_dtype(operands.dtype))
    if output.dtype.name not in ("float32", operands.dtype) or output.shape != operands.arrays["x"].shape:
        raise TypeError(f"the result is {output.dtype} of shape {output.shape}")
    return output


def with_fp32_weight(peer: Peer, operation: Operation, columns: int, seed: int) -> Mixed:
    """Numbers that bfloat16 can't hold in the weight, and the exact results for them as they are and as bfloat16."""
    try:
        operands = random_operands("bfloat16", 64, columns, seed)
        rounded = operands.arrays["weight"]
        wide = random_operands("float32", 1, columns, seed + 1).arrays["weight"]
        given = Operands("fp32 weight", "bfloat16", {**operands.arrays, "weight": wide}, operands.eps)
        refused = peer.refuses(given)
        if refused:
            return Mixed("refused", text=refused)
        output = result_of(peer, operation, given, peer.arrays(given))
    except Exception as error:
        return Mixed("refused", text=f"{type(error).__name__}: {first_line(error)}")
    narrow = output.astype(rounded.dtype)
    counts = []
    for weight in (wide, wide.astype(rounded.dtype)):
        reference = Operands("", "bfloat16", {**operands.arrays, "weight": weight}, operands.eps)
        counts.append(min(differing(narrow, operation.exact(reference, points)) for points in operation.points))
    few = [count <= UNCLEAR * output.size for count in counts]
    outcome = "right" if few[0] and counts[0] <= counts[1] else "rounded" if few[1] else "wrong"
    return Mixed(outcome, output.dtype.name, counts[0], output.size)


def batch_sizes(largest: int, seed: int, quick: bool) -> list[int]:
    """1 to 17, around the powers of two, a random choice up to 300; then 512 and 1024. None above `largest`."""
    around = [size + step for size in (32, 64, 128, 256) for step in (-1, 0, 1)]
    chosen = np.random.default_rng(seed).choice(np.arange(18, 301), 4 if quick else 32, replace=False).tolist()
    return [size for size in sorted({*range(1, 18), *around, *chosen, 512, 1024}) if size <= largest]


def check_batches(peer: Peer, operation: Operation, operands: Operands, sizes: list[int]) -> Batch:
    dtype = numpy_dtype(operands.dtype)
    arrays = peer.arrays(operands.repeated(max(sizes)))

    def run(start: int, stop: int) -> Array:
        part = {name: a[start:stop] if name in operation.batched else a for name, a in arrays.items()}
        result = norm_of(call(peer, operation, part, operands.eps))
        peer.synchronise()
        return encodings(peer.to_numpy(result, dtype))

    return compare_batches(run, operands.rows, sizes)


def compare_batches(run: Callable[[int, int], Array], rows: int, sizes: list[int]) -> Batch:
    """`run(start, stop)` gives the encodings of these rows computed in one call; row i repeats row i - `rows`."""
    largest = max(sizes)
    distinct = min(largest, rows)
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


def time_calls(
    calls: Mapping[str, Callable[[], float]], least: int, budget_s: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The seconds that each call tells, of each round, and the errors of those that failed.

    The calls of a round follow one another: a ratio compares neighbours.
    """
    clock = time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    begin, rounds = clock(), 0
    while rounds < least or (rounds < 301 and clock() - begin < budget_s):
        for name, one_call in calls.items():
            if name in failed:
                continue
            try:
                seconds[name].append(one_call())
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {first_line(error)}"
                del seconds[name]
        rounds += 1
    return seconds, failed


class Bench:
    """One operation on one set of operands, for the peers of every device: their results side by side."""

    def __init__(self, operation: Operation, operands: Operands, seed: int, quick: bool, lost: dict[str, str]) -> None:
        self.operation, self.operands, self.quick, self.lost = operation, operands, quick, lost
        self.sizes = batch_sizes(1024, seed, quick)
        self.place = f"{operands.data} {operands.dtype} {operation.title}"
        self.outputs: dict[tuple[str, str], Array] = {}  # by device and peer
        self.tables: dict[str, Table] = {}
        self.calls: dict[str, dict[str, Callable[[], float]]] = {}

    def add(self, peer: Peer, refused: str | None) -> None:
        """Calls the peer. One that raises is reported with its error, and the others go on."""
        operands, operation, device = self.operands, self.operation, peer.device
        if device not in self.tables:
            size = operands.rows, operands.columns
            self.tables[device] = Table(device, operands.data, operation.name, operands.dtype, *size, [])
        if operation.name not in peer.operations:
            return
        result = Result(peer.name, peer.label, self.lost.get(device) or refused or peer.refuses(operands))
        self.tables[device].results.append(result)
        if result.skipped:
            return
        try:
            arrays = peer.arrays(operands)
            output = result_of(peer, operation, operands, arrays)
            if output.dtype.name != operands.dtype:
                raise TypeError(f"the result is {output.dtype} of shape {output.shape}")
            result.batch = check_batches(peer, operation, operands, self.sizes)
            one_call = peer.call_to_time(
                operation.name, {name: arrays[name] for name in operation.inputs}, operands.eps
            )
        except Exception as error:  # whatever a peer of an installation does, it is one line of the table
            result.skipped = f"{type(error).__name__}: {first_line(error)}"
            self._check_device(peer, result.skipped)
            return
        self.outputs[device, peer.name] = output
        self.calls.setdefault(device, {})[peer.name] = partial(peer.seconds, one_call)
        self._count_cpu_bits(peer, result)

    def _check_device(self, peer: Peer, error: str) -> None:
        if not peer.healthy():
            self.lost[peer.device] = f"{peer.label} has ended the {peer.device} context: {error}"

    def _count_cpu_bits(self, peer: Peer, result: Result) -> None:
        if peer.device == "cpu":
            return
        if ("cpu", peer.name) not in self.outputs:
            twin = peer.on_cpu()
            try:
                if twin is None or twin.available() is not None:
                    return
                twin.load()
                output = result_of(twin, self.operation, self.operands, twin.arrays(self.operands))
            except Exception:  # no figure: the CPU's norms are not what is audited here
                return
            self.outputs["cpu", peer.name] = output
        mine, cpu = self.outputs[peer.device, peer.name], self.outputs["cpu", peer.name]
        result.differ[CPU_BITS], result.largest_ulp[CPU_BITS] = differing(mine, cpu), largest_ulp(mine, cpu)

    def count(self, declares: Mapping[tuple[str, str], Mapping[str, Points]]) -> None:
        """What differs from the exact results, and at which rounding points least does; `declares` by device, peer."""
        operands, operation = self.operands, self.operation
        exact = {points: operation.exact(operands, points) for points in operation.points}
        for device, table in self.tables.items():
            for result in table.results:
                output = self.outputs.get((device, result.peer))
                if output is None or result.skipped:
                    continue
                self._count(result, output, exact, declares.get((device, result.peer), {}).get(operation.name))
                if (device, EAGER) in self.outputs:
                    result.differ["hf_eager"] = differing(output, self.outputs[device, EAGER])

    def _count(self, result: Result, output: Array, exact: Mapping[Points, Array], claimed: Points | None) -> None:
        counts = {points: differing(output, reference) for points, reference in exact.items()}
        result.nearest_points = min(counts, key=lambda points: counts[points])
        limit = UNCLEAR * output.size
        if claimed in counts and counts[result.nearest_points] <= limit:
            result.rounds_as_declared = counts[claimed] <= max(limit, counts[result.nearest_points])
        compared = {reference.key: reference.points for reference in self.operation.references}
        for key, points in {**compared, NEAREST: result.nearest_points}.items():
            result.differ[key] = counts[points]
            result.largest_ulp[key] = largest_ulp(output, exact[points])

    def time(self, device: str) -> None:
        seconds, failed = time_calls(self.calls.get(device, {}), *((5, 0.3) if self.quick else (25, 2.0)))
        for result in self.tables[device].results:
            result.untimed = failed.get(result.peer)
            mine = seconds.get(result.peer)
            if not mine:
                continue
            result.seconds = statistics.median(mine)
            if BASE in seconds:
                result.relative_time = statistics.median(a / b for a, b in zip(mine, seconds[BASE], strict=True))


def audit_operation(
    peers: list[Peer],
    operation: Operation,
    operands: Operands,
    seed: int,
    quick: bool,
    tick: Tick,
    refused: Mapping[tuple[str, str], str] | None = None,
    lost: dict[str, str] | None = None,
) -> list[Table]:
    """A table for each device that the peers are on, in their order.

    `refused` says, by device and name, which peers can't be called on these operands, and why. `lost` holds the devices
    that an error has ended, with the words for it, and is added to.
    """
    bench = Bench(operation, operands, seed, quick, {} if lost is None else lost)
    for peer in peers:
        tick(f"{bench.place}, {peer.device}: {peer.label}")
        bench.add(peer, (refused or {}).get((peer.device, peer.name)))
    tick(f"{bench.place}: exact results")
    bench.count({(peer.device, peer.name): peer.declares for peer in peers})
    for device in bench.tables:
        tick(f"{bench.place}, {device}: time")
        bench.time(device)
    return list(bench.tables.values())
