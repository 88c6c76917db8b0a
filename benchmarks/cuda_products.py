"""Device time of mm_dtype with an fp32 result on a GPU beside cuBLAS and the peers, in CUDA graphs; and host time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .cuda_call import SAMPLE_NS
from .cuda_cases import L2_TIMES
from .cuda_entries import COPY, Budget, Entries, Entry, enter_peers, race
from .cuda_graphs import Chain, Gpu, Timed, copy_calls
from .cuda_peers import CONSTANT
from .cuda_product_cases import (
    TOLERANCE,
    WARM,
    ProductCase,
    ProductTensors,
    cases,
    expected,
    make_sets,
)
from .cuda_product_tables import error_tables, goals, host_table, tables
from .cuda_time import measure_all
from .peers import BASE
from .product_peers import TORCH
from .progress import Progress
from .report import Report, reason_of
from .timing import Call, Contestant
from .timing import race as host_race

Multiplier = Any  # a CudaPeer with mm_fp32, whose cases and tensors are other ones than a norm's

ROUNDS, QUICK_ROUNDS, LONG_ROUNDS = 9, 5, 5
LONG_US = 1000.0  # a graph
COPY_BYTES = 512 << 20
HOST_CASE = ProductCase(WARM, 1, 256, 7168, cold=False)
HOST_ROUNDS, QUICK_HOST_ROUNDS = 100, 20


class ProductEntries(Entries):
    def wrong(self, entry: Entry) -> bool:
        return not entry.error <= TOLERANCE[self.case.dtype]


@dataclass(frozen=True)
class Step:
    """What cuda_time.measure_all goes through."""

    name: str
    run: Callable[[], None]

    def text(self) -> str:
        return self.name


def copy_bandwidth(gpu: Gpu, rounds: int = LONG_ROUNDS, size: int = COPY_BYTES) -> float:
    """Bytes a microsecond that a device copy reads and writes together."""
    import torch

    source = torch.randn(size // 2, dtype=torch.bfloat16, device=gpu.device)
    chain = Chain(COPY, [copy_calls(source, torch.empty_like(source))], 2)
    times: dict[str, Timed] = gpu.race([(chain, gpu.capture(chain))], rounds)
    return 2 * size / times[COPY].median


def enter(
    case: ProductCase, peers: Sequence[Multiplier], gpu: Gpu, budget: Budget
) -> tuple[ProductEntries, dict[str, bool]]:
    """Everyone's calls, first calls made and results checked; and whether our row 0 has the bits it has alone."""
    sets: list[Any] = make_sets(case, gpu.l2_bytes(), gpu.device)
    truth: Any = expected(case, sets[0])
    product: Any = case
    found = ProductEntries(product, sets, case.count(len(sets)), truth)
    row_bits: dict[str, bool] = {}

    def compare_row(peer: Multiplier) -> None:
        if peer.ours:
            row_bits[peer.name] = same_row(peer, case, sets[0])

    enter_peers(found, peers, gpu, budget, compare_row)
    return found, row_bits


def same_row(peer: Multiplier, case: ProductCase, t: ProductTensors) -> bool:
    """Bits: of t.out, which the peer has just written, and of a product of its first row alone."""
    import torch

    alone = t.first_row()
    call = peer.prepare(ProductCase(case.regime, 1, case.n, case.k, case.dtype, case.cold), alone)
    assert call
    with peer.mode():
        call()
    return torch.equal(alone.out[0].view(torch.int32), t.out[0].view(torch.int32))


def rounds_of(case: ProductCase, count: int, quick: bool) -> int:
    return QUICK_ROUNDS if quick else LONG_ROUNDS if case.guess_us * count > LONG_US else ROUNDS


def measure(
    case: ProductCase, peers: Sequence[Multiplier], gpu: Gpu, budget: Budget, quick: bool, bandwidth: float
) -> dict[str, Any]:
    found, row_bits = enter(case, peers, gpu, budget)
    chains = [(entry, entry.chain(found.count)) for entry in found.entries]
    times = race(found, chains, gpu, rounds_of(case, found.count, quick))
    return record(case, found, times, row_bits, bandwidth)


def record(
    case: ProductCase, found: ProductEntries, times: dict[str, Timed], row_bits: dict[str, bool], bandwidth: float
) -> dict[str, Any]:
    floor_us = case.weight_bytes / bandwidth
    contestants = {}
    for entry in found.entries:
        median = times[entry.name].median
        contestants[entry.name] = {
            "median_us": median,
            "best_us": min(times[entry.name].times),
            "tflop_per_s": case.flop / median / 1e6,
            "share_of_floor": floor_us / median,
            "error": entry.error,
            "wrong": found.wrong(entry),
            "row_bits": row_bits.get(entry.name),
            "first_ms": entry.first_s * 1e3,
        }
    return {
        "regime": case.regime,
        "dtype": case.dtype,
        "cold": case.cold,
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "weight_bytes": case.weight_bytes,
        "flop": case.flop,
        "floor_us": floor_us,
        "sets": len(found.sets),
        "calls": found.count,
        "contestants": contestants,
        "absent": found.absent,
    }


def host_times(
    peers: Sequence[Multiplier], gpu: Gpu, rounds: int, absent: dict[str, str], case: ProductCase = HOST_CASE
) -> list[dict[str, Any]]:
    """Microseconds of a call on an empty queue, by the C loop of `call`; nothing in a sample waits for the device."""
    tensors = make_sets(case, 0, gpu.device)[0]
    contestants, ours = [], {}
    for peer in peers:
        try:
            call = None if peer.refuses(case) else peer.prepare(case, tensors)
            if not call:
                continue
            sample = _sampler(call if isinstance(call, Call) else Call(call, ()), peer, gpu)
            sample(1)
            gpu.synchronize()
        except (Exception, SystemExit) as error:  # SystemExit: the C loop can't be compiled
            absent[peer.name] = reason_of(error)
            continue
        contestants.append(Contestant(peer.name, sample))
        ours[peer.name] = peer.ours
    if contestants:
        host_race(contestants, rounds, SAMPLE_NS)
    gpu.synchronize()
    return [
        {
            "host_call": case.title(),
            "contestant": each.name,
            "ours": ours[each.name],
            "median_us": each.median / 1e3,
            "best_us": each.best / 1e3,
        }
        for each in contestants
    ]


def _sampler(call: Call, peer: Multiplier, gpu: Gpu) -> Callable[[int], float]:
    def sample(number: int) -> float:
        gpu.synchronize()
        with peer.mode():
            return call.nanoseconds(number)

    return sample


def run(
    peers: Sequence[Multiplier], quick: bool, seconds: float, gpu: Gpu, head: dict[str, str], progress: Progress
) -> Report:
    method = (
        "microseconds a call in a CUDA graph that holds a chain of calls; the contestants' graphs are replayed in "
        f"turns in one process; medians over turns; cold weights rotate over more than {L2_TIMES} times the L2 cache"
    )
    report = Report("cuda_products", {**head, "method": method})
    budget = Budget(seconds)
    host: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    products: list[dict[str, Any]] = []
    bandwidth = [float("nan")]

    def host_step() -> None:  # first, while no library's threads are at work
        host.extend(host_times(peers, gpu, QUICK_HOST_ROUNDS if quick else HOST_ROUNDS, absent))

    def copy_step() -> None:
        bandwidth[0] = copy_bandwidth(gpu)

    def product_step(case: ProductCase) -> Step:
        def do() -> None:
            products.append(measure(case, peers, gpu, budget, quick, bandwidth[0]))

        return Step(case.text(), do)

    steps = [Step("host time", host_step), Step(COPY, copy_step), *[product_step(case) for case in cases(quick)]]
    measure_all(report, steps, lambda step: step.run(), budget, progress)
    report.head[COPY] = f"{bandwidth[0] / 1e6:.2f} TB/s, read and written together"
    if absent:
        report.head["no host time"] = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
    names = [peer.name for peer in peers if any(peer.name in r["contestants"] for r in products)]
    report.notes = notes()
    report.tables = [*tables(products, names), *error_tables(products, names), *host_table(host)]
    report.goals = goals(products, host)
    report.records = [{"copy_bytes_per_us": bandwidth[0]}, *host, *products]
    return report


def notes() -> list[str]:
    return [
        f"x (M x K) times the transpose of a weight (N x K); fp32 result. {TORCH}: cuBLAS, with out_dtype= where x",
        f"is bfloat16, TF32 off where it is fp32. {BASE}: mm_dtype with out=, safe after a kernel that writes",
        f"the weight. {CONSTANT}: weights_are_constant(). SGLang's JIT kernel asks for the weight before the kernel",
        f"ahead of it has ended, so it is {CONSTANT} that does the same work; the other peers wait.",
        f"of floor: the time of a {COPY} that reads and writes as many bytes as the weight has, over {BASE}'s.",
        f"x best, x {TORCH}: the time of the best peer, of {TORCH}, over {BASE}'s.",
        "-: not measured, the JSON file has the reason. A figure with ! is of a kernel whose result is wrong.",
    ]
